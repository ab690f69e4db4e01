"""Chooses the implementation that serves a call, and explains the choice."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from tlkernels._core import choice, ranges

NAMES = ("native", "triton", "reference")


class Implementation(NamedTuple):
    """A way to compute a loss. `refuse` returns the reason why it cannot serve a call, or None."""

    name: str
    refuse: Callable[[Any], str | None]
    run: Callable[[Any], Any]
    by_name_only: bool = False
    """Whether "auto" skips it."""
    how: Callable[[Any], str] | None = None
    """Returns the strategy for a call, if there are several."""


class _Explained(Exception):
    """Not an error: it returns the report from inside the loss function."""


_explaining: set[int] = set()
"""The threads that are inside `explain`."""


def resolve(loss: str, implementations: Sequence[Implementation], call: Any, impl: str) -> Implementation:
    """Return the implementation for `call`: the one named by `impl`, or for "auto" the first that serves it.

    Raises:
        ValueError: `impl` is not one of the names.
        NotImplementedError: the named one cannot serve the call, or none can; the message lists the reasons.
    """
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"impl: expected 'auto' or one of {NAMES}, got {impl!r}")
    if _explaining and not torch.compiler.is_compiling() and threading.get_ident() in _explaining:
        raise _Explained(_report(loss, implementations, call, impl))
    for implementation in _in_order(loss, implementations, call, impl)[0]:
        if _requested(implementation, impl) and implementation.refuse(call) is None:
            # Dynamo must not see the profiler's flag: it would guard it, and compile again when a profiler starts.
            if not torch.compiler.is_dynamo_compiling() and profiler._is_profiler_enabled:
                return implementation._replace(run=ranges.in_range(loss, implementation.run))
            return implementation
    raise NotImplementedError(_report(loss, implementations, call, impl))


def _requested(implementation: Implementation, impl: str) -> bool:
    return impl == implementation.name or (impl == "auto" and not implementation.by_name_only)


def _in_order(
    loss: str, implementations: Sequence[Implementation], call: Any, impl: str
) -> tuple[Sequence[Implementation], str]:
    """Return the implementations in the order to try them, and the reason if that is not the given order."""
    tensor = choice.on_gpu(call) if impl == "auto" else None
    if tensor is None:
        return implementations, ""
    first, why = choice.faster(loss, tensor)
    return [*(i for i in implementations if i.name == first), *(i for i in implementations if i.name != first)], why


def _report(loss: str, implementations: Sequence[Implementation], call: Any, impl: str) -> str:
    by_name = {implementation.name: implementation for implementation in implementations}
    reasons = {
        name: by_name[name].refuse(call) if name in by_name else f"{loss} has no {name} implementation"
        for name in NAMES
    }
    tried, why_first = _in_order(loss, implementations, call, impl)
    order = [implementation.name for implementation in tried]
    chosen = next((name for name in order if reasons[name] is None and _requested(by_name[name], impl)), None)
    how = by_name[chosen].how if chosen else None
    way = how(call) if how else ""
    served = f"served by {chosen}{', ' + way if way else ''}"
    lines = [f"{loss}(impl={impl!r}): " + (served if chosen else "cannot be served")]
    for name in [*order, *(name for name in NAMES if name not in by_name)]:
        if name != chosen:
            first = why_first if why_first and chosen == order[0] and name != "reference" else f"{chosen} comes first"
            why = reasons[name] or (f"could serve it; {first}" if _requested(by_name[name], impl) else "not requested")
            lines.append(f"  {name}: {why}")
    return "\n".join(lines)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return which implementation `fn(*args, **kwargs)` uses, and for each other one why not.

    `fn` is a loss function or module of this package. It validates its arguments as in a call; nothing is computed.

    Raises:
        TypeError: `fn` is not a loss of this package.
    """
    thread = threading.get_ident()
    _explaining.add(thread)
    try:
        fn(*args, **kwargs)
    except _Explained as answer:
        return str(answer)
    finally:
        _explaining.discard(thread)
    raise TypeError(f"fn: expected a loss of tlkernels, got {fn!r}")
