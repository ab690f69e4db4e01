"""Cross entropy, forward and backward, against eager, torch.compile and a plain copy: one test per case."""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES, Case
from bench.contestants import LossStep, Step, build
from bench.measure import LEAST_ROUNDS, error_bar, errors, interleave, quartiles, sample, speedups
from bench.memory import peaks
from bench.replay import clock, play
from bench.report import verdicts


def measure(case: Case, ours: str, others: list[str], seconds: float) -> tuple[dict[str, Any], list[float]]:
    """What the result file says of the case, and the samples of ours."""
    data = case.data()
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys((ours, *case.contestants, *others)):
        try:
            steps[name] = build(name, case, data)
            sample(steps[name], 1)
        except (RuntimeError, NotImplementedError) as error:  # no compiler for torch.compile; a dtype that eager lacks
            if name == ours:
                raise
            steps.pop(name, None)
            absent[name] = str(error).strip().partition("\n")[0]
    info: dict[str, Any] = {
        "id": case.id,
        **{key: getattr(case, key) for key in ("group", "shape", "inplace", "bytes", "gradient_bytes", "memory_bar")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "bars": case.bars,
        "ours": ours,
        "absent": absent,
        "memory": peaks(case, (ours, "eager")),
        "error": errors(case, data, {name: step for name, step in steps.items() if isinstance(step, LossStep)}),
    }
    # With hundreds of cases in the grid, a few miss a bar by chance: those are measured anew, longer, and that counts.
    for effort in (1, 4) if case.group == "grid" else (1,):
        samples = interleave(steps, effort * seconds, effort * LEAST_ROUNDS)
        info["rounds"] = len(samples[ours])
        info["seconds"] = {name: quartiles(times) for name, times in samples.items()}
        info["speedup"] = speedups(samples, ours)
        info["verdicts"] = verdicts(info)
        if info["verdicts"].get("eager") == "met":
            break
    return info, samples[ours]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cross_entropy(
    case: Case, benchmark: BenchmarkFixture, results: list[dict[str, Any]], pytestconfig: pytest.Config
) -> None:
    option = pytestconfig.getoption
    seconds = min(case.seconds, 1.0) if option("quick") else case.seconds
    info, times = measure(case, option("impl"), option("contestant"), seconds)
    play(benchmark, times)
    benchmark.extra_info.update(info)
    # No speed-up counts on a wrong result.
    for part, error in info["error"][info["ours"]].items():
        eager = info["error"].get("eager", {}).get(part, 0.0)
        assert error <= error_bar(eager, case.dtype), f"{part}: relative error {error:.2e}, eager's {eager:.2e}"
    results.append(info)
