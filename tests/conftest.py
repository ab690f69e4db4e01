"""Fixtures of all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before triton and tlkernels are imported, which ask for it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tlkernels import testing
from tlkernels._core import native, triton

if triton.INTERPRETED and triton.available():
    testing.mend_interpreter()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fill what torch allocates without initialising it with NaN, so that an unwritten result is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def needs_native():
    if not native.available():
        pytest.skip(native.why_not())
