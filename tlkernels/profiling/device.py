"""What a GPU did in each part of a step, by the phase in which the host launched it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from tlkernels.profiling import phases
from tlkernels.profiling.events import COMMUNICATION, Event, Segment, Step


def on_device(step: Step, of_threads: Mapping[int, list[Segment]]) -> list[Segment]:
    """Return what the device worked for. Communication and copies count where nothing is computed meanwhile."""
    launchers = {event.id: event for event in step.host}
    borders: list[tuple[int, int, int]] = []  # time, +1 or -1, number of the kernel
    named: list[tuple[int, str]] = []  # rank, phase
    kernels = [kernel for kernel in step.device if kernel.end > step.start and kernel.start < step.end]
    for number, kernel in enumerate(kernels):
        named.append(_named(kernel, launchers.get(kernel.link), of_threads))
        borders += [(max(kernel.start, step.start), 1, number), (min(kernel.end, step.end), -1, number)]
    parts, now = [], step.start
    running: dict[int, None] = {}
    for time, change, number in sorted(borders):
        if time > now:
            busiest = max(running, key=lambda each: (named[each][0], each), default=None)
            if busiest is None:
                parts += _idle(now, time, of_threads[step.thread])
            else:
                parts.append(Segment(now, time, named[busiest][1]))
            now = time
        if change > 0:
            running[number] = None
        else:
            running.pop(number, None)
    return parts + _idle(now, step.end, of_threads[step.thread])


def _named(kernel: Event, launcher: Event | None, of_threads: Mapping[int, list[Segment]]) -> tuple[int, str]:
    """Return a kernel's phase, and which of two at the same time counts."""
    if kernel.name.startswith(COMMUNICATION):
        return 0, phases.COMMUNICATION
    if "HtoD" in kernel.name:
        return 1, phases.TO_DEVICE
    phase = None if launcher is None else _at(of_threads.get(launcher.thread, []), launcher.start)
    return 2, phases.BACKWARD_ALL if phase == phases.ENGINE else phase or phases.OTHER


def _at(parts: list[Segment], time: int) -> str | None:
    index = bisect_right(parts, time, key=lambda part: part.start) - 1
    return parts[index].phase if index >= 0 else None


def _idle(start: int, end: int, loop: list[Segment]) -> list[Segment]:
    """Return the device's gap: the data's where the loop waits for data, otherwise the host's."""
    found = []
    for part in loop:
        begin, stop = max(start, part.start), min(end, part.end)
        if begin < stop:
            found.append(Segment(begin, stop, phases.DATA if part.phase == phases.DATA else phases.IDLE))
    return found
