"""Some steps under torch.profiler: their phases, and the trace for Perfetto."""

from __future__ import annotations

import gzip
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from tlkernels.profiling import phases
from tlkernels.profiling.events import PREFIX, Changes, Event, Segment, Step
from tlkernels.profiling.timeline import filled, segments
from tlkernels.profiling.watch import Listener

_BORDER = PREFIX + "border of a step"


class Trace(Listener):
    """Records the steps within `recorded()`, between `begin` and `end`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.saw_head = False
        self._taken: list[bool] = []
        self._open: list[tuple[str, Any]] = []
        self._changes: list[tuple[int, str | None]] = []
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = torch.profiler.profile(activities=activities)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run the profiler."""
        with warnings.catch_warnings():
            # Until PyTorch 2.11 it says that it clears the events of earlier cycles, of which there are none.
            warnings.filterwarnings("ignore", "Profiler clears events", UserWarning)
            self._profiler.start()
        try:
            yield
        finally:
            self._profiler.stop()

    def begin(self) -> None:
        """A step begins, on an idle device."""
        self._wait()
        with record_function(_BORDER):
            pass

    def end(self, taken: bool) -> None:
        """It ends, on the device as well."""
        self._wait()
        self._taken.append(taken)
        with record_function(_BORDER):
            pass

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def head(self, input: Tensor) -> None:
        """Note that the trace has the head."""
        self.saw_head = True

    def enter(self, phase: str) -> None:
        """Open a range of the trace."""
        record = record_function(PREFIX + phase)
        record.__enter__()
        self._open.append((phase, record))
        self._change(phase)

    def leave(self, phase: str) -> None:
        """Close it."""
        if not self._open:  # it was opened before the recording
            return
        _, record = self._open.pop()
        record.__exit__(None, None, None)
        self._change(self._open[-1][0] if self._open else None)

    def _change(self, phase: str | None) -> None:
        self._changes.append((torch._C._autograd._get_sequence_nr(), phase))

    def steps(self) -> list[list[Segment]]:
        """Return the phases of each step, on the host or with a GPU on the device. Of the first step there are none."""
        result: Any = self._profiler.profiler
        host, device, borders = _events(result.kineto_results.events())
        made_in = [None if phase == phases.ENGINE else phase for phase in filled([phase for _, phase in self._changes])]
        changes = Changes([sequence for sequence, _ in self._changes], made_in)
        found = []
        taken = [
            pair for pair, took in zip(zip(borders[::2], borders[1::2], strict=True), self._taken, strict=True) if took
        ]
        for begin, end in taken[1:]:
            within = [event for event in host if event.end > begin.end and event.start < end.start]
            step = Step(begin.end, end.start, begin.thread, within, device)
            found.append(segments(step, changes, self.device.type == "cuda"))
        return found

    def export(self, file: Path, steps: list[list[Segment]]) -> None:
        """Write the trace, with the phases of the steps as a line of their own."""
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(raw))
            trace = json.loads(raw.read_text(encoding="utf-8"))
        border = next(event for event in trace["traceEvents"] if event.get("name") == _BORDER)
        result: Any = self._profiler.profiler
        first = min(event.start_ns() for event in result.kineto_results.events() if event.name() == _BORDER)
        line = {"pid": "tlkernels", "tid": "phases of the step"}
        for part in (part for step in steps for part in step):
            start = border["ts"] + (part.start - first) / 1e3
            named = {"ph": "X", "cat": "phase", "name": part.phase or phases.OTHER}
            trace["traceEvents"].append({**named, **line, "ts": start, "dur": (part.end - part.start) / 1e3})
        with gzip.open(file, "wt", encoding="utf-8", compresslevel=5) as out:
            json.dump(trace, out)


def _events(recorded: list[Any]) -> tuple[list[Event], list[Event], list[Event]]:
    """Return the events of the host, those of the device, and the borders of steps."""
    host: list[Event] = []
    device: list[Event] = []
    for each in recorded:
        start = each.start_ns()
        event = Event(
            each.name(), start, start + each.duration_ns(), each.start_thread_id(), each.sequence_nr(),
            each.fwd_thread_id(), each.correlation_id(), each.linked_correlation_id(),
        )  # fmt: skip
        (host if each.device_type() == torch._C._autograd.DeviceType.CPU else device).append(event)
    names = {event.name for event in host}
    # The device also shows the host's ranges, which are no work.
    device = [event for event in device if event.name not in names]
    borders = sorted((event for event in host if event.name == _BORDER), key=lambda event: event.start)
    return [event for event in host if event.name != _BORDER], device, borders
