"""The losses beyond cross entropy, forward and backward, against eager, torch.compile and their floor."""

from collections.abc import Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contestants import OURS
from bench.losses import CASES, Case, WorkStep, build, drawn
from bench.measure import LEAST_ROUNDS, error_bar, interleave, quartiles, speedups
from bench.replay import clock, play
from bench.report import verdicts

ROWS = 1024  # for the error: eager in float64 needs the memory of several N x V or N x N tensors


def errors(case: Case, names: Sequence[str], draws: int) -> dict[str, dict[str, float]]:
    """Relative error, in the 2-norm, of loss and gradients, the worst of all, against the eager lines in float64."""
    shape = (min(ROWS, case.shape[0]), *case.shape[1:])
    found = {name: {"value": 0.0, "gradient": 0.0} for name in names}
    for number in range(draws):
        with drawn(number):
            work = case.make(shape, lambda tensor: tensor.to(case.dtype))
            wide = case.make(shape, lambda tensor: tensor.to(case.dtype).double())
        exact = WorkStep(wide.eager, wide.inputs).results()
        for name, worst in found.items():
            step = build(name, work)
            assert isinstance(step, WorkStep)
            parts = zip(step.results(), exact, strict=True)
            value, *grads = (float((got - right).norm() / right.norm()) for got, right in parts)
            worst["value"], worst["gradient"] = max(worst["value"], value), max(worst["gradient"], *grads)
    return found


def excess(case: Case, error: dict[str, dict[str, float]]) -> str:
    """What of ours is further off than twice eager and one rounding, or nothing."""
    return ", ".join(
        f"{name}, {part}: relative error {ours:.2e}, eager's {error['eager'][part]:.2e}"
        for name in error.keys() - {"eager"}
        for part, ours in error[name].items()
        if ours > error_bar(error["eager"][part], case.dtype)
    )


def measure(case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], quick: bool, **more: Any) -> None:
    """Time the contestants, add the figures and `more` to the results, and fail where ours is wrong."""
    work = case.make(case.shape, lambda tensor: tensor.to(case.dtype))
    steps = {name: build(name, work) for name in ("auto", *case.contestants, *work.peers)}
    seconds = min(case.seconds, 1.0) if quick else case.seconds
    samples = interleave(steps, seconds, min(LEAST_ROUNDS, 5) if seconds > 10 else LEAST_ROUNDS)
    names = ("auto", "eager", *(name for name in OURS if name in work.peers))
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
        **more,
    }
    info["verdicts"] = verdicts(info)
    benchmark.extra_info.update(info)
    play(benchmark, samples["auto"])
    assert not excess(case, error), excess(case, error)  # no speed-up counts on a wrong result
    results.append(info)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    measure(case, benchmark, results, pytestconfig.getoption("quick"))
