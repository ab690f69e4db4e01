"""Tests of the hosts that need torchvision. `make test-hosts` runs them; elsewhere there is nothing to collect."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("torchvision") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
