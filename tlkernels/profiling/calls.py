"""The calls of a loss in a step: what they were given, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tlkernels._core.dispatch import NAMES, Implementation
from tlkernels.profiling.lines import lines_of

EAGER, REFERENCE = "eager", "reference"
Way = Callable[[Any], Any]
"""Computes the loss of a call from its arguments."""

# Losses whose inputs are not the output of a head: the head is inside, or there is none.
_WITHOUT_HEAD = ("linear_", "mse", "rmse", "info_nce", "nt_xent", "sup_con", "sigmoid_contrastive")


class Logits(NamedTuple):
    """The logits of a loss; those of a linear loss are not stored."""

    rows: int
    classes: int
    dtype: torch.dtype
    stored: bool

    @property
    def elements(self) -> int:
        """Their number."""
        return self.rows * self.classes

    @property
    def bytes(self) -> int:
        """Their size, or what it would be."""
        return self.elements * self.dtype.itemsize


def logits_of(input: Tensor, axis: int) -> Logits:
    """Return a description of logits whose classes are along `axis`."""
    classes = input.shape[axis] if input.dim() else 1
    return Logits(input.numel() // max(classes, 1), classes, input.dtype, stored=True)


def logits_of_layer(input: Tensor, weight: Tensor, stored: bool) -> Logits:
    """Return a description of the logits of a linear layer."""
    return Logits(prod(input.shape[:-1]), weight.shape[0], input.dtype, stored)


class Unserved(Exception):
    """A call cannot be computed in the way that was asked for."""


class Compared(Protocol):
    """What is computed alone, in several ways."""

    name: str
    arguments: Any
    """A tree of tensors and options; each of `ways` takes it, or another of its kind."""
    own: str
    """The way that the loop takes."""

    @property
    def ways(self) -> Mapping[str, Way]:
        """The ways that serve the call."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Why other implementations do not."""


class Call(Compared, Protocol):
    """A call of a loss."""

    has_head: bool
    """Whether the loss takes what a head computes."""

    def run(self, way: str | None) -> Any:
        """Return the loss, computed in the loop's own way for None.

        Raises:
            Unserved: `way` does not serve the call.
        """

    def logits(self) -> Logits | None:
        """Return its logits, if it has any."""


class OurCall:
    """A call of a loss of tlkernels, for which the dispatcher chose an implementation."""

    def __init__(self, loss: str, implementations: Sequence[Implementation], call: Any, chosen: Implementation) -> None:
        self.name, self.arguments, self.own, self.chosen = loss, call, chosen.name, chosen
        self._by_name = {each.name: each for each in implementations if not each.by_name_only}
        self.has_head = not loss.startswith(_WITHOUT_HEAD)

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why other implementations do not serve the call."""
        reasons = {}
        for name in NAMES:
            if name not in self._by_name and name != self.own:
                reasons[name] = f"{self.name} has none, or only Triton's interpreter would run it"
            elif name != self.own and (reason := self._by_name[name].refuse(self.arguments)):
                reasons[name] = reason
        return reasons

    @cached_property
    def ways(self) -> dict[str, Way]:
        """The implementations, and the PyTorch lines that the loss replaces where they are simple."""
        eager = lines_of(self.name, self.arguments)
        served = {name: each.run for name, each in self._by_name.items() if name not in self.refused}
        return ({EAGER: eager} if eager else {}) | served | {self.own: self.chosen.run}

    def run(self, way: str | None) -> Any:
        """Return the loss. A step is timed with it, so it asks only what it has to."""
        run: Way | None = self.chosen.run
        if way == EAGER:
            run = lines_of(self.name, self.arguments)
        elif way is not None and way != self.own:
            by = self._by_name.get(way)
            run = by.run if by is not None and by.refuse(self.arguments) is None else None
        if run is None:
            raise Unserved
        return run(self.arguments)

    def logits(self) -> Logits | None:
        """Return the logits."""
        call = self.arguments
        for layer in ("layers", "layer"):  # of the linear losses that keep the layer apart
            call = getattr(call, layer, call)
        if self.name.startswith("linear_"):
            tensors = [field for field in call if isinstance(field, Tensor)]
            return logits_of_layer(tensors[0], tensors[1], stored=False)
        if not self.has_head:
            return None
        input = next(field for field in call if isinstance(field, Tensor))
        return logits_of(input, 1 if self.name.startswith("cross_entropy") and input.dim() > 1 else -1)
