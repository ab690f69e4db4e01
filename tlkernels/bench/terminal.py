"""The results of `tlkernels bench` in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tlkernels.bench.tables import shape_of
from tlkernels.bench.work import OURS
from tlkernels.words import table, time

Json = Mapping[str, Any]
NOT_INSTALLED = "not installed"  # how the reason begins
HEAD = ("", "median", "quartiles", "ours is", "of roof", "memory", "error", "gradient's", "first call")


def in_words(case: Json, ceilings: Json) -> str:
    """Return a block of lines for one case: a line for each contestant, the fastest first."""
    sizes = " ".join(f"{name}={size}" for name, size in case["dims"].items())
    options = "".join(f", {key}={value}" for key, value in case["options"].items())
    limits = {"memory": ceilings["copy"] / 1e9, "compute": ceilings["matmul"][case["dtype"]] / 1e9}
    unit = {"memory": "GB/s", "compute": "GFLOP/s"}
    limit = f"{limits[case['limit']]:.4g} {unit[case['limit']]}" if case["limit"] in limits else "an empty call"
    lines = [
        f"{case['loss']} {shape_of(case)} {case['dtype']} on {case['device']}{options}",
        f"  {sizes}; {case['ours']} is served by {case['served']}; roof {time(case['roof'])} ({limit})",
    ]
    rows = [HEAD, *(_row(case, name) for name in sorted(case["seconds"], key=lambda name: case["seconds"][name][1]))]
    lines += [f"  {line}".rstrip() for line in table(rows).splitlines()]
    lines += [f"  {line}" for line in _remarks(case)]
    return "\n".join(lines)


def _row(case: Json, name: str) -> tuple[str, ...]:
    low, middle, high = case["seconds"][name]
    speedup = case["speedup"].get(name)
    error, memory = case["error"].get(name), case["memory"].get(name)
    return (
        name,
        time(middle),
        f"{time(low)} – {time(high)}",
        "" if speedup is None else f"{speedup[1]:.3g}×" + (" slower" if speedup[1] < 1 and name not in OURS else ""),
        f"{case['roof'] / middle:.0%}",
        "" if memory is None else f"{memory / 1e6:.0f} MB",
        "" if error is None else f"{error['value']:.0e}",
        "" if error is None else f"{error['gradient']:.0e}",
        "" if name not in case["first"] else time(case["first"][name]),
    )


def _remarks(case: Json) -> Iterator[str]:
    for name, why in case["wrong"].items():
        yield f"WRONG {name}: {why}; no speed-up counts"
    reasons: dict[str, list[str]] = {}
    for name, why in case["absent"].items():
        reasons.setdefault(NOT_INSTALLED if why.startswith(NOT_INSTALLED) else why, []).append(name)
    missing = reasons.pop(NOT_INSTALLED, [])
    for why, names in reasons.items():
        yield f"{', '.join(names)} did not run: {why}"
    if missing:
        yield f"not installed: {', '.join(missing)}"
    if (case["busy"] or 0) > 0.1:
        yield f"other processes used {case['busy']:.0%} of the cores: measure again on an idle machine"


def lost(cases: Sequence[Json]) -> str:
    """Return where others are faster, the worst first."""
    slower = sorted(
        (values[1], case["id"], name)
        for case in cases
        for name, values in case["speedup"].items()
        if name != "floor" and name not in OURS and values[1] < 1
    )
    if not slower:
        return "Nothing that was compared is faster than ours."
    return "\n".join(["Where ours is slower:", *(f"  {id}: {ratio:.3g}× over {name}" for ratio, id, name in slower)])
