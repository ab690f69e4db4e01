"""Fixtures of all tests, and the choice of the quick part.

Environment, set here unless the caller has set it: on a machine with a GPU TLKERNELS_CHECK=1, with which a class index
out of range raises on a GPU too; on any other machine TRITON_INTERPRET=1, with which Triton's kernels run on the CPU.
OMP_WAIT_POLICY=passive, since each process of pytest-xdist has threads for all cores: those that wait for work by
spinning take the cores from the other processes, and the tests of the kernels take five times as long.
"""

import argparse
import gc
import os
import time
from collections import defaultdict
from importlib.util import find_spec
from zlib import crc32

# OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import torch.distributed as dist
from covering import covering

# triton and tlkernels read these once, when they are imported.
if torch.cuda.is_available():
    os.environ.setdefault("TLKERNELS_CHECK", "1")
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import harness
from browser import chromium, started  # noqa: F401 (fixtures)
from helpers import IMPLEMENTATIONS
from torch.distributed.device_mesh import init_device_mesh

from tlkernels._core import native, triton

if triton.INTERPRETED and triton.available():
    harness.mend_interpreter()


# `make test-hosts` runs them in an environment of its own; there a missing library is an error.
collect_ignore_glob = [] if find_spec("torchvision") else ["hosts/*"]

FEW = 8
"""A test with at most so many parameter sets is in the quick part with all of them."""


def part_of(text):
    """Return the numbers of "K/N"."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, got {text!r}")
    return int(number), int(parts)


def pytest_addoption(parser):
    parser.addoption("--part", type=part_of, metavar="K/N", help="run the Kth of N parts of the selected tests")


def quick_part(ids):
    """Return the indices of the parameter sets that `make test` runs; together they have all pairs of words.

    `ids` are the test ids of the parameter sets, words joined by "-". For an option, a word such as "softcap=5.0", the
    default counts as a word too.
    """
    if len(ids) <= FEW:
        return range(len(ids))
    cases = [set(id.split("-")) for id in ids]
    options = {word.partition("=")[0] for words in cases for word in words if "=" in word}
    for words in cases:
        given = {word.partition("=")[0] for word in words}
        words |= {f"{name}=" for name in options - given}
    return covering(cases)


def seen_elsewhere(item):
    """Return whether other tests in the quick part run the same kernels on the same target.

    test_every_loss.py has every option of every loss on every target. So the tests of peers' mistakes and of many
    chunks are in the rest, and other tests take the best instruction set. Top-k distillation has no kernels of its own.
    A module is called with float32. Gradcheck and opcheck in Triton's interpreter take longest.
    """
    file, test, id = item.path.name, item.originalname, item.callspec.id
    if file.startswith("test_peers") or test == "test_many_chunks":
        return True
    if test == "test_module_is_the_function" and "float32" not in id:
        return True
    if test in ("test_gradcheck", "test_batches_of_upstreams", "test_opcheck") and "triton" in id:
        return True
    if file == "test_every_loss.py" and "topk" not in id:
        return False
    targets = [value for value in item.callspec.params.values() if isinstance(value, harness.Target)]
    if file == "test_topk_distillation.py" and any(target.impl == "triton" for target in targets):
        return True
    return any(target.isa in native.isas()[1:] for target in targets)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests that run on a GPU and those that are not in the quick part; keep one part if asked for.

    A test runs on a GPU if one of its parameters is an implementation or a target that does.
    """
    grids = defaultdict(list)
    for item in items:
        if not hasattr(item, "callspec"):
            continue
        params = item.callspec.params
        if "cuda" in map(harness.device, params.values()):
            item.add_marker("gpu")
        if seen_elsewhere(item):
            item.add_marker("full")
        if not item.get_closest_marker("full"):
            grids[item.nodeid.partition("[")[0], id(params.get("loss"))].append(item)
    for grid in grids.values():
        quick = set(quick_part([item.callspec.id for item in grid]))
        for k, item in enumerate(grid):
            if k not in quick:
                item.add_marker("full")
    result = yield
    part = config.getoption("part")
    if part is not None:
        # By a hash of its name: a test stays in its part when others are added or removed.
        number, parts = part
        chosen = [item for item in items if crc32(item.nodeid.encode()) % parts == number - 1]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
    return result


def pytest_collection_finish(session):
    """Let garbage collections pass over what the imports have made; the hosts' libraries make each take a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    """Else extension modules report at exit that their objects are still there."""
    gc.unfreeze()


def pytest_collectstart(collector):
    """Seed the random numbers that a file makes while it is imported."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device_and_seed(request):
    on_gpu = request.node.get_closest_marker("gpu")
    torch.set_default_device("cuda" if on_gpu else None)
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture
def one_thread():
    """Small tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that a test sees a result that was not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def impatient(monkeypatch):
    """Do not wait between attempts to reach a model hub; without a network they take 23 s."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone; give its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=IMPLEMENTATIONS)
def any_impl(request):
    """Each implementation; `native` with the instruction set that is in use."""
    return request.param


@pytest.fixture
def needs_native():
    if not native.available():
        pytest.skip(native.why_not())
