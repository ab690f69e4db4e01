"""Fixtures of all tests, and which tests make up the quick part."""

import os
import time
from collections import defaultdict
from zlib import crc32

import pytest
import torch
from covering import covering

# Before triton and tlkernels are imported, which ask for these once. With the check, class indices out of range raise
# on a GPU too.
if torch.cuda.is_available():
    os.environ.setdefault("TLKERNELS_CHECK", "1")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import harness

from tlkernels._core import native, triton

if triton.INTERPRETED and triton.available():
    harness.mend_interpreter()


FEW = 8
"""A test with no more parameter sets than that is in the quick part with all of them."""
SIXTHS = range(1, 7)


def pytest_addoption(parser):
    parser.addoption("--sixth", type=int, choices=SIXTHS, help="of the tests chosen otherwise, run one sixth")


def quick_part(ids):
    """Return which of a test's parameter sets, given by their ids, `make test` runs: all pairs of words are in it.

    Of an option, a word such as "softcap=5.0", its default is a word too.
    """
    if len(ids) <= FEW:
        return range(len(ids))
    cases = [set(id.split("-")) for id in ids]
    options = {word.partition("=")[0] for words in cases for word in words if "=" in word}
    for words in cases:
        given = {word.partition("=")[0] for word in words}
        words |= {f"{name}=" for name in options - given}
    return covering(cases)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Mark what runs on a GPU, and what is not in the quick part.

    A test runs on a GPU if a parameter is an implementation or a target of one.
    """
    grids = defaultdict(list)
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        params = item.callspec.params
        if "cuda" in map(harness.device, params.values()):
            item.add_marker("gpu")
        if not item.get_closest_marker("full"):
            grids[item.nodeid.partition("[")[0], id(params.get("loss"))].append(item)
    for grid in grids.values():
        quick = set(quick_part([item.callspec.id for item in grid]))
        for k, item in enumerate(grid):
            if k not in quick:
                item.add_marker("full")
    result = yield
    sixth = config.getoption("sixth")
    if sixth is not None:
        # By its name, so that a test stays in its sixth whatever others come and go.
        chosen = [item for item in items if crc32(item.nodeid.encode()) % len(SIXTHS) == sixth - 1]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
    return result


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
def impatient(monkeypatch):
    """Do not wait between the tries to reach a model hub, which take 23 s where there is no network."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def needs_native():
    if not native.available():
        pytest.skip(native.why_not())
