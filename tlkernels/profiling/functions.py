"""PyTorch's losses and backward passes, seen where the loop calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tlkernels.profiling import phases
from tlkernels.profiling.torch_calls import FUNCTIONS, LOG_SOFTMAX, TorchCall

if TYPE_CHECKING:
    from tlkernels.profiling.watch import Watch


class Functions:
    """Tells a watch of them."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.replaces: dict[Any, Callable[..., Any]] = {}
        """The functions that are replaced, by what replaces them."""
        self._referenced = False
        """Whether a loss was called by a reference that is no module's global."""

    @contextmanager
    def seen(self, all_calls: bool = False) -> Iterator[None]:
        """See the calls within.

        The functions are replaced where modules have them as globals, which costs nothing elsewhere. Calls by other
        references are seen by a TorchFunctionMode, which slows every operation: only with `all_calls`, and later if
        there was such a call. Neither may break a compiled graph.
        """
        with ExitStack() as stack:
            for owner, name, function in () if self._watch.compiled else _places():
                stack.enter_context(replaced(owner, name, partial(self._loss, function)))
            for name in ("backward", "grad"):
                stack.enter_context(replaced(torch.autograd, name, self._backward))
            if (all_calls or self._referenced) and not compiled():
                stack.enter_context(_Mode(self))
            yield

    def _loss(self, function: Callable[..., Any], _: Any) -> Callable[..., Any]:
        watch = self._watch

        # Without functools.wraps: Dynamo would take it for PyTorch's own function.
        def seen(*args: Any, **kwargs: Any) -> Any:
            if watch.elsewhere() or watch.in_loss or self._of_model(function):
                return function(*args, **kwargs)
            return watch.compute(TorchCall(function, args, kwargs))

        self.replaces[seen] = function
        return seen

    def _of_model(self, function: Any) -> bool:
        return function in LOG_SOFTMAX and self._watch.within(phases.FORWARD)

    def _backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            self._watch.enter(phases.ENGINE)
            try:
                return backward(*args, **kwargs)
            finally:
                self._watch.leave(phases.ENGINE)

        return seen

    def referenced(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of a loss that may have been called by a reference of its own."""
        if self._of_model(function):
            return function(*args, **kwargs)
        self._referenced |= not self._watch.in_loss
        return self._watch.compute(TorchCall(function, args, kwargs))


class _Mode(TorchFunctionMode):
    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self._functions.replaces.get(func, func)  # PyTorch's functions name themselves by their global
        if func in FUNCTIONS or func in LOG_SOFTMAX:
            return self._functions.referenced(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _places() -> list[tuple[Any, str, Any]]:
    """Return where PyTorch's losses are: the owner, the name, and the function."""
    found: list[tuple[Any, str, Any]] = [(F, name, function) for function, name in FUNCTIONS.items()]
    found += [(F, "log_softmax", F.log_softmax), (torch, "log_softmax", torch.log_softmax)]
    found.append((Tensor, "log_softmax", Tensor.log_softmax))
    known = {id(function): function for _, _, function in found}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] != "torch":
            found += [
                (module, key, known[id(value)]) for key, value in list(vars(module).items()) if id(value) in known
            ]
    return found


def compiled() -> bool:
    """Return whether torch.compile has compiled anything."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    # With fullgraph=True it counts no frames.
    return dynamo is not None and any(dynamo.counters.get(kind) for kind in ("frames", "stats"))


def in_compiled_function() -> bool:
    """Return whether this is called by a compiled function, whose graph may not be in use at the moment."""
    frame = sys._getframe() if compiled() else None
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":  # of torch/_dynamo/eval_frame.py
            return True
        frame = frame.f_back
    return False


@contextmanager
def replaced(owner: Any, name: str, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what `replace` makes of it, and restore it at the end."""
    own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, replace(original))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)  # it is inherited
