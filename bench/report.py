"""`python -m bench.report [FILE]`: print all tables of a result file, in markdown. `make readme` writes them."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.busy import BUSY, BUSY_CASE

RESULTS = Path(__file__).parent / "results"
MARKS = {"met": "✓", "missed": "✗", "unclear": "?"}
Json = Mapping[str, Any]
COLUMNS = (
    "loss",
    "shape",
    "dtype",
    "time",
    "over eager",
    "over torch.compile",
    "over others",
    "over the floor",
    "memory",
    "error (eager's)",
)
GRID_COLUMNS = ("shape", "dtype", "options", "time", "over eager", "error (eager's)")
NAMES = {"compile": "torch.compile", "floor": "the floor"}
LEGEND = """\
Each figure is of one forward and one backward together.

- **over eager**, **torch.compile**, **others**, **the floor**: speed-up, their time divided by ours. Below 1 we are
  slower. It is the median over the rounds, with the quartiles in brackets. `≥` names the bar that the project set
  itself: ✓ the median clears it, ✗ the upper quartile does not either, ? in between. The floor is work that no
  implementation can avoid: a copy of the logits, or the bare products. `chunked` is PyTorch's `F.linear_cross_entropy`.
- **memory**: peak above the inputs, ours divided by eager's, and ours in MB. A dash: too little to measure.
- **error**: of the gradients, against PyTorch in float64, ours and then eager's in the same dtype."""


def newest() -> Path:
    """Return the newest result file of a CPU."""
    paths = sorted(RESULTS.glob("*-cpu.json"), key=lambda path: str(json.loads(path.read_text())["date"]))
    if not paths:
        raise ValueError("bench/results: expected a result file, got none; run make bench")
    return paths[-1]


def read(path: Path) -> Json:
    """Return the results of a file, or raise ValueError with the reason why its figures cannot be used."""
    result: Json = json.loads(path.read_text())
    if reason := refusal(result):
        raise ValueError(f"{path.name}: {reason}")
    return result


def refusal(result: Json) -> str:
    """Return why the figures of a result file cannot be used, or an empty string."""
    reasons = []
    if result["dirty"]:
        reasons.append("dirty: expected the files of a commit, got local changes")
    if not result.get("whole"):
        reasons.append("whole: expected every case, got a part of them")
    busy = result["machine"].get("busy")
    if busy is None:
        reasons.append("machine.busy: expected the share of the cores that other processes used, got nothing")
    elif busy > BUSY:
        reasons.append(
            f"machine.busy: expected at most {BUSY:.0%} of the cores used by other processes, got {busy:.1%}"
        )
    for case in result["cases"]:
        if (case.get("busy") or 0.0) > BUSY_CASE:
            reasons.append(f"{case['id']}: busy: expected at most {BUSY_CASE:.0%}, got {case['busy']:.1%}")
    return "; ".join(reasons)


def verdict(ratio: Sequence[float], bar: float) -> str:
    """Return "met", "missed", or "unclear" where the bar lies between the median and the upper quartile."""
    if ratio[1] >= bar:
        return "met"
    return "missed" if ratio[2] < bar else "unclear"


def verdicts(case: Json) -> dict[str, str]:
    found = {name: verdict(case["speedup"][name], bar) for name, bar in case["bars"].items() if name in case["speedup"]}
    memory, bar = case["memory"].get(case["ours"]), case["bars"].get("memory")
    return found if memory is None or bar is None else found | {"memory": "met" if memory <= bar else "missed"}


def memory_share(case: Json) -> float | None:
    """Return our peak above the inputs divided by eager's."""
    if not case["memory"].get("eager") or case["ours"] not in case["memory"]:
        return None
    return float(max(0, case["memory"][case["ours"]]) / case["memory"]["eager"])


def shape_of(case: Json) -> str:
    return "×".join(map(str, case["shape"]))


def name_of(case: Json) -> str:
    """Return the loss, with the options that say which loss it is."""
    return ", ".join([case["loss"], *(key if value is True else str(value) for key, value in case["options"].items())])


def ratio_of(case: Json, name: str) -> str:
    if name not in case["speedup"]:
        return "–"
    low, middle, high = case["speedup"][name]
    text = f"{middle:.3g} ({low:.3g}–{high:.3g})"
    bar = case["bars"].get(name)
    return text if bar is None else f"{text} ≥ {bar:.3g} {MARKS[verdict(case['speedup'][name], bar)]}"


