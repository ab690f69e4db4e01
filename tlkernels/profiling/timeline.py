"""From a profiler's events to the phases of a step, which do not overlap and add up to the step's time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tlkernels.profiling import phases
from tlkernels.profiling.device import on_device
from tlkernels.profiling.events import COMMUNICATION, PREFIX, Changes, Event, Segment, Step

_NODE = "autograd::engine::evaluate_function: "
_ACCUMULATE = "torch::autograd::AccumulateGrad"
_OPERATION = "an operation outside of all phases"
_SAME_AS_OUTER = ""


def segments(step: Step, changes: Changes, on_gpu: bool) -> list[Segment]:
    """Return the phases of a step: when the host was in each, or with a GPU when the device worked for each."""
    of_threads = {thread: _of_thread(step, events, changes) for thread, events in _by_thread(step.host).items()}
    loop = of_threads.get(step.thread, [Segment(step.start, step.end, None)])
    others = [event for event in step.host if event.thread != step.thread and event.name.startswith(COMMUNICATION)]
    loop = _resolved(_filled(_waiting(loop, others)))
    return on_device(step, {**of_threads, step.thread: loop}) if on_gpu else loop


def seconds(parts: Iterable[Segment]) -> dict[str, float]:
    """Return the seconds of each phase."""
    found: dict[str, float] = {}
    for part in parts:
        phase = part.phase or phases.OTHER
        found[phase] = found.get(phase, 0.0) + (part.end - part.start) / 1e9
    return found


# ---- the host --------------------------------------------------------------------------------------------------------


def _by_thread(events: Iterable[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(event.thread, []).append(event)
    return found


def _of_thread(step: Step, events: list[Event], changes: Changes) -> list[Segment]:
    """Return a thread's time, each part with the innermost phase."""
    parts: list[Segment] = []
    stack: list[tuple[int, str]] = []
    now, node = step.start, phases.BACKWARD_ALL

    def until(end: int) -> None:
        nonlocal now
        end = min(end, step.end)
        if end > now:
            parts.append(Segment(now, end, stack[-1][1] if stack else None))
            now = end

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        phase = _phase(event, changes, step.thread, node)
        if phase is None:
            continue
        while stack and stack[-1][0] <= event.start:
            until(stack[-1][0])
            stack.pop()
        outer = stack[-1][1] if stack else None
        if phase == _SAME_AS_OUTER:
            phase = outer if outer in phases.BACKWARDS else phases.BACKWARD_ALL
        if phase == _OPERATION and outer is not None:
            continue
        if event.name.startswith(_NODE):
            node = phase
        until(event.start)
        stack.append((event.end, phase))
    while stack:
        until(stack[-1][0])
        stack.pop()
    until(step.end)
    return parts


def _phase(event: Event, changes: Changes, loop: int, node: str) -> str | None:
    """Return the phase of a host's event; None if it belongs to that of what it is in."""
    name = event.name
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    if name.startswith(_NODE):
        if name.endswith(_ACCUMULATE):  # it runs right after the node that made the gradient
            return node
        made_in = changes.at(event.sequence) if event.forward_thread == loop else None
        return _SAME_AS_OUTER if made_in is None else phases.BACKWARD_OF.get(made_in, phases.BACKWARD_ALL)
    if name.startswith(COMMUNICATION):
        return phases.COMMUNICATION
    if name.startswith("Optimizer.zero_grad#"):
        return phases.OPTIMISER
    return _OPERATION if name.startswith("aten::") else None


def _filled(parts: list[Segment]) -> list[Segment]:
    """Give parts without a phase that of their neighbours, where these leave no doubt."""
    found = [part.phase for part in parts]
    return [part._replace(phase=phase) for part, phase in zip(parts, filled(found), strict=True)]


def filled(found: Sequence[str | None]) -> list[str | None]:
    """Return the phases in the order of time, with those of the parts that have none if the neighbours tell them."""
    gaps = (None, _OPERATION)
    skipped = (*gaps, phases.COMMUNICATION)
    around, in_engine = _neighbours(found, skipped), _neighbours(found, (*skipped, phases.ENGINE))
    has_data, has_forward, result = phases.DATA in found, phases.FORWARD in found, list(found)
    for i, phase in enumerate(found):
        if phase == phases.ENGINE:
            result[i] = next((near for near in in_engine[i] if near in phases.BACKWARDS), phases.ENGINE)
        elif phase in gaps:
            before, after = around[i]
            if not has_forward and after in (phases.HEAD, phases.ENGINE) and before != phases.HEAD:
                result[i] = phases.FORWARD_ALL  # of a model that was not seen
            else:
                result[i] = _between(phase, before, after, has_data)
    return result


def _neighbours(found: Sequence[str | None], skipped: Sequence[str | None]) -> list[tuple[str | None, str | None]]:
    """Return the phases before and after each part, of those that are not skipped."""

    def last(order: Iterable[str | None]) -> list[str | None]:
        seen: list[str | None] = [None]
        for phase in order:
            seen.append(seen[-1] if phase in skipped else phase)
        return seen[:-1]

    return list(zip(last(found), last(reversed(found))[::-1], strict=True))


def _between(gap: str | None, before: str | None, after: str | None, has_data: bool) -> str | None:
    forwards, backwards = (phases.FORWARD, phases.HEAD), (*phases.BACKWARDS, phases.ENGINE)
    if before in forwards and (after == phases.HEAD or after in backwards):
        return phases.HEAD  # such as pooling, a cast, a division of the loss
    if after in (phases.FORWARD, phases.NO_GRAD) and before not in (*forwards, phases.NO_GRAD) and not has_data:
        return phases.DATA
    if gap == _OPERATION and before in backwards and after == phases.OPTIMISER:
        return phases.OPTIMISER  # clipping
    return None


def _waiting(parts: list[Segment], others: list[Event]) -> list[Segment]:
    """Call it communication where the loop does nothing else while another thread communicates."""
    found = []
    for part in parts:
        start = part.start
        if part.phase in (None, phases.ENGINE):
            for other in sorted(others, key=lambda event: event.start):
                begin, end = max(start, other.start), min(part.end, other.end)
                if begin < end:
                    found += [Segment(start, begin, part.phase)] if start < begin else []
                    found.append(Segment(begin, end, phases.COMMUNICATION))
                    start = end
        if start < part.end:
            found.append(part._replace(start=start))
    return found


def _resolved(parts: list[Segment]) -> list[Segment]:
    return [part._replace(phase=phases.BACKWARD_ALL) if part.phase == phases.ENGINE else part for part in parts]
