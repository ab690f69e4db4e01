"""The page of a benchmark: its head, and the data of its sections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlkernels.bench.compare import WORSE, changes, differences
from tlkernels.bench.cost import COSTS, dims
from tlkernels.bench.scale import TOLERANCE, too_fast
from tlkernels.html.page import Page, Section

Json = Mapping[str, Any]

LOSSES = Section(
    "where-we-lose",
    "Where we lose, and where we win",
    "Speed-ups are a contestant's time divided by ours: below 1 we are slower. The floor is a limit, not a contestant.",
    "bench_losses",
)
PEERS = Section(
    "peers",
    "Every case",
    "A click on a heading sorts. Small figures are the lower and the upper quartile. Errors are relative, in the "
    "2-norm, against float64: of the gradient, and below it of the loss.",
    "bench_table",
)
SIZES = Section(
    "sizes",
    "Time and memory against size",
    "Error bars are quartiles. A click on a name in the legend hides its line, a double click shows it alone.",
    "bench_sizes",
)
ROOFLINE = Section(
    "roofline",
    "How far from the limit",
    "The roof is the least time that this machine allows: the bytes that must move at the rate of a copy, the products "
    "that no implementation can avoid at the rate of a matrix product, or the cost of one call, whichever is longest.",
    "bench_roofline",
)
SCALES = Section(
    "scales",
    "How time and memory grow",
    "The exponent p of size^p, fitted over several sizes, with its 95 % interval, and the most that it should be. "
    f"Growth is too fast if the whole interval is above that, and the fitted exponent by more than {TOLERANCE}; it is "
    "unclear if only the interval reaches that far.",
    "bench_scales",
)
BEFORE = Section(
    "before",
    "Against the earlier run",
    "Compared are speed-ups, which are ratios within a run, and memory. A speed-up changed if the quartiles of the two "
    "runs do not overlap and the medians differ by more than 5 %.",
    "bench_before",
)


def page(result: Json, before: Json | None) -> Page:
    """Return the page of a result file of the benchmark, which compares it with `before`."""
    if not result["cases"]:
        raise ValueError("cases: expected at least one, got none")
    sections = [LOSSES, PEERS, SIZES, ROOFLINE]
    sections += [SCALES] if result.get("scales") else []
    sections += [BEFORE] if before else []
    return Page(
        title="tlkernels bench",
        lead=_lead(result),
        facts=[(name, text) for name, text in _facts(result, before) if text],
        sections=sections,
        data={
            "cases": [_case(case, result["machine"]) for case in result["cases"]],
            "ceilings": result.get("ceilings", {}),
            "scales": [{**scale, "verdict": _verdict(scale)} for scale in result.get("scales", [])],
            "before": _before(before, result) if before else None,
        },
        scripts=["filters", "bench_common"],
    )


def _case(case: Json, machine: Json) -> dict[str, Any]:
    """Return a case in the present format; older files lack some of its keys."""
    absent: dict[str, Any] = {"first": {}, "wrong": {}, "absent": {}, "roof": None, "device": machine["device"]}
    absent["dims"] = dims(case["loss"], case["shape"]) if case["loss"] in COSTS else {}
    options = [
        key if value is True else f"{key}={value}" for key, value in case["options"].items() if value is not False
    ]
    return {**absent, **case, "name": ", ".join([case["loss"], *options]), "elements": math.prod(case["shape"])}


def _verdict(scale: Json) -> str:
    if too_fast(scale):
        return "too fast"
    return "unclear" if scale["exponent"][2] > scale["expected"] + TOLERANCE else "as it should be"


def _before(before: Json, result: Json) -> dict[str, Any]:
    then, now = ({case["id"]: case["speedup"] for case in run["cases"]} for run in (before, result))
    return {
        "changes": [
            {
                "id": case,
                "what": what,  # a contestant, with quartiles, or "memory", with bytes
                "then": then[case].get(what, old),
                "now": now[case].get(what, new),
                "word": word,
                "worse": word in WORSE,
            }
            for case, what, old, new, word in changes(before, result)
        ],
        "differences": differences(before, result),
    }


def _lead(result: Json) -> str:
    count, losses = len(result["cases"]), len({case["loss"] for case in result["cases"]})
    of = f"{count} cases of {losses} losses" if count > 1 else "one case"
    return f"Forward and backward of {of}, timed against other implementations on {_device(result['machine'])}."


def _device(machine: Json) -> str:
    return str(machine["cpu"] if machine["device"] == "cpu" else machine["device"])


def _facts(result: Json, before: Json | None) -> Sequence[tuple[str, str]]:
    machine, busy = result["machine"], result["machine"].get("busy")
    gpu = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    threads = f"{machine['cores']} cores, {machine['threads']} threads"
    share = "an unknown share" if busy is None else f"{100 * busy:.1f} %"
    return (
        ("Machine", f"{gpu}{machine['cpu']}, {threads}, kernels for {machine['isa']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ("Measured", f"{_run(result)}{'' if result.get('whole', True) else '; a part of the cases'}"),
        ("How", _how(result)),
        ("Ceilings", _ceilings(result.get("ceilings"))),
        ("Other work", f"other processes used {share} of the cores while it was timed"),
        ("Compared with", _run(before) if before else ""),
    )


def _run(result: Json) -> str:
    commit = f"commit {result['commit']}" if result["commit"] else "no commit"
    return f"{result['date'][:16].replace('T', ' ')}, {commit}{' with local changes' if result['dirty'] else ''}"


def _how(result: Json) -> str:
    rounds = sorted(case["rounds"] for case in result["cases"])
    count = f"{rounds[0]}" if rounds[0] == rounds[-1] else f"{rounds[0]} to {rounds[-1]}"
    cases = len(result["cases"])
    emptied = sum(case.get("cold", False) for case in result["cases"])
    cold = f"with cold caches{f' in {emptied} of {cases} cases' * (emptied < cases)}, " * (emptied > 0)
    return (
        f"{count} rounds; in each, every contestant runs once, {cold}in an order that rotates. A time is the median "
        "over the rounds, a speed-up the median of the ratios within a round; both are given with their quartiles"
    )


def _ceilings(ceilings: Json | None) -> str:
    if not ceilings:
        return ""
    products = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in ceilings["matmul"].items())
    return (
        f"measured in the same run: a copy {ceilings['copy'] / 1e9:.3g} GB/s (read and written); matrix products "
        f"{products}; a call on one number, forward and backward, {ceilings['call'] * 1e6:.3g} µs"
    )
