"""A step in which the losses are recorded, the head is found, and operations are counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tlkernels._core.autograd import PLAIN
from tlkernels.profiling.calls import Call, Logits
from tlkernels.profiling.operations import Operations
from tlkernels.profiling.watch import Listener, Watch

_VIEWS = (
    "View", "UnsafeView", "Reshape", "Slice", "Select", "Clone", "ToCopy", "Transpose", "TBackward", "Permute", "Alias",
    "Squeeze", "Unsqueeze", "Expand", "Div", "Mul", "Tanh", "Index", "Gather", "AsStrided", "Copy", "Split", "Unbind",
    "Narrow", "Contiguous",
)  # fmt: skip
"""Autograd nodes between a head's output and the loss: views, copies, choices of rows, scales and softcaps."""


@dataclass
class Recorded:
    """The calls of a loss in a step; of several, the one with the most elements."""

    call: Call
    calls: int
    elements: int
    """Of all calls."""
    largest: int
    """Of `call`."""
    autocast: torch.dtype | None
    logits: Logits | None
    spans_processes: bool


class Discovery(Listener):
    """What a step consists of."""

    def __init__(self, watch: Watch) -> None:
        self.operations = Operations()
        self.losses: dict[tuple[str, torch.dtype], Recorded] = {}
        self.head_layer: nn.Module | None = _declared_head(watch.roots)
        self.with_head = False
        """Whether a loss takes what a head computes."""
        self._watch = watch
        self._linears: dict[int, nn.Module] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a step."""
        linears = {module for root in self._watch.roots for module in root.modules() if isinstance(module, nn.Linear)}
        handles = [linear.register_forward_hook(self._keep_linear) for linear in linears]
        try:
            with self.operations:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._linears.clear()

    def begin(self) -> None:
        """A step begins; what one that was skipped has left is forgotten."""
        self.losses.clear()
        self.operations.by_dtype.clear()

    def _keep_linear(self, module: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(output, Tensor) and output.grad_fn is not None:
            self._linears[output.grad_fn._sequence_nr()] = module

    def loss(self, call: Call) -> None:
        """Record a call whose gradient will be asked for."""
        tensors = [leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor)]
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if not differentiable:
            return
        if call.has_head:
            self.with_head = True
            self.head_layer = self.head_layer or self._head_of(differentiable[0])
        elements = max(tensor.numel() for tensor in tensors)
        key = call.name, differentiable[0].dtype
        known = self.losses.get(key)
        if known is None or elements > known.largest:
            kind = differentiable[0].device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            earlier = (known.calls, known.elements) if known else (0, 0)
            known = Recorded(_kept(call), *earlier, elements, autocast, call.logits(), _spans(call))
            self.losses[key] = known
        known.calls, known.elements = known.calls + 1, known.elements + elements

    def _head_of(self, logits: Tensor) -> nn.Module | None:
        """Return the linear layer whose output became the logits by views, copies and scales alone."""
        node: Any = logits.grad_fn
        while node is not None and node._sequence_nr() not in self._linears:
            if not node.name().startswith(_VIEWS):
                return None
            node = next((parent for parent, _ in node.next_functions if parent is not None), None)
        return None if node is None else self._linears[node._sequence_nr()]


def _kept(call: Call) -> Call:
    """Return the call as it is now: its tensors outlive the step, without their graph."""
    kept, arguments = copy.copy(call), call.arguments
    if getattr(arguments, "inplace_grad", False):  # the backward overwrites the input
        arguments = tree_map(_copied, arguments._replace(inplace_grad=False))
    kept.arguments = tree_map(_detached, arguments)
    return kept


def _spans(call: Call) -> bool:
    """Return whether a call needs other processes."""
    leaves = tree_leaves(call.arguments)
    if any(isinstance(leaf, Tensor) and type(leaf) not in PLAIN for leaf in leaves):
        return True  # such as a DTensor
    return dist.is_available() and any(isinstance(leaf, dist.ProcessGroup) for leaf in leaves)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _detached(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _declared_head(roots: list[nn.Module]) -> nn.Module | None:
    """Return the vocabulary head of a model of transformers, which names it."""
    for root in roots:
        for module in root.modules():  # a wrapper comes before what it wraps
            read: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
            if callable(read) and isinstance(head := read(), nn.Module):
                return head
    return None
