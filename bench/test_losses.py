"""Every loss, forward and backward, against eager, torch.compile and its floor: one test per case."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES
from bench.replay import clock, play
from tlkernels.bench.measure import measure
from tlkernels.bench.work import Case


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    option = pytestconfig.getoption
    info, times = measure(case, option("impl"), option("contestant"), quick=option("quick"))
    play(benchmark, times)
    benchmark.extra_info.update(info)
    assert not info["wrong"], info["wrong"]  # no speed-up counts on a wrong result
    results.append(info)
