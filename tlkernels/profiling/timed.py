"""Steps without synchronisation or a profiler: their time, the wait for data, the rows and tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tlkernels.profiling import phases
from tlkernels.profiling.watch import Listener

_INTEGERS = (torch.int64, torch.int32)


class Clock:
    """Times steps on the host, or with a GPU by its events on the device; waits for nothing until asked."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._started: Any = None

    def begin(self) -> None:
        """A step begins."""
        self._started = self._now()

    def end(self) -> None:
        """It ends and counts."""
        self._marks.append((self._started, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Return the seconds of each step; with a GPU, wait for it."""
        if not self._on_gpu:
            return [end - start for start, end in self._marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self._marks]


class Timed(Listener):
    """Times steps, and counts what they read."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._started = self._first = self._data = self._opened = 0.0
        self._rows: int | None = 0
        self._tokens: int | None = 0
        self.waits: list[float | None] = []
        """Seconds of each step that the host waited for data; None if no forward was seen."""
        self.rows: list[int | None] = []
        self.tokens: list[int | None] = []
        self.has_loader = False

    def begin(self) -> None:
        """A step begins."""
        self._first = self._data = 0.0
        self._rows = self._tokens = 0
        self._started = time.perf_counter()
        self._clock.begin()

    def end(self, taken: bool) -> None:
        """It ends; it counts if it was taken."""
        if not taken:
            return
        self._clock.end()
        self.waits.append(self._data or (self._first - self._started if self._first else None))
        self.rows.append(self._rows or None)
        self.tokens.append(self._tokens or None)

    def seconds(self) -> list[float]:
        """Return the seconds of each step."""
        return self._clock.seconds()

    def enter(self, phase: str) -> None:
        """Note when the first forward begins, and the wait for data."""
        if phase == phases.DATA:
            self._opened, self.has_loader = time.perf_counter(), True
        elif phase in (phases.FORWARD, phases.NO_GRAD) and not self._first:
            self._first = time.perf_counter()

    def leave(self, phase: str) -> None:
        """Count the wait for data."""
        if phase == phases.DATA:
            self._data += time.perf_counter() - self._opened

    def inputs(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Count rows and tokens."""
        rows, tokens = size_of(args, kwargs)
        self._rows = None if rows is None or self._rows is None else self._rows + rows
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens


def size_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the rows and the tokens of a model's input, padding counted; None where that is not known."""
    tensors: list[tuple[str, Tensor]] = []
    for name, value in [("", each) for each in args] + list(kwargs.items()):
        inner = value.items() if isinstance(value, Mapping) else [(name, value)]
        tensors += [(str(key), each) for key, each in inner if isinstance(each, Tensor)]
    tokens = [tensor for name, tensor in tensors if name == "input_ids"] or [
        tensor for _, tensor in tensors[:1] if tensor.dim() == 2 and tensor.dtype in _INTEGERS
    ]
    if tokens:
        return (tokens[0].shape[0] if tokens[0].dim() > 1 else 1), tokens[0].numel()
    first = next((tensor for _, tensor in tensors), None)
    return (None if first is None or first.dim() < 2 else first.shape[0]), None


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return [*values] * 3
    return statistics.quantiles(values, n=4, method="inclusive")
