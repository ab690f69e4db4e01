"""A profile in words: tables, and sentences that say what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlkernels import words
from tlkernels.profiling.unit_report import LINEAR, sentences

WORTH = 1.02  # a step that is faster by less is called no gain
DOUBT = 1.15  # times what is expected


def text(result: Mapping[str, Any]) -> str:
    """Return the report of a profile, as profile.json has it."""
    parts = [_step(result), _phases(result), *(_loss(loss) for loss in result["losses"])]
    parts += [_unit(each["unit"]) for each in result["head_and_loss"] if each["unit"] is not None]
    parts.append(_steps(result))
    sentences = [*meaning(result), *result["notes"]]
    return "\n\n".join([part for part in parts if part] + ["\n".join(sentences)])


def _step(result: Mapping[str, Any]) -> str:
    low, middle, high = result["step"]["seconds"]
    lines = [
        f"A step takes {words.time(middle)} ({words.time(low)} to {words.time(high)} in half of "
        f"{result['step']['rounds']} steps), {result['device']}."
    ]
    rate = result["rate"]
    lines.append(f"tokens/s {words.count(rate['tokens'])} (padding counts), samples/s {words.count(rate['samples'])}")
    wait = result["starvation"]
    if wait["seconds"] is not None:
        lines.append(f"The host waits {words.time(wait['seconds'])} for data, {wait['share']:.1%} of the step.")
    if result["mfu"] is not None:
        ceilings = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in result["ceiling"].items())
        lines.append(
            f"Matrix products: {result['flops'] / 1e9:.4g} GFLOP a step, {result['mfu']:.1%} of what this machine can "
            f"do (measured: {ceilings})."
        )
    return "\n".join(lines)


def _phases(result: Mapping[str, Any]) -> str:
    rows = [["phase", "time", "share", "peak memory"]]
    rows += [
        [row["name"], words.time(row["seconds"]), f"{row['share']:.1%}", words.size(row["peak_bytes"])]
        for row in result["phases"]
    ]
    traced = result["traced_step"]
    rows.append(["sum", words.time(traced["seconds"]), "", words.size(result["peak_bytes"])])
    return words.table(rows) + (
        f"\n(the middle one of {traced['steps']} steps under the profiler; it takes {result['overhead']:.2f} times as "
        "long as without)"
    )


def _loss(loss: Mapping[str, Any]) -> str:
    shape = " and ".join("×".join(map(str, shape)) for shape in loss["shape"])
    calls = "1 call a step" if loss["calls"] == 1 else f"{loss['calls']} calls a step, the largest"
    ways = loss["ways"]
    known: Mapping[str, float] = next((way["error"] for way in ways.values() if way["error"]), {})
    told_apart = [part for part in known if part not in ("value", "gradient")] or ["gradient"]
    expects = any("expected" in way for way in ways.values())
    heading = [f"{loss['name']} ({loss['own']})", "alone", "speed-up", "memory", "error: loss", *told_apart]
    rows = [heading + ["step, expected"] * expects]
    for name, way in ways.items():
        error = way["error"] or {}
        errors = [f"{error[part]:.1e}" if part in error else "" for part in ("value", *told_apart)]
        row = [name, words.time(way["seconds"]), words.times(way["speedup"]), words.size(way["peak_bytes"]), *errors]
        rows.append(row + [words.times(way.get("expected"))] * expects)
    lines = [words.table(rows), f"({calls}: {shape}, {loss['dtype']}; forward and backward, errors against float64)"]
    lines += [f"{name}: {way['wrong']}" for name, way in loss["ways"].items() if way["wrong"]]
    reasons: dict[str, list[str]] = {}
    for name, reason in loss["refused"].items():
        reasons.setdefault(reason, []).append(name)
    return "\n".join([*lines, *(f"no {', '.join(names)}: {reason}" for reason, names in reasons.items())])


def _unit(unit: Mapping[str, Any]) -> str:
    return f"{_loss(unit)}\n(the head and the loss as one; native, triton and reference are those of {LINEAR})"


def _steps(result: Mapping[str, Any]) -> str:
    if not result["step_speedups"]:
        return ""
    rows = [["the same loop with", "step", "speed-up", "half of the rounds", "expected"]]
    for name, way in result["step_speedups"].items():
        low, middle, high = way["speedup"]
        same = name == result["baseline"]
        named = f"the loss {name}" if name == "as it is" else name
        spread = "" if same else f"{low:.2f} to {high:.2f}"
        expected = "" if same or way["expected"] is None else f"{way['expected']:.2f}×"
        rows.append([named, words.time(way["seconds"][1]), f"{middle:.2f}×", spread, expected])
    rounds = next(iter(result["step_speedups"].values()))["rounds"]
    return words.table(rows) + (
        f"\n({rounds} rounds of steps in turns, against {result['baseline']}; expected from the losses alone)"
    )


def meaning(result: Mapping[str, Any]) -> list[str]:
    """Return what a profile means, a sentence each."""
    found = []
    if result["loss_share"] is not None and result["bound"] is not None:
        found.append(
            f"The loss is {words.percent(result['loss_share'])} of the step: a loss that costs nothing would make it "
            f"at most {result['bound']:.3g}x as fast."
        )
        if result["bound"] < WORTH:
            found.append("No loss can make this step noticeably faster.")
    elif result["loss_share"] is not None:
        found.append("The loss alone takes as long as the step; what another loss would gain is not known.")
    logits = result["logits"]
    if logits is not None:
        share = logits["share_of_peak"]
        kept = "are not stored; they would be" if not logits["stored"] else "are"
        of_peak = "" if share is None else f", {words.percent(share)} of the peak of memory"
        size = f"{logits['rows']}×{logits['classes']} in {logits['dtype'].removeprefix('torch.')}"
        found.append(f"The logits ({size}) {kept} {words.size(logits['bytes'])}{of_peak}.")
    found += [_gain(name, way) for name, way in result["step_speedups"].items() if name != result["baseline"]]
    return found + [line for unit in result["head_and_loss"] for line in sentences(unit)]


def _gain(name: str, way: Mapping[str, Any]) -> str:
    low, middle, high = way["speedup"]
    named = "The loss as it is" if name == "as it is" else f"The loss by {name}"
    if low <= 1 <= high:
        return f"{named}: the step's times vary by more than the loss changes them."
    sentence = f"{named} makes the step {middle:.2f}x as fast" + (": it is slower." if middle < 1 else ".")
    if way["expected"] is not None and not way["expected"] / DOUBT < middle < way["expected"] * DOUBT:
        sentence += f" Its time alone would explain {way['expected']:.2f}x: the machine may have been busy."
    return sentence
