"""What profile.json says, out of what the steps measured."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch

from tlkernels.machine import machine
from tlkernels.profiling import phases
from tlkernels.profiling.events import Segment
from tlkernels.profiling.memory import Peaks
from tlkernels.profiling.operations import Operations, utilisation
from tlkernels.profiling.timed import Timed, quartiles
from tlkernels.profiling.timeline import seconds

_HEAD_UNKNOWN = {phases.FORWARD: phases.FORWARD_ALL, phases.BACKWARD: phases.BACKWARD_ALL}
_LOSS_UNKNOWN = {**_HEAD_UNKNOWN, phases.HEAD: phases.FORWARD_ALL, phases.HEAD_BACKWARD: phases.BACKWARD_ALL}


class Measured(NamedTuple):
    """What the steps have measured."""

    timed: Timed
    operations: Operations
    losses: Sequence[Mapping[str, Any]]
    units: Sequence[Mapping[str, Any]]
    """Heads with their losses."""
    peaks: Peaks
    steps: Sequence[Sequence[Segment]]
    """The phases of the traced steps."""


def result_of(found: Measured, device: torch.device, compiled: Collection[str], *, has_head: bool) -> dict[str, Any]:
    """Return the profile, without the steps in which losses take turns.

    `compiled` names losses in compiled graphs; `has_head` is whether the head was seen, or the losses have none.
    """
    times = of_step(found.timed)
    _, step, _ = times["step"]["seconds"]
    rows, traced = of_phases(found.steps, found.peaks.by_phase, bool(found.losses), has_head)
    return {
        "kind": "profile",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **times,
        "phases": rows,
        "traced_step": {"seconds": traced, "steps": len(found.steps)},
        "overhead": traced / step,
        **utilisation(found.operations.by_dtype, device, step),
        **of_losses(found.losses, step, found.peaks),
        "head_and_loss": [_with_expected(unit, step) for unit in found.units],
        "step_speedups": {},
        "baseline": None,
        "notes": notes_of(found.losses, compiled, found.timed, device.type, has_head),
    }


def of_step(timed: Timed) -> dict[str, Any]:
    """Return the step's time, the rates and the wait for data."""
    times = timed.seconds()
    middle = statistics.median(times)
    wait = None if None in timed.waits else statistics.median(wait for wait in timed.waits if wait is not None)
    return {
        "step": {"seconds": quartiles(times), "rounds": len(times)},
        "rate": {"samples": _rate(timed.rows, times), "tokens": _rate(timed.tokens, times)},
        "starvation": {
            "seconds": wait,
            "share": None if wait is None else min(1.0, wait / middle),
            "by": "DataLoader" if timed.has_loader else "the time before the model's first forward",
        },
    }


def _rate(counts: Sequence[int | None], times: Sequence[float]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / sum(times) if len(known) == len(counts) else None


def of_phases(
    steps: Sequence[Sequence[Segment]], peaks: Mapping[str, int], has_loss: bool, has_head: bool
) -> tuple[list[dict[str, Any]], float]:
    """Return the phases of the traced step of middle length, and its seconds, which they add up to.

    A step that also evaluates the model or writes a checkpoint is so left out.
    What the trace cannot tell apart has phases of its own: `has_loss` is whether a loss was seen, and `has_head`
    whether its head was, if it has one.
    """
    rename = _LOSS_UNKNOWN if not has_loss else {} if has_head else _HEAD_UNKNOWN
    total: dict[str, float] = {}
    for phase, spent in _middle([seconds(step) for step in steps]).items():
        name = rename.get(phase, phase)
        total[name] = total.get(name, 0.0) + spent
    most: dict[str, int] = {}
    for phase, peak in peaks.items():
        name = rename.get(phase, phase)
        most[name] = max(peak, most.get(name, 0))
    whole = sum(total.values())
    rows = [
        {"name": name, "seconds": total[name], "share": total[name] / whole, "peak_bytes": most.get(name)}
        for name in phases.ORDER
        if name in total
    ]
    return rows, whole


def _middle(steps: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return sorted(steps, key=lambda step: sum(step.values()))[len(steps) // 2]


def of_losses(losses: Sequence[Mapping[str, Any]], step: float, peaks: Peaks) -> dict[str, Any]:
    """Return the losses' share of the step, Amdahl's bound, and the largest logits."""
    known = losses and all(loss["own"] in loss["ways"] for loss in losses)
    own = sum(loss["ways"][loss["own"]]["step_seconds"] for loss in losses) if known else None
    rest = None if own is None else step - own
    all_logits = [loss["logits"] for loss in losses if loss["logits"] is not None]
    logits = max(all_logits, key=lambda each: each["bytes"], default=None)
    most = max(peaks.by_phase.values(), default=None)
    if logits is not None:
        logits = {**logits, "share_of_peak": logits["bytes"] / most if most and logits["stored"] else None}
    return {
        "losses": list(losses),
        "loss_seconds": own,
        "loss_share": None if own is None else min(1.0, own / step),
        "bound": step / rest if rest is not None and rest > 0 else None,
        "logits": logits,
        "peak_bytes": most,
    }


def _with_expected(said: Mapping[str, Any], step: float) -> dict[str, Any]:
    """Return a head and its loss with the speed-up of the step that their times alone explain, by each way.

    It is None where a result is wrong, and where the loop's own way did not run alone or takes as long as the step.
    """
    if said["unit"] is None:
        return dict(said)
    ways: Mapping[str, Any] = said["unit"]["ways"]
    own = ways.get(said["unit"]["own"])
    rest = 0.0 if own is None or own["wrong"] else step - own["step_seconds"]
    expected = {
        name: step / (rest + way["step_seconds"]) if rest > 0 and not way["wrong"] else None
        for name, way in ways.items()
    }
    ways = {name: {**way, "expected": expected[name]} for name, way in ways.items()}
    return {**said, "unit": {**said["unit"], "ways": ways}}


def notes_of(losses: Sequence[Any], compiled: Collection[str], timed: Timed, device: str, has_head: bool) -> list[str]:
    """Return what a reader has to know to read the figures."""
    notes = []
    if None in timed.waits:
        notes.append(
            "The model's forward was not seen (it may be compiled in place): all time before the loss is the forward's."
        )
    if not timed.has_loader:
        notes.append("No DataLoader was seen: all time between a step and the model's forward counts as data.")
    if compiled:
        notes.append(f"In a graph of torch.compile, and so not told apart or replaced: {', '.join(sorted(compiled))}.")
    elif not losses:
        notes.append("No loss was seen, of tlkernels or torch.nn.functional.")
    elif not has_head:
        notes.append("The head was not found, or is compiled with the model: its time is in what is not told apart.")
    if device == "cpu":
        notes.append("Peak memory is the resident memory of the whole process.")
    return notes
