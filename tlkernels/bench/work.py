"""A case, its tensors and functions, and the steps that are timed: one forward and one backward of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

OURS = ("auto", "native", "triton", "reference")
"""Values of `impl`."""
Loss = Callable[..., Tensor]
Shape = tuple[int, ...]
Cast = Callable[[Tensor], Tensor]
"""Rounds float32 numbers to the dtype of a case."""


class Work(NamedTuple):
    """The tensors of a case and the functions that are compared on them."""

    inputs: tuple[Tensor, ...]
    """They get a gradient."""
    ours: Loss
    """Takes `impl=` too."""
    eager: Loss
    floor: Callable[[], object]
    """Work that no implementation can avoid."""
    peers: Mapping[str, Loss] = MappingProxyType({})
    """Further contestants, by name: losses of other libraries, and of ours with which it is compared."""
    upstream: Tensor | None = None
    """Gradient of the loss, where the loss is not a scalar."""
    fresh: tuple[str, ...] = ()
    """Contestants that overwrite their inputs: each call gets a copy, which is not timed."""
    data: Mapping[str, Any] = MappingProxyType({})
    """The fixed tensors and the options, by name: what a loss of another library needs beside the inputs."""
    absent: Mapping[str, str] = MappingProxyType({})
    """Why the losses of other libraries are not in `peers`, by name."""


Make = Callable[..., Work]
"""make(shape, cast, **options) -> Work"""


@dataclass(frozen=True)
class Case:
    """What is timed: a loss, a shape, a dtype and options.

    `bars` maps a contestant to the least speed-up, and "memory" to the most bytes above the inputs.
    """

    loss: str
    shape: Shape
    dtype: torch.dtype
    make: Make
    bars: Mapping[str, float] = field(default_factory=dict)
    contestants: tuple[str, ...] = ("eager", "floor")
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = "table"  # or "grid"
    seconds: float = 8.0  # how long the rounds take, once there are enough of them
    quick: bool = False  # part of the short run
    device: str = "cpu"
    cold: bool = True  # whether each sample begins with empty caches
    peers: bool | tuple[str, ...] = False  # whether the losses of other libraries take part, or which

    @property
    def id(self) -> str:
        """Loss, sizes, dtype and options."""
        options = [key if value is True else str(value) for key, value in self.options.items() if value is not False]
        return "-".join([self.loss, "x".join(map(str, self.shape)), name_of(self.dtype), *options])

    def work(self, *, wide: bool = False) -> Work:
        """Draw the tensors on the device; with `wide`, convert the rounded tensors to float64."""
        dtype = torch.float64 if wide else self.dtype
        with torch.device(self.device):
            work = self.make(self.shape, lambda tensor: tensor.to(self.dtype).to(dtype), **self.options)
        if not self.peers or wide:
            return work
        from tlkernels.bench.peers import with_peers

        return with_peers(self, work)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


_draw = 0


@contextmanager
def drawn(number: int) -> Iterator[None]:
    """Draw other random numbers inside the block; draw 0 is the one that is timed."""
    global _draw
    before, _draw = _draw, number
    try:
        yield
    finally:
        _draw = before


def generator(seed: int) -> torch.Generator:
    """Return a generator for the draw that is current."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed + 1000 * _draw)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=generator(seed)).mul_(scale)


def classes_of(classes: int, *shape: int) -> Tensor:
    """Draw class indices."""
    return torch.randint(classes, shape, generator=generator(0))


class Step:
    """One call that is timed; `prepare` before it and `release` after it are not timed."""

    repeatable = True  # many calls may follow one `prepare`

    def prepare(self) -> None:
        """Make the inputs of one call."""

    def release(self) -> None:
        """Drop what the call has made."""

    def __call__(self) -> None:
        """Run the call."""
        raise NotImplementedError


class LossStep(Step):
    """Forward and backward of one contestant. Its inputs are leaves, or, with `fresh`, new copies of them."""

    value: Tensor | None = None
    grads: tuple[Tensor, ...] = ()

    def __init__(self, loss: Loss, work: Work, fresh: bool = False) -> None:
        self.loss, self.upstream, self.fresh = loss, work.upstream, fresh
        self.repeatable = not fresh
        self.leaves = [tensor.detach().requires_grad_() for tensor in work.inputs]
        self.inputs = self.leaves

    def prepare(self) -> None:
        """Copy the inputs that the call overwrites."""
        if self.fresh:
            self.inputs = [leaf.clone() for leaf in self.leaves]

    def release(self) -> None:
        """Drop loss, gradients and copies."""
        self.value, self.grads = None, ()
        if self.fresh:
            self.inputs = []

    def __call__(self) -> None:
        """Run forward and backward."""
        self.grads = ()  # so that two calls do not need the memory of two gradients
        self.value = self.loss(*self.inputs)
        self.grads = torch.autograd.grad(self.value, self.inputs, self.upstream)

    def results(self) -> list[Tensor]:
        """Return the loss and the gradients of one call, in float64."""
        self.prepare()
        self()
        assert self.value is not None
        wide = [tensor.detach().to(torch.float64, copy=True) for tensor in (self.value, *self.grads)]
        self.release()
        return wide


class FloorStep(Step):
    """One call of the floor."""

    def __init__(self, floor: Callable[[], object]) -> None:
        self.floor = floor

    def __call__(self) -> None:
        """Run the floor."""
        with torch.no_grad():
            self.floor()


def build(name: str, work: Work) -> Step:
    """Return the step of one contestant. torch.compile has compiled it."""
    if name == "floor":
        return FloorStep(work.floor)
    loss = {"eager": work.eager, **work.peers}.get(name)
    if name in OURS:
        loss = partial(work.ours, impl=name)
    if name == "compile":
        torch.compiler.reset()  # else the shapes of earlier cases count towards the limit on recompilation
        loss = torch.compile(work.eager, dynamic=False)
    if loss is None:
        expected = ", ".join((*OURS, "eager", "compile", "floor", *work.peers))
        raise ValueError(f"contestant: expected one of {expected}; got {name!r}")
    step = LossStep(loss, work, name in work.fresh)
    if name == "compile":
        step.prepare()
        step()
        step.release()
    return step
