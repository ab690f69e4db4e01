"""The tables of a result file in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARKS = {"met": "✓", "missed": "✗", "unclear": "?"}
Json = Mapping[str, Any]
COLUMNS = (
    "loss",
    "shape",
    "dtype",
    "time",
    "of roof",
    "over eager",
    "over torch.compile",
    "over others",
    "over the floor",
    "memory",
    "error (eager's)",
)
GRID_COLUMNS = ("shape", "dtype", "options", "time", "over eager", "error (eager's)")
GROWTH_COLUMNS = ("loss", "", "of", "with", "power", "at most")
GROWTH = """\
Time or memory grows as the size to this power, with its 95 % interval; "at most" is what it should be for ours."""
NAMES = {"compile": "torch.compile", "floor": "the floor"}
LEGEND = """\
Each figure is of one forward and one backward together.

- **over eager**, **torch.compile**, **others**, **the floor**: speed-up, their time divided by ours. Below 1 we are
  slower. It is the median over the rounds, with the quartiles in brackets. `≥` names the bar that the project set
  itself: ✓ the median clears it, ✗ the upper quartile does not either, ? in between. The floor is work that no
  implementation can avoid: a copy of the logits, or the bare products. `torch chunked` is `F.linear_cross_entropy`.
- **of roof**: the least time that this machine allows, divided by ours. What sets it is in brackets: memory (each input
  and gradient moves once, at the bandwidth of a copy), compute (the products that no implementation can avoid, at the
  rate of a large product) or an empty call, all measured in the same run.
- **memory**: peak above the inputs, ours divided by eager's, and ours in MB. A dash: too little to measure.
- **error**: of the gradients, against PyTorch in float64, ours and then eager's in the same dtype."""


def verdict(ratio: Sequence[float], bar: float) -> str:
    """Return "met", "missed", or "unclear" where the bar lies between the median and the upper quartile."""
    if ratio[1] >= bar:
        return "met"
    return "missed" if ratio[2] < bar else "unclear"


def verdicts(case: Json) -> dict[str, str]:
    """Return whether the speed-ups and the memory of a case meet its bars, by name."""
    found = {name: verdict(case["speedup"][name], bar) for name, bar in case["bars"].items() if name in case["speedup"]}
    memory, bar = case["memory"].get(case["ours"]), case["bars"].get("memory")
    return found if memory is None or bar is None else found | {"memory": "met" if memory <= bar else "missed"}


def memory_share(case: Json) -> float | None:
    """Return our peak above the inputs divided by eager's."""
    if not case["memory"].get("eager") or case["ours"] not in case["memory"]:
        return None
    return float(max(0, case["memory"][case["ours"]]) / case["memory"]["eager"])


def shape_of(case: Json) -> str:
    """Return the sizes of a case, such as 8192×1000."""
    return "×".join(map(str, case["shape"]))


def name_of(case: Json) -> str:
    """Return the loss, with the options that say which loss it is."""
    return ", ".join([case["loss"], *(key if value is True else str(value) for key, value in case["options"].items())])


def ratio_of(case: Json, name: str) -> str:
    """Return the speed-up over a contestant with its quartiles, and its bar if there is one."""
    if name not in case["speedup"]:
        return "–"
    low, middle, high = case["speedup"][name]
    text = f"{middle:.3g} ({low:.3g}–{high:.3g})"
    bar = case["bars"].get(name)
    return text if bar is None else f"{text} ≥ {bar:.3g} {MARKS[verdict(case['speedup'][name], bar)]}"


def _time(case: Json) -> str:
    seconds = case["seconds"][case["ours"]][1]
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _of_roof(case: Json) -> str:
    if "roof" not in case:  # in files from before 2026-11-28
        return "–"
    return f"{case['roof'] / case['seconds'][case['ours']][1]:.0%} ({case['limit']})"


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
        _of_roof(case),
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
    """Return a sentence on when and where a result was measured."""
    machine = result["machine"]
    busy = machine.get("busy")
    return (
        f"Measured on {result['date'][:10]} at commit {result['commit']}{' with local changes' * result['dirty']} on "
        f"{machine['device']}: {machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}. Other processes used "
        f"{'an unknown share' if busy is None else f'{busy:.1%}'} of the cores during the timed rounds."
        + _limits(result)
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


def _growth_row(scale: Json) -> tuple[str, ...]:
    low, power, high = scale["exponent"]
    sizes = [size for size, _ in scale["points"]]
    who: str = scale["contestant"]
    return (
        f"`{scale['loss']}`",
        NAMES.get(who, who),
        scale["quantity"],
        f"{scale['dim']} from {sizes[0]} to {sizes[-1]}",
        f"{power:.2f} ({low:.2f} to {high:.2f})",
        f"{scale['expected']:g}",
    )


def _absent(cases: Sequence[Json]) -> list[str]:
    """Return who did not run, with the reason; cases that share both are one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, why in case["absent"].items():
            found.setdefault((name, why), []).append(f"`{case['id']}`")
    return [
        f"- {name}, {ids[0] if len(ids) == 1 else f'{len(ids)} cases'}: {why}" for (name, why), ids in found.items()
    ]


def _limits(result: Json) -> str:
    if "ceilings" not in result:
        return ""
    found = result["ceilings"]
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {dtype}" for dtype, rate in found["matmul"].items())
    return (
        f" Limits in the same run: a copy {found['copy'] / 1e9:.3g} GB/s (read and written), matrix products {rates}, "
        f"an empty call {found['call'] * 1e6:.3g} µs."
    )


def grid_summary(cases: Sequence[Json]) -> str:
    """Return a sentence on the small calls."""
    words = [verdicts(case).get("eager") for case in cases]
    middle = [case["speedup"]["eager"][1] for case in cases if "eager" in case["speedup"]]
    return (
        f"Of {len(cases)} small calls of cross entropy (shape, dtype, reduction, target, smoothing) "
        f"{words.count('missed')} are slower than eager by more than 5 %, and {words.count('unclear')} may be; "
        f"the median speed-up is {statistics.median(middle):.3g}, the least {min(middle):.3g}."
    )


def of_group(result: Json, group: str) -> list[Json]:
    """Return the cases of a group that were compared with eager."""
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
    absent = _absent(result["cases"])
    if scales := result.get("scales"):
        parts += ["## How it grows", GROWTH, _markdown(GROWTH_COLUMNS, [_growth_row(scale) for scale in scales])]
    wrong = [
        f"- `{case['id']}`, {name}: {why}" for case in result["cases"] for name, why in case.get("wrong", {}).items()
    ]
    if wrong:
        parts += ["## Wrong, and therefore without a speed-up", "\n".join(wrong)]
    if absent:
        parts += ["## Not measured", "\n".join(absent)]
    return "\n\n".join(parts)
