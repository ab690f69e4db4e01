"""torchtitan: its cross entropy from logits, and from hidden states without logits, for `Trainer.Config.loss`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import spmd_types as spmd
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map
from torchtitan.components import loss as theirs
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.protocols.module import Module

import tlkernels as tlk
from tlkernels.integrations.float32_loss import float32_loss

_REDISTRIBUTED = f"{Module.parallelize.__qualname__}.<locals>."  # of the forward that parallelize() installs


class CrossEntropyLoss(theirs.CrossEntropyLoss):  # type: ignore[misc]
    """torchtitan's cross entropy from logits, summed over the tokens; a subclass with the same `Config`.

    Replaces::

        from torchtitan.components.loss import CrossEntropyLoss

    It takes logits (B, L, C) and labels (B, L), of which -100 is ignored, and returns the sum divided by
    `global_valid_tokens`, and no metrics. The sum is float32 (float64 for float64 logits); the logits are read in their
    own dtype, without a float32 copy. Classes may be split over the mesh axis "tp". It also serves as the inner loss of
    torchtitan's own `ChunkedLossWrapper`.

    Raises:
        ValueError: placements or sizes of logits and labels are not what torchtitan's loss takes.
        NotImplementedError: `debug.spmd_typechecking` is on.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(theirs.CrossEntropyLoss.Config):  # type: ignore[misc]
        """`global_vocab_size`, needed if the "spmd_types" backend splits the classes."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = cross_entropy_loss
        self._maybe_compile(compile_config)
        self.global_vocab_size = config.global_vocab_size


class LinearCrossEntropyLoss(theirs.ChunkedLossWrapper):  # type: ignore[misc]
    """The same loss from hidden states: the model's `lm_head` and the cross entropy as one, without the logits.

    Replaces::

        ChunkedLossWrapper.Config(num_chunks=8, loss_fn=CrossEntropyLoss.Config(...))

    The trainer hands it `lm_head` and takes the layer out of the model's forward, as for `ChunkedLossWrapper`, its base
    class. It takes hidden states (B, L, D); L need not be divisible by a number of chunks. `lm_head` is called once, so
    FSDP gathers its weight and reduces its gradient as in any forward and backward.

    Raises:
        NotImplementedError: `lm_head` is not a plain linear layer (LoRA, quantised, forward hooks), or is split by
            tensor parallelism; `debug.spmd_typechecking` is on.
        ValueError, TypeError: `global_vocab_size` is not the layer's; there are other inputs than positions.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(theirs.BaseLoss.Config):  # type: ignore[misc]
        """`global_vocab_size`: checked against the layer if given."""

        global_vocab_size: int | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = _linear_sum
        self._maybe_compile(compile_config)
        self.global_vocab_size = config.global_vocab_size
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Take the layer; the trainer calls it after the model is built."""
        _check_head(lm_head, self.global_vocab_size)
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the tokens, divided by `global_valid_tokens` if given, and no metrics."""
        if others := loss_inputs.keys() - {"positions"}:  # the trainer hands every loss the positions
            raise TypeError(f"{', '.join(sorted(others))}: expected no other inputs of the loss")
        head: Any = self.lm_head
        _check_head(head, self.global_vocab_size)
        _refuse_typechecking()
        if isinstance(pred, DTensor) or isinstance(labels, DTensor) or _split_classes() is not None:
            raise NotImplementedError(_SPLIT)

        def instead(hidden: Tensor) -> Tensor:
            if isinstance(head.weight, DTensor) or head.weight.shape != (head.out_features, head.in_features):
                raise NotImplementedError(_SPLIT)
            return self.fn(hidden, head.weight, head.bias, labels)

        # The call goes through the module, so FSDP's hooks gather the weight and see the loss as its output.
        own = {name: value for name, value in vars(head).items() if name == "forward"}
        vars(head)["forward"] = instead
        try:
            total = head(pred)
        finally:
            del vars(head)["forward"]
            vars(head).update(own)
        return total if global_valid_tokens is None else total / global_valid_tokens, {}


