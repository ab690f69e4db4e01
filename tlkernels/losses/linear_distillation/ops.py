"""Linear distillation's ops: schemas, fakes, autograd, and the list of implementations.

As in distillation, under plain autograd a reduced loss and its gradients come from one pass over chunks of rows, and
elsewhere from two ops, of which the second computes the logits again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core import linear, native, triton
from tlkernels._core.autograd import (
    Tensors,
    differentiate,
    one_sweep,
    plain,
    refuse_native,
    refuse_triton,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.library import define
from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation.call import Options
from tlkernels.losses.distillation.ops import OPTIONS, fake_gradient, fake_rows, refuse_row_weight
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
NATIVE = Ops(*(define(_NAME.format(schema.format("")), fake) for schema, fake in _SCHEMAS))
_SERVED = native.served("linear_distillation_fwd")
TRITON = Ops(
    *(
        triton.define(_NAME.format(schema.format("_triton")), fake, "tlkernels.losses.linear_distillation.triton", name)
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _losses(tensors: Tensors, options: Options) -> Tensor:
    return reference.losses(Layers(*tensors), options)  # type: ignore[arg-type]


class _Rows(Function):
    """(ops, options, layers...) -> the loss of each row."""

    @staticmethod
    def forward(ops: Ops, options: Options, *layers: Tensor | None) -> Tensor:
        rows: Tensor = ops.forward(*layers, *options)
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.ops, options, *layers = inputs
        ctx.save_for_backward(*layers, *options[:2])
        ctx.numbers = options[2:]

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> Any:
        *layers, target, row_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        options = Options(target, row_weight, *ctx.numbers)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, *differentiate(lambda t: _losses(t, options), layers, needs, grad_rows)
        return None, None, *where_needed(ctx.ops.backward(grad_rows, *layers, *options, needs), needs)


def _run(ops: Ops, call: Call) -> Tensor:
    layers, options, reduction = call
    mean = reduction in ("mean", "batchmean")
    tensors: Tensors = layers
    device = layers.student_input.device.type
    if torch.is_autocast_enabled(device):  # as it does with F.linear's arguments
        dtype = torch.get_autocast_dtype(device)
        tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in layers]
    present = [tensor for tensor in tensors if tensor is not None]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
    half = any(tensor.dtype == torch.float16 for tensor in present)
    loss: Tensor
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction == "none" or not plain(*tensors) or (differentiable and half):
        rows: Tensor = _Rows.apply(ops, options, *tensors)  # type: ignore[no-untyped-call]
        loss = reduce(rows, call.denominator(), "mean" if mean else reduction)
    elif differentiable:

        def run(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            loss, *grads = ops.step(*tensors, *options, mean, needs)
            return loss, where_needed(grads, needs)

        def again(tensors: Tensors) -> Tensor:
            rows = _losses(tensors, options)
            return reduce(rows, call.denominator(), "mean" if mean else reduction)

        loss = one_sweep(run, again, *tensors, dtype=call.dtype, by_triton=ops is TRITON)
    else:
        loss = ops.step(*tensors, *options, mean, [False] * len(layers))[0]
    return loss if loss.dtype == call.dtype else loss.to(call.dtype)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        lambda call: refuse_native(*call.layers, served=_SERVED) or refuse_row_weight(call.options),
        partial(_run, NATIVE),
    ),
    Implementation(
        "triton",
        lambda call: refuse_triton(*call.layers) or refuse_row_weight(call.options),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
        how=lambda call: linear.describe([call.layers[:3], call.layers[3:]]),
    ),
    Implementation("reference", lambda call: None, reference.linear_distillation),
)
