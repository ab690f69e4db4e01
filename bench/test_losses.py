"""The losses beyond cross entropy, forward and backward, against eager, torch.compile and their floor."""

from collections.abc import Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contestants import OURS
from bench.losses import CASES, Case, WorkStep, build
from bench.measure import LEAST_ROUNDS, error_bar, interleave, quartiles, speedups
from bench.replay import clock, play
from bench.report import verdicts

ROWS = 1024  # for the error: eager in float64 needs the memory of several N x V or N x N tensors


def errors(case: Case, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Relative error, in the 2-norm, of loss and gradients (the worst), against the eager lines in float64."""
    shape = (min(ROWS, case.shape[0]), *case.shape[1:])
    work = case.make(shape, lambda tensor: tensor.to(case.dtype))
    wide = case.make(shape, lambda tensor: tensor.to(case.dtype).double())
    exact = WorkStep(wide.eager, wide.inputs).results()
    found = {}
    for name in names:
        step = build(name, work)
        if isinstance(step, WorkStep):
            parts = zip(step.results(), exact, strict=True)
            value, *grads = (float((got - right).norm() / right.norm()) for got, right in parts)
            found[name] = {"value": value, "gradient": max(grads)}
    return found


def measure(case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], quick: bool, **more: Any) -> None:
    """Time the contestants, add the figures and `more` to the results, and fail where ours is wrong."""
    work = case.make(case.shape, lambda tensor: tensor.to(case.dtype))
    steps = {name: build(name, work) for name in ("auto", *case.contestants, *work.peers)}
    seconds = min(case.seconds, 1.0) if quick else case.seconds
    samples = interleave(steps, seconds, min(LEAST_ROUNDS, 5) if seconds > 10 else LEAST_ROUNDS)
    info: dict[str, Any] = {
        "id": case.id,
        "group": "losses",
        "loss": case.loss,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bars": case.bars,
        "ours": "auto",
        "memory": {},
        "error": errors(case, ("auto", "eager", *(name for name in OURS if name in work.peers))),
        "rounds": len(samples["auto"]),
        "seconds": {name: quartiles(times) for name, times in samples.items()},
        "speedup": speedups(samples, "auto"),
        **more,
    }
    info["verdicts"] = verdicts(info)
    benchmark.extra_info.update(info)
    play(benchmark, samples["auto"])
    for name in info["error"].keys() - {"eager"}:  # no speed-up counts on a wrong result
        for part, error in info["error"][name].items():
            eager = info["error"]["eager"][part]
            what = f"{name}, {part}: relative error {error:.2e}, eager's {eager:.2e}"
            assert error <= error_bar(eager, case.dtype), what
    results.append(info)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    measure(case, benchmark, results, pytestconfig.getoption("quick"))
