"""The losses beyond cross entropy, forward and backward, against eager, torch.compile and their floor."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.losses import CASES, Case, build, errors, excess
from bench.measure import LEAST_ROUNDS, interleave, quartiles, speedups
from bench.replay import clock, play
from bench.report import verdicts


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    """Time the contestants, add the figures to the results, and fail where ours is wrong."""
    work = case.make(case.shape, lambda tensor: tensor.to(case.dtype))
    steps = {name: build(name, work) for name in ("auto", *case.contestants, *work.peers)}
    seconds = min(case.seconds, 1.0) if pytestconfig.getoption("quick") else case.seconds
    samples = interleave(steps, seconds, min(LEAST_ROUNDS, 5) if seconds > 10 else LEAST_ROUNDS)
    names = ("auto", "eager")
    error = errors(case, names, draws=1)
    if excess(case, error):  # a loss is one number, and eager's may have been lucky
        error = errors(case, names, draws=10)
    info: dict[str, Any] = {
        "id": case.id,
        "group": "losses",
        "loss": case.loss,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bars": case.bars,
        "ours": "auto",
        "memory": {},
        "error": error,
        "rounds": len(samples["auto"]),
        "seconds": {name: quartiles(times) for name, times in samples.items()},
        "speedup": speedups(samples, "auto"),
    }
    info["verdicts"] = verdicts(info)
    benchmark.extra_info.update(info)
    play(benchmark, samples["auto"])
    assert not excess(case, error), excess(case, error)  # no speed-up counts on a wrong result
    results.append(info)