def _time(case: Json) -> str:
    seconds = case["seconds"][case["ours"]][1]
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _memory(case: Json) -> str:
    share = memory_share(case)
    if share is None:
        return "–"
    mark = MARKS.get(verdicts(case).get("memory", ""), "")
    return f"{share:.2f}, {max(0, case['memory'][case['ours']]) / 1e6:.0f} MB {mark}".rstrip()


def _errors(case: Json) -> str:
    found = (case["error"].get(name) for name in (case["ours"], "eager"))
    ours, eager = (f"{error['gradient']:.1e}" if error else "–" for error in found)
    return f"{ours} ({eager})"


def _row(case: Json) -> tuple[str, ...]:
    others = [name for name in case["speedup"] if name not in ("eager", "compile", "floor")]
    return (
        f"`{name_of(case)}`",
        shape_of(case),
        case["dtype"],
        _time(case),
        ratio_of(case, "eager"),
        ratio_of(case, "compile"),
        "; ".join(f"{name} {ratio_of(case, name)}" for name in others) or "–",
        ratio_of(case, "floor"),
        _memory(case),
        _errors(case),
    )


def _grid_row(case: Json) -> tuple[str, ...]:
    options = ", ".join(f"{key}={value}" for key, value in case["options"].items())
    return shape_of(case), case["dtype"], options, _time(case), ratio_of(case, "eager"), _errors(case)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(result: Json) -> str:
    machine = result["machine"]
    busy = machine.get("busy")
    return (
        f"Measured on {result['date'][:10]} at commit {result['commit']}{' with local changes' * result['dirty']} on "
        f"{machine['device']}: {machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}. Other processes used "
        f"{'an unknown share' if busy is None else f'{busy:.1%}'} of the cores during the timed rounds."
    )


def _losses(cases: Sequence[Json]) -> Iterator[str]:
    """Yield where another implementation is faster than ours, the worst first; then the other bars that are missed."""
    slower = {
        (case["id"], name): (values[1], case, name)
        for case in cases
        for name, values in case["speedup"].items()
        if name != "floor" and values[1] < 1
    }
    for _, case, name in sorted(slower.values(), key=lambda found: found[0]):
        yield f"- `{case['id']}`: {_over(case, name)}"
    for case in cases:
        for name, word in verdicts(case).items():
            if word != "met" and (case["id"], name) not in slower:
                yield f"- `{case['id']}`: {'memory ' + _memory(case) if name == 'memory' else _over(case, name)}"


def _over(case: Json, name: str) -> str:
    return f"{ratio_of(case, name)} over {NAMES.get(name, name)}"


def grid_summary(cases: Sequence[Json]) -> str:
    words = [verdicts(case).get("eager") for case in cases]
    middle = [case["speedup"]["eager"][1] for case in cases if "eager" in case["speedup"]]
    return (
        f"Of {len(cases)} small calls of cross entropy (shape, dtype, reduction, target, smoothing) "
        f"{words.count('missed')} are slower than eager by more than 5 %, and {words.count('unclear')} may be; "
        f"the median speed-up is {statistics.median(middle):.3g}, the least {min(middle):.3g}."
    )


def of_group(result: Json, group: str) -> list[Json]:
    return [case for case in result["cases"] if case["group"] == group and "eager" in case["speedup"]]


def tables(result: Json) -> str:
    """Return all tables in markdown, with the machine and the commit."""
    table, grid = of_group(result, "table"), of_group(result, "grid")
    parts = [origin(result), LEGEND]
    if table:
        lost = "\n".join(_losses(table)) or "Nowhere."
        parts += ["## Where we lose, and the bars that are missed", lost]
        parts += ["## Every loss", _markdown(COLUMNS, [_row(case) for case in table])]
    if grid:
        ordered = sorted(grid, key=lambda case: case["speedup"]["eager"][1])
        parts += ["## Small calls", grid_summary(grid), _markdown(GRID_COLUMNS, [_grid_row(case) for case in ordered])]
    absent = [f"- `{case['id']}`, {name}: {why}" for case in result["cases"] for name, why in case["absent"].items()]
    if absent:
        parts += ["## Not measured", "\n".join(absent)]
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="default: the newest in bench/results")
    path = parser.parse_args().file
    try:
        print(tables(read(path or newest())))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
