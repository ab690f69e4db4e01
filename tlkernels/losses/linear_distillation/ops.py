"""Linear distillation's ops: schemas, fakes, autograd, and the list of implementations.

As in distillation, under plain autograd a reduced loss and its gradients come from one pass over chunks of rows, and
elsewhere from two ops, of which the second computes the logits again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import native, triton
from tlkernels._core.autograd import (
    Args,
    Needs,
    Rule,
    Sweep,
    Tensors,
    apply,
    differentiable,
    in_pytorch,
    one_sweep,
    plain,
    refuse_native,
    refuse_triton,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.ops import define
from tlkernels._core.reduction import reduce
from tlkernels._core.triton import linear
from tlkernels.losses.distillation.call import Options, rows_that_count
from tlkernels.losses.distillation.ops import OPTIONS, fake_gradient, fake_rows, refuse_options
from tlkernels.losses.linear_distillation import reference
from tlkernels.losses.linear_distillation.call import Call, Layers

_LAYERS = ", ".join(f"Tensor {s}_input, Tensor {s}_weight, Tensor? {s}_bias" for s in ("student", "teacher"))
_ARGUMENTS = f"{_LAYERS}, {OPTIONS}"
_GRADIENTS = ", ".join(["Tensor"] * len(Layers._fields))


def _fake_gradients(layers: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    # An absent bias needs no gradient; its place is as empty as any other's, in the dtype of its layer's input.
    present = [layers[i - i % 3] if tensor is None else tensor for i, tensor in enumerate(layers)]
    return tuple(fake_gradient(tensor, need) for tensor, need in zip(present, needs, strict=True) if tensor is not None)


def _fake_step(*args: Any) -> tuple[Tensor, ...]:
    loss = fake_rows(args[0], args[3]).new_empty(())
    return loss, *_fake_gradients(args[:6], args[-1])


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The loss of each row."""
    backward: Any
    """The gradients for an upstream of each row."""
    step: Any
    """The reduced loss with its gradients."""


_SCHEMAS: tuple[tuple[str, Any], ...] = (
    (f"fwd{{}}({_ARGUMENTS}) -> Tensor", lambda *args: fake_rows(args[0], args[3])),
    (
        f"bwd{{}}(Tensor grad_rows, {_ARGUMENTS}, bool[6] needs) -> ({_GRADIENTS})",
        lambda grad_rows, *args: _fake_gradients(args[:6], args[-1]),
    ),
    (f"step{{}}({_ARGUMENTS}, bool mean, bool[6] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
)
_NAME = "linear_distillation_{}"
NATIVE = Ops(
    *(
        define(_NAME.format(schema.format("")), fake, name == "forward")
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)
_SERVED = native.served("linear_distillation_fwd")
TRITON = Ops(
    *(
        triton.define(
            _NAME.format(schema.format("_triton")),
            fake,
            "tlkernels.losses.linear_distillation.triton",
            name,
            name == "forward",
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


_INPUTS = len(Layers._fields)


def _losses(args: Args) -> Tensor:
    return reference.losses(Layers(*args[:_INPUTS]), Options(*args[_INPUTS:]))


def _rule(ops: Ops) -> Rule:
    """The loss of each row."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(ops.backward(*upstreams, *args, needs), needs)

    return Rule(_INPUTS, backward, _losses)


def _sweep(ops: Ops) -> Sweep:
    """The reduced loss; behind the options comes whether it is the mean."""

    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        loss, *grads = ops.step(*args, needs)
        return loss, grads

    def reduced(args: Args) -> Tensor:
        *args, mean = args
        counted = rows_that_count(args[0], Options(*args[_INPUTS:]))
        return reduce(_losses(args), counted, "mean" if mean else "sum")

    return Sweep(_INPUTS, step, reduced, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}


def _run(ops: Ops, call: Call) -> Tensor:
    layers, options, reduction = call
    mean = reduction in ("mean", "batchmean")
    tensors: Tensors = layers
    device = layers.student_input.device.type
    if torch.is_autocast_enabled(device):  # as it does with F.linear's arguments
        dtype = torch.get_autocast_dtype(device)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in layers]
    present = [tensor for tensor in tensors if tensor is not None]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
    half = any(tensor.dtype == torch.float16 for tensor in present)
    args = *tensors, *options
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction != "none" and plain(*args) and not (differentiated and half):
        return one_sweep(_SWEEPS[ops], *args, mean, dtype=call.dtype)
    loss = reduce(apply(ops.forward, *args), call.denominator(), "mean" if mean else reduction)
    return loss if loss.dtype == call.dtype else loss.to(call.dtype)


def _tensors(call: Call) -> Tensors:
    return *call.layers, call.options.target, call.options.row_weight


IMPLEMENTATIONS = (
    Implementation(
        "native",
        lambda call: refuse_native(*_tensors(call), served=_SERVED) or refuse_options(call.options),
        partial(_run, NATIVE),
    ),
    Implementation(
        "triton",
        lambda call: refuse_triton(*_tensors(call)) or refuse_options(call.options),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
        how=lambda call: linear.describe([call.layers[:3], call.layers[3:]]),
    ),
    Implementation("reference", lambda call: None, in_pytorch(reference.linear_distillation)),
)
