"""The linear layers of a step: which of them is a loss's head, and whether the loss takes its output as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as modules

from tlkernels._core.autograd import PLAIN
from tlkernels.profiling.functions import in_compiled_function
from tlkernels.profiling.recorded import autocast_of
from tlkernels.profiling.watch import Watch

_SCALES = ("Div", "Mul", "Tanh")
_CHOICES = ("Slice", "Select", "Index", "Gather", "Split", "Unbind", "Narrow")
_CAST = "ToCopy"
_COPIES = ("Clone", "Copy", "Contiguous", "UnsafeView", "Reshape")
_VIEWS = (
    "View", "Transpose", "TBackward", "Permute", "Alias", "Squeeze", "Unsqueeze", "Expand", "AsStrided", _CAST,
    *_COPIES, *_SCALES, *_CHOICES,
)  # fmt: skip
"""Autograd nodes between a head's output and the loss: views, copies, choices of rows, scales and softcaps."""
_OF_THE_PROFILE = ("tlkernels.profiling", "torch.utils.module_tracker")  # the latter is the operations' counter
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Mv")


class NotTried(Exception):
    """Why `linear_cross_entropy` is not tried in place of a head and its loss."""


@dataclass
class Ran:
    """A call of a linear layer. Its output may be freed; its input is kept until the backward begins."""

    module: nn.Linear
    input: Tensor
    """Without its graph."""
    storage: StorageWeakRef
    """Of the output."""
    offset: int
    elements: int
    dtype: torch.dtype
    version: int
    """The output's, which grows when it is changed in place."""
    autocast: torch.dtype | None
    compiled: bool
    losses: list[str] = field(default_factory=list)
    """The names of the losses that take the output."""


