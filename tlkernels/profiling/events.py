"""The events of a profiler's trace, and the parts of a step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

PREFIX = "tlkernels.profile: "
"""Of the names of the ranges that the profile adds to a trace."""
COMMUNICATION = ("c10d::", "nccl:", "gloo:", "mpi:", "ncclDevKernel", "ncclKernel", "record_param_comms")
"""How the names of communication begin."""


class Event(NamedTuple):
    """An event of a trace; times in nanoseconds."""

    name: str
    start: int
    end: int
    thread: int
    sequence: int = -1
    """Of the autograd node that it makes or runs."""
    forward_thread: int = 0
    """The thread in which the autograd node was made."""
    id: int = 0
    link: int = 0
    """On the device: the `id` of the host's operation that launched it."""


class Segment(NamedTuple):
    """A part of a step, and its phase; None where the trace has none."""

    start: int
    end: int
    phase: str | None


class Changes(NamedTuple):
    """Which phase each autograd node was made in: from `sequences[i]` on it is `phases[i]`."""

    sequences: Sequence[int]
    phases: Sequence[str | None]

    def at(self, sequence: int) -> str | None:
        """Return the phase of a node of the forward."""
        index = bisect_right(self.sequences, sequence) - 1
        return self.phases[index] if index >= 0 else None


class Step(NamedTuple):
    """The events of a step on the host and on the device."""

    start: int
    end: int
    thread: int
    """The thread of the training loop."""
    host: Sequence[Event]
    device: Sequence[Event]
