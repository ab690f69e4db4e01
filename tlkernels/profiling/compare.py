"""Further steps of the loop in which the ways to compute the loss take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tlkernels.profiling.calls import EAGER, REFERENCE
from tlkernels.profiling.timed import Clock, quartiles

OWN = "as it is"
_MARGIN = 1.2  # of the memory that a way needs


class Comparison:
    """The steps: the ways in an order that rotates, `rounds` times, after one round that does not count.

    Args:
        losses: what `replay` returned.
        rounds: how many times each way is timed.
        free: bytes that are free where the loss is computed in a step.
        device: the device of the model.
    """

    def __init__(self, losses: Sequence[Mapping[str, Any]], rounds: int, free: int, device: torch.device) -> None:
        self._losses = losses
        self.refused: dict[str, str] = {}
        """Why a way is not tried in steps."""
        tried = _agreed(self._tried(losses, free))
        self.ways: dict[str, str | None] = {OWN: None} | {name: name for name in tried}
        """The names, and the way that the watch is asked for."""
        self.baseline = OWN if all(loss["own"] == loss["baseline"] for loss in losses) else EAGER
        if self.baseline not in self.ways:
            self.baseline = REFERENCE if REFERENCE in self.ways else OWN
        names = list(self.ways)
        shifts = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(1 + rounds)]
        self.order = [name for names in shifts for name in names]
        self._clocks = {name: Clock(device) for name in names}
        self.done = 0
        """Steps so far."""

    def _tried(self, losses: Sequence[Mapping[str, Any]], free: int) -> list[str]:
        owns = {loss["own"] for loss in losses}
        names = dict.fromkeys(name for loss in losses for name in loss["ways"])
        if EAGER in names:
            names.pop(REFERENCE, None)  # slower PyTorch lines, which nobody would write
        tried = []
        for name in names:
            served = [loss["ways"][name] for loss in losses if name in loss["ways"]]
            wrong = [way["wrong"] for way in served if way["wrong"]]
            needs = max((way["peak_bytes"] or 0) for way in served)
            if owns == {name}:
                continue
            if wrong:
                self.refused[name] = wrong[0]
            elif _MARGIN * needs > free:
                self.refused[name] = f"a step may not have the {needs / 1e9:.2f} GB that it takes"
            else:
                tried.append(name)
        return tried

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.done == len(self.order)

    def begin(self) -> str | None:
        """Return the way of the next step, whose time begins."""
        name = self.order[self.done]
        self._clocks[name].begin()
        return self.ways[name]

    def end(self, taken: bool) -> None:
        """The step ends; it is done again unless it was taken."""
        if taken:
            self._clocks[self.order[self.done]].end()
            self.done += 1

    def _expected(self, step: float) -> dict[str, float | None]:
        """Return the speed-up of each way that the time of the losses alone explains; None where it is not known."""
        spent = {name: self._spent(way) for name, way in self.ways.items()}
        own, base = spent[OWN], spent[self.baseline]
        if own is None or base is None:
            return dict.fromkeys(self.ways)
        rest = max(step - own, 0.0)
        return {name: None if time is None else (rest + base) / (rest + time) for name, time in spent.items()}

    def _spent(self, way: str | None) -> float | None:
        """Return the seconds of a step's losses alone, by a way where it serves them."""
        total = 0.0
        for loss in self._losses:
            ways = loss["ways"]
            used = ways.get(loss["own"] if way is None or way not in ways else way)
            if used is None:
                return None
            total += used["step_seconds"]
        return total

    def measured(self, step: float) -> dict[str, Any]:
        """Return the seconds and the speed-up of each way, within rounds that are complete; empty if there is none.

        `step` is the time of a step as it is, for the speed-up that one would expect.
        """
        rounds = self.done // len(self.ways) - 1
        if rounds < 1:
            return {}
        times = {name: clock.seconds()[1 : 1 + rounds] for name, clock in self._clocks.items()}
        base, expected = times[self.baseline], self._expected(step)
        return {
            name: {
                "seconds": quartiles(own),
                "speedup": quartiles([theirs / mine for theirs, mine in zip(base, own, strict=True)]),
                "expected": expected[name],
                "rounds": rounds,
            }
            for name, own in times.items()
        }


def _agreed(names: list[str]) -> list[str]:
    """Return the names that process 0 has: all processes do the same steps, and stop after the same one."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return names
    box = [names]
    dist.broadcast_object_list(box, src=0)
    return box[0]
