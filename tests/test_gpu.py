"""Tests that need a GPU: no host synchronisation, other streams, CUDA graphs, offsets beyond 2**31, memory."""

import harness
import pytest
from battery import CHECKS, LARGE, LOSSES, targets

from tlkernels._core import triton

ON_GPU = [(name, target) for name in LOSSES for target in targets(name) if harness.device(target) == "cuda"]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Unset TLKERNELS_CHECK, with which the host waits for the device to check the class indices."""
    monkeypatch.setattr(triton, "CHECK", False)
    monkeypatch.delenv("TLKERNELS_CHECK", raising=False)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "target"), ON_GPU, ids=str)
def test_first_case(name, target, check):
    loss = LOSSES[name]
    CHECKS[check](loss, loss.cases[0], target.impl)


@pytest.mark.parametrize(("name", "target"), [pair for pair in ON_GPU if pair[0] in LARGE], ids=str)
def test_offsets_beyond_2_31(name, target):
    LARGE[name](name, target.impl)