class Heads:
    """Watches the linear layers."""

    def __init__(self, watch: Watch, declared: nn.Module | None) -> None:
        self._watch, self._declared = watch, declared
        self._linears: dict[int, nn.Module] = {}
        self._ran: list[Ran] = []

    @contextmanager
    def seen(self) -> Iterator[None]:
        """See the layers' calls within."""
        linears = {module for root in self._watch.roots for module in root.modules() if isinstance(module, nn.Linear)}
        handles = [linear.register_forward_hook(self._keep) for linear in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._linears.clear()
            self.forget()

    def forget(self) -> None:
        """Free the inputs of the layers that were called."""
        self._ran.clear()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watch.elsewhere() or not isinstance(output, Tensor) or output.grad_fn is None:
            return
        self._linears[output.grad_fn._sequence_nr()] = module
        # With activation checkpointing most outputs are gone already, and so may be their inputs.
        self._ran = [each for each in self._ran if not each.storage.expired()]
        if type(output) in PLAIN and args and isinstance(args[0], Tensor) and isinstance(module, nn.Linear):
            input, storage = args[0].detach().requires_grad_(args[0].requires_grad), output.untyped_storage()
            place = int(output.storage_offset()), output.numel(), output.dtype, output._version
            how = autocast_of(output), in_compiled_function()
            self._ran.append(Ran(module, input, StorageWeakRef(storage), *place, *how))

    def layer_of(self, logits: Tensor) -> nn.Module | None:
        """Return the linear layer whose output became the logits by views, copies and scales alone."""
        return self._path(logits)[0]

    def _path(self, logits: Tensor) -> tuple[nn.Module | None, list[str]]:
        """Return this layer, and the names of the autograd nodes back to it or to what is none of these."""
        node: Any = logits.grad_fn
        names: list[str] = []
        while node is not None and node._sequence_nr() not in self._linears:
            names.append(node.name())
            if not node.name().startswith(_VIEWS):
                return None, names
            node = next((parent for parent, _ in node.next_functions if parent is not None), None)
        return None if node is None else self._linears[node._sequence_nr()], names

    def taken(self, tensor: Tensor) -> Ran | None:
        """Return the call whose output has the memory of a tensor."""
        if type(tensor) not in PLAIN:
            return None
        storage = StorageWeakRef(tensor.untyped_storage())
        return next((each for each in reversed(self._ran) if each.storage == storage), None)

    def unchanged(self, logits: Tensor) -> Ran:
        """Return the call of the head whose output these logits are: all of it, in order, in the same memory.

        Raises:
            NotTried: they are something else, or `linear_cross_entropy` could not replace the head's call.
        """
        ran = self.taken(logits)
        why = self._why_none(logits) if ran is None else _changed(ran, logits) or self._not_plain(ran)
        if ran is None or why is not None:
            raise NotTried(why)
        return ran

    def _why_none(self, logits: Tensor) -> str:
        layer, names = self._path(logits)
        if layer is None:
            head = self._declared
            if head is not None and type(head) is not nn.Linear:
                return _kind(head)
            if names and names[-1].startswith(_PRODUCTS):
                return "the head is a bare product, not a torch.nn.Linear that the model calls"
            made = f"; {names[-1]} lies between" if names else ""
            return f"the logits are not the output of a torch.nn.Linear{made}"
        if any(name.startswith(_SCALES) for name in names):
            return "a scale or softcap lies between the head and the loss"
        if any(name.startswith(_CHOICES) for name in names):
            return "the loss takes a copy of some rows of the logits, as in shifting them; shift the targets instead"
        if any(name.startswith(_CAST) for name in names):
            return f"the logits are cast to {str(logits.dtype).removeprefix('torch.')} in a copy"
        if any(name.startswith(_COPIES) for name in names):
            return "the loss takes a copy of the logits"
        return "the head's output is not known to be the logits"

    def _not_plain(self, ran: Ran) -> str | None:
        """Return why the head is more than a product with its parameters."""
        head = ran.module
        if type(head) is not nn.Linear or "forward" in vars(head):
            return _kind(head)
        hooks = [
            *head._forward_pre_hooks.values(), *head._forward_hooks.values(), *head._backward_pre_hooks.values(),
            *head._backward_hooks.values(), *modules._global_forward_pre_hooks.values(),
            *modules._global_forward_hooks.values(),
        ]  # fmt: skip
        if any(not getattr(hook, "__module__", "").startswith(_OF_THE_PROFILE) for hook in hooks):
            return "the head has hooks, which may change what it computes"
        if ran.compiled:
            return "the head is in a graph of torch.compile"
        for name, parameter in (("weight", head.weight), ("bias", head.bias)):
            if parameter is not None and type(parameter) not in PLAIN:
                return f"the head's {name} is a {type(parameter).__name__}, not a plain tensor"
        return "the model's parameters are sharded by FSDP" if _sharded(self._watch.roots) else None


def _changed(ran: Ran, logits: Tensor) -> str | None:
    """Return how logits in the memory of the head's output differ from it."""
    classes = ran.module.out_features
    if logits._version != ran.version:
        return "the logits are changed in place between the head and the loss"
    if logits.dim() != 2 or logits.shape[1] != classes:
        shape = "×".join(map(str, logits.shape))
        return f"the loss takes logits of shape {shape}; expected rows × {classes} classes"
    if logits.numel() != ran.elements:
        return f"the loss takes {logits.shape[0]} of the {ran.elements // classes} rows of the logits"
    if logits.dtype != ran.dtype or logits.storage_offset() != ran.offset or not logits.is_contiguous():
        return "the loss takes the logits in another order"
    if autocast_of(logits) not in (None, ran.autocast):
        return "autocast is on for the loss and not for the head"
    return None


def _kind(head: nn.Module) -> str:
    kind = type(head)
    patched = " whose forward is replaced" if kind is nn.Linear else f", {kind.__module__}"
    return f"the head is a {kind.__name__}{patched}; expected a plain torch.nn.Linear"


def _sharded(roots: list[nn.Module]) -> bool:
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, kinds) for root in roots for module in root.modules())
