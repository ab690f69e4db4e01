"""Ranges in a profiler's trace: `tlkernels::<loss>` for a call, `tlkernels::<loss> backward` for its backward."""

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler


class _Current(threading.local):
    loss = ""
    """The loss whose range is open in this thread."""


_current = _Current()


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
    if not profiler._is_profiler_enabled or not _current.loss:
        return ""
    return f"tlkernels::{_current.loss} backward"


def around(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward of an autograd.Function within the range of the name `ctx.range`, if it has one."""

    @functools.wraps(backward)
    def in_range_of_forward(ctx: Any, *grads: Any) -> Any:
        if not ctx.range:
            return backward(ctx, *grads)
        with profiler.record_function(ctx.range):
            return backward(ctx, *grads)

    return in_range_of_forward