_SPLIT = (
    "lm_head under tensor parallelism, or hidden states or labels as DTensors: expected the whole layer on each rank; "
    "use torchtitan's ChunkedLossWrapper.Config(loss_fn=...) around this module's CrossEntropyLoss.Config(...)"
)


def cross_entropy_loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """Return the summed cross entropy; arguments and placements as of torchtitan's function of this name."""
    _refuse_typechecking()
    if isinstance(pred, DTensor):
        return _of_dtensors(pred, labels)
    if isinstance(labels, DTensor):
        raise ValueError("labels: expected a plain tensor as the logits, got a DTensor")
    group, expected = _split_classes(), global_vocab_size
    if group is not None:
        if global_vocab_size is None:
            raise ValueError("global_vocab_size: expected the number of all classes, which are split over 'tp'")
        share = -(-global_vocab_size // dist.get_world_size(group))
        expected = min(share, global_vocab_size - share * dist.get_rank(group))
    if expected not in (None, pred.shape[-1]):
        raise ValueError(f"global_vocab_size: expected {expected} classes on this rank, got {tuple(pred.shape)}")
    return _sum(pred, labels, group)


def _split_classes() -> Any:
    """Return the group over which the "spmd_types" backend splits the classes, or None."""
    split = get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1
    return current_spmd_mesh().get_group("tp") if split else None


def _of_dtensors(pred: DTensor, labels: Tensor) -> Tensor:
    mesh, classes = pred.device_mesh, pred.ndim - 1
    split = [axis for axis, placement in enumerate(pred.placements) if placement.is_shard(classes)]
    if len(split) > 1:
        raise ValueError(f"pred: expected its classes split over one axis of the mesh, got {pred.placements}")
    group = mesh.get_group(split[0]) if split else None
    if not isinstance(labels, DTensor):
        if tuple(pred.placements) != (Shard(classes),):
            raise ValueError(f"pred: expected classes split over the mesh, for plain labels, got {pred.placements}")
        return _sum(pred.to_local(), labels, group)
    rows = tuple(Replicate() if axis in split else placement for axis, placement in enumerate(pred.placements))
    if labels.placements != rows:
        raise ValueError(f"labels: expected placements {rows}, got {labels.placements}")
    sums = [Partial() if placement.is_shard() else Replicate() for placement in rows]
    where = (pred.placements, rows)
    how: Any = {"in_placements": where, "in_grad_placements": where, "out_placements": sums, "device_mesh": mesh}
    return local_map(partial(_sum, group=group), **how)(pred, labels)  # type: ignore[no-any-return]


def _sum(pred: Tensor, labels: Tensor, group: Any) -> Tensor:
    rows = pred.flatten(0, 1), labels.flatten(0, 1)
    with float32_loss(pred):
        return tlk.cross_entropy(*rows, ignore_index=theirs.IGNORE_INDEX, reduction="sum", vocab_group=group)


def _linear_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    how: Any = {"linear_bias": bias, "ignore_index": theirs.IGNORE_INDEX, "reduction": "sum"}
    with float32_loss(hidden):
        return tlk.linear_cross_entropy(hidden, weight, labels, **how)


def _check_head(head: Any, vocab_size: int | None) -> None:
    if head is None:
        raise ValueError("lm_head: expected set_lm_head(layer) before the first call")
    name, forward = f"lm_head ({type(head).__module__}.{type(head).__qualname__})", vars(head).get("forward")
    replaced = forward is not None and not getattr(forward, "__qualname__", "").startswith(_REDISTRIBUTED)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or replaced:
        raise NotImplementedError(f"{name}: expected a linear layer whose forward is torch.nn.Linear's")
    hooks = {**head._forward_hooks, **head._forward_pre_hooks}
    if hooks and not isinstance(head, FSDPModule):
        raise NotImplementedError(f"{name}: expected no forward hooks, which would get the loss, got {len(hooks)}")
    if vocab_size not in (None, head.out_features):
        raise ValueError(f"global_vocab_size: expected the layer's {head.out_features} classes, got {vocab_size}")


def _refuse_typechecking() -> None:
    if spmd.is_type_checking():
        raise NotImplementedError("debug.spmd_typechecking: expected False, as the kernels have no rules for it")
