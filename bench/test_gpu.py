"""The losses on a GPU, forward and backward, against eager, torch.compile, peers and what the card gives."""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu import CASES
from bench.losses import Case, WorkStep
from bench.replay import clock
from bench.test_losses import measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def peak(case: Case, name: str) -> int:
    """Bytes above the inputs that a call of a contestant holds at most, its gradients among them."""
    work = case.make(case.shape, lambda tensor: tensor.to(case.dtype))
    step = WorkStep({"auto": work.ours, "eager": work.eager}[name], work.inputs)
    step()
    step.release()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss_on_gpu(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        peaks = {name: peak(case, name) for name in ("auto", *case.contestants) if name in ("auto", "eager")}
        measure(case, benchmark, results, pytestconfig.getoption("quick"), peak_bytes=peaks)
