"""Ranges in a profiler's trace: `tlkernels::<loss>` for a call, `tlkernels::<loss> backward` for its backward."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler


class _Current(threading.local):
    loss = ""
    """The loss whose range is open in this thread."""


_current = _Current()


def enabled() -> bool:
    """Return whether a profiler runs."""
    return profiler._is_profiler_enabled


def in_range(loss: str, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `run` within the range of a loss."""

    def run_in_range(call: Any) -> Any:
        outer, _current.loss = _current.loss, loss
        try:
            with profiler.record_function(f"tlkernels::{loss}"):
                return run(call)
        finally:
            _current.loss = outer

    return run_in_range


def of_backward() -> str:
    """Return the name of the range for the backward of the loss whose range is open; empty if none is."""
    return f"tlkernels::{_current.loss} backward" if _current.loss else ""


def named(name: str) -> AbstractContextManager[Any]:
    """Return a range of that name; none if it is empty."""
    return profiler.record_function(name) if name else nullcontext()
