"""Hooks into a training loop that tell where in a step it is. They change nothing that the loop computes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.loss import _Loss
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from tlkernels._core import dispatch
from tlkernels.profiling import phases
from tlkernels.profiling.calls import Call, OurCall, Unserved
from tlkernels.profiling.functions import in_compiled_function, replaced


class Listener:
    """Is told what happens in a step. Ranges are nested."""

    def begin(self) -> None:
        """A step begins."""

    def end(self, taken: bool) -> None:
        """It ends; it counts if it was taken, that is not skipped by the optimiser."""

    def enter(self, phase: str) -> None:
        """A phase begins."""

    def leave(self, phase: str) -> None:
        """It ends."""

    def inputs(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """The model is called, with autograd."""

    def head(self, input: Tensor) -> None:
        """The head is called."""

    def loss(self, call: Call) -> None:
        """A loss is called, with autograd."""


class Watch:
    """The hooks. Within `hooked()`, `listener` is told of data loading, the model, its head, tlkernels' losses and the
    optimiser; PyTorch's losses and backward passes are up to `Functions`.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.listener = Listener()
        self.way: str | None = None
        """How losses are computed; None as the loop does."""
        self.model = model
        self.compiled: set[str] = set()
        """The losses that are in a compiled graph, so that they cannot be told apart or replaced."""
        self.unserved = 0
        """Calls of losses for which there was no such way, and which were computed as the loop does."""
        self.roots: list[nn.Module] = []
        """The modules that the loop calls itself, those that learn first."""
        self.in_loss = False
        self.optimiser_stepped = False
        self._thread = threading.get_ident()
        self._open: list[str] = []
        self._stack = ExitStack()

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters; that of a GPU, if only some are on it or the loop began on a CPU."""
        devices = {parameter.device: None for root in self.roots for parameter in root.parameters()}
        return min(devices, key=lambda device: device.type == "cpu", default=torch.device("cpu"))

    def elsewhere(self) -> bool:
        """Return whether this is not the loop's own code: another thread, or a trace of the compiler's."""
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread

    # ---- ranges

    def enter(self, phase: str) -> None:
        """Tell that a phase begins."""
        if not self.elsewhere():
            self._open.append(phase)
            self.listener.enter(phase)

    def leave(self, phase: str) -> None:
        """Tell that a phase ends, and those within it that were left by an exception."""
        if self.elsewhere() or phase not in self._open:
            return
        while (last := self._open.pop()) != phase:
            self.listener.leave(last)
        self.listener.leave(phase)

    def within(self, phase: str) -> bool:
        """Return whether a phase is open."""
        return phase in self._open

    # ---- hooks

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Install the hooks; remove them at the end."""
        with self._stack:
            self._stack.enter_context(replaced(dataloader._BaseDataLoaderIter, "__next__", self._next))
            for name, module in list(sys.modules.items()):
                if name.startswith("tlkernels.losses.") and hasattr(module, "resolve"):
                    self._stack.enter_context(replaced(module, "resolve", lambda _: self._resolve))
            self._keep(register_optimizer_step_pre_hook(lambda *_: self.enter(phases.OPTIMISER)))
            self._keep(register_optimizer_step_post_hook(lambda *_: self._optimised()))
            yield

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _next(self, fetch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def fetched(iterator: Any) -> Any:
            self.enter(phases.DATA)
            try:
                return fetch(iterator)
            finally:
                self.leave(phases.DATA)

        return fetched

    def _optimised(self) -> None:
        self.leave(phases.OPTIMISER)
        self.optimiser_stepped = True

    @contextmanager
    def finding_roots(self) -> Iterator[None]:
        """Find the modules that the loop calls itself, and hook them at the end."""
        found: dict[nn.Module, None] = {}
        open_modules: list[nn.Module] = []

        def before(module: nn.Module, _: Any) -> None:
            if not self.elsewhere():
                if not open_modules and not isinstance(module, _Loss):
                    found[module] = None
                open_modules.append(module)

        def after(module: nn.Module, *_: Any) -> None:
            if not self.elsewhere() and module in open_modules:
                del open_modules[open_modules.index(module) :]

        handles = [
            modules.register_module_forward_pre_hook(before),
            modules.register_module_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.model is not None and not any(self.model in root.modules() for root in found):
            found[self.model] = None
        self.roots = sorted((root for root in found if any(True for _ in root.parameters())), key=_learns, reverse=True)
        for root in self.roots:
            self._hook_root(root)

    def _hook_root(self, root: nn.Module) -> None:
        learns = _learns(root)

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.elsewhere():
                return
            if learns and torch.is_grad_enabled():
                self.enter(phases.FORWARD)
                self.listener.inputs(args, kwargs)
            else:
                self.enter(phases.NO_GRAD)

        def after(*_: Any) -> None:
            if self.elsewhere():
                return
            phase = next((p for p in reversed(self._open) if p in (phases.FORWARD, phases.NO_GRAD)), None)
            if phase is not None:
                self.leave(phase)

        self._keep(root.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self._keep(root.register_forward_hook(after, always_call=True))

    def hook_head(self, head: nn.Module) -> None:
        """Watch the head. From its call to the end of the model's forward, the phase is the head's."""

        def before(module: nn.Module, args: Any) -> None:
            if self.elsewhere() or not self.within(phases.FORWARD) or self.within(phases.HEAD):
                return
            self.enter(phases.HEAD)
            if args and isinstance(args[0], Tensor):
                self.listener.head(args[0])

        self._keep(head.register_forward_pre_hook(before))  # after that of a root, which a head may be

    # ---- losses

    def _resolve(self, loss: str, implementations: Sequence[dispatch.Implementation], call: Any, impl: str) -> Any:
        chosen = dispatch.resolve(loss, implementations, call, impl)
        if self.elsewhere():
            return chosen

        def run(arguments: Any) -> Any:  # a distributed loss changes its arguments after the choice
            return self.compute(OurCall(loss, implementations, arguments, chosen))

        return chosen._replace(run=run)

    def compute(self, call: Call) -> Any:
        """Return the loss of a call, in the way that is asked for."""
        if self.in_loss or self.elsewhere():
            return call.run(None)
        if in_compiled_function():  # which runs without its graph here, under the counter of operations
            self.compiled.add(call.name)
            return call.run(None)
        self.in_loss = True
        self.enter(phases.HEAD)
        try:
            if not torch.is_grad_enabled():  # an evaluation within the step
                return call.run(None)
            self.listener.loss(call)
            try:
                return call.run(self.way)
            except Unserved:
                self.unserved += 1
                return call.run(None)
        finally:
            self.leave(phases.HEAD)
            self.in_loss = False


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
