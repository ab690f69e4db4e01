"""A step in which the losses are recorded, the head is found, and operations are counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tlkernels._core.autograd import PLAIN
from tlkernels.profiling import phases
from tlkernels.profiling.calls import Call
from tlkernels.profiling.heads import Heads
from tlkernels.profiling.operations import Operations
from tlkernels.profiling.recorded import Recorded, autocast_of, detached
from tlkernels.profiling.units import Units
from tlkernels.profiling.watch import Listener, Watch


class Discovery(Listener):
    """What a step consists of."""

    def __init__(self, watch: Watch) -> None:
        self.operations = Operations()
        self.losses: dict[tuple[str, torch.dtype], Recorded] = {}
        self.head_layer: nn.Module | None = _declared_head(watch.roots)
        self.with_head = False
        """Whether a loss takes what a head computes."""
        self._heads = Heads(watch, self.head_layer)
        self.units = Units(self._heads, watch.roots)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a step."""
        with self._heads.seen(), self.operations:
            yield

    def begin(self) -> None:
        """A step begins; what one that was skipped has left is forgotten."""
        self.losses.clear()
        self.units.clear()
        self.operations.by_dtype.clear()

    def enter(self, phase: str) -> None:
        """The backward frees what the layers were called with."""
        if phase == phases.ENGINE:
            self._heads.forget()

    def loss(self, call: Call) -> None:
        """Record a call whose gradient will be asked for."""
        tensors = [leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if not differentiable:
            return
        if call.has_head:
            self.with_head = True
            self.head_layer = self.head_layer or self._heads.layer_of(differentiable[0])
        elements = max(tensor.numel() for tensor in tensors)
        key = call.name, differentiable[0].dtype
        self.units.loss(key, call, tensors)
        known = self.losses.get(key)
        if known is None or elements > known.largest:
            autocast = autocast_of(differentiable[0])
            earlier = (known.calls, known.elements) if known else (0, 0)
            known = Recorded(_kept(call), *earlier, elements, autocast, call.logits(), _spans(call))
            self.losses[key] = known
        known.calls, known.elements = known.calls + 1, known.elements + elements


def _kept(call: Call) -> Call:
    """Return the call as it is now: its tensors outlive the step, without their graph."""
    kept, arguments = copy.copy(call), call.arguments
    if getattr(arguments, "inplace_grad", False):  # the backward overwrites the input
        arguments = tree_map(_copied, arguments._replace(inplace_grad=False))
    kept.arguments = tree_map(detached, arguments)
    return kept


def _spans(call: Call) -> bool:
    """Return whether a call needs other processes."""
    leaves = tree_leaves(call.arguments)
    if any(isinstance(leaf, Tensor) and type(leaf) not in PLAIN for leaf in leaves):
        return True  # such as a DTensor
    return dist.is_available() and any(isinstance(leaf, dist.ProcessGroup) for leaf in leaves)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _declared_head(roots: list[nn.Module]) -> nn.Module | None:
    """Return the vocabulary head of a model of transformers, which names it."""
    for root in roots:
        for module in root.modules():  # a wrapper comes before what it wraps
            read: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
            if callable(read) and isinstance(head := read(), nn.Module):
                return head
    return None
