"""What a head and its loss mean, in sentences: what the step would gain with `linear_cross_entropy` in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlkernels import words

Json = Mapping[str, Any]
LEAST = 0.995  # what is not shown as 1.00x is called slower
LINEAR = "linear_cross_entropy"


def sentences(said: Json) -> list[str]:
    """Return what profile.json's entry of a head and its loss means."""
    if said["unit"] is None:
        return [f"{LINEAR} in place of the head and {said['loss']} was not tried: {said['why_not']}."]
    unit, auto = said["unit"], said["auto"]
    own, ours = (unit["ways"].get(way) for way in (unit["own"], auto))
    if ours is None:
        return [f"{LINEAR} in place of {unit['name']} did not run alone: {unit['refused'][auto]}."]
    if ours["wrong"]:
        return [f"{LINEAR} in place of {unit['name']} has no speed-up: {ours['wrong']}."]
    if own is not None and own["wrong"]:
        return [f"{unit['name']}, as the loop computes them, cannot be compared: {own['wrong']}."]
    if own is None:
        takes = f"{LINEAR} takes {words.time(ours['step_seconds'])}{_peak(ours)}"
        return [f"{unit['name']} did not run alone: {unit['refused'][unit['own']]}. {takes}.", _swap(said)]
    both = f"Head and loss together take {words.time(own['step_seconds'])} of the step"
    takes = f"{LINEAR} takes {words.time(ours['step_seconds'])}{_less(own, ours)}"
    if ours["expected"] is None:
        return [f"{both}, no less than the step alone: what {LINEAR} would gain is not known. {takes}."]
    slower = ": it would be slower" if ours["expected"] < LEAST else ""
    gain = (
        f"the step would be {ours['expected']:.2f}x as fast (expected from these times, not measured in steps){slower}"
    )
    return [f"{both}. {takes}: {gain}.", _swap(said)]


def _less(own: Json, ours: Json) -> str:
    if own["peak_bytes"] is None or ours["peak_bytes"] is None:
        return ""
    less = own["peak_bytes"] - ours["peak_bytes"]
    return f" and {words.size(abs(less))} {'less' if less >= 0 else 'more'}"


def _peak(way: Json) -> str:
    return "" if way["peak_bytes"] is None else f" and {words.size(way['peak_bytes'])}"


def _swap(said: Json) -> str:
    return (
        f"In the loop: loss = {said['swap']}, where hidden is what {said['head']} gets, with one row for each row of "
        f"the logits. It replaces {said['head']} and {said['loss']} if nothing else needs the logits."
    )
