"""Fixtures of all tests."""

import os

import pytest
import torch

# Before triton and tlkernels are imported, which ask for these once. With the check, class indices out of range raise
# on a GPU too.
if torch.cuda.is_available():
    os.environ.setdefault("TLKERNELS_CHECK", "1")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tlkernels import testing
from tlkernels._core import native, triton

if triton.INTERPRETED and triton.available():
    testing.mend_interpreter()


def pytest_collection_modifyitems(items):
    """Mark what runs on a GPU: the tests with a parameter that is an implementation or target of one."""
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "cuda" in map(testing.device, params):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _device_and_seed(request):
    on_gpu = request.node.get_closest_marker("gpu")
    torch.set_default_device("cuda" if on_gpu else None)
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


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
