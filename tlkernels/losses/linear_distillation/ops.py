"""Linear distillation's ops: schemas, fakes, autograd, and the list of implementations.

As in distillation, under plain autograd a reduced loss and its gradients come from one pass over chunks of rows.
Otherwise they come from two ops, of which the second computes the logits again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import flops, native
from tlkernels._core.autograd import (
    Args,
    Needs,
    Rule,
    Sweep,
    Tensors,
    apply,
    differentiable,
    one_sweep,
)
from tlkernels._core.dtypes import cast
from tlkernels._core.loss import Op, Rows, define_ops, gradients_by, implementations, in_one_sweep, take
from tlkernels._core.reduction import reduce
from tlkernels._core.triton import linear
from tlkernels.losses.distillation.call import Options, counted_rows
from tlkernels.losses.distillation.ops import OPTIONS, fake_gradient, fake_rows, refuse_options
from tlkernels.losses.linear_distillation import reference
from tlkernels.losses.linear_distillation.call import Arguments, Layers

_LAYERS = ", ".join(f"Tensor {s}_input, Tensor {s}_weight, Tensor? {s}_bias" for s in ("student", "teacher"))
_INPUT = f"{_LAYERS}, {OPTIONS}"
_INPUTS = len(Layers._fields)
_GRADIENTS = ", ".join(["Tensor"] * _INPUTS)


def _fake_rows(*args: Any) -> Tensor:
    layers, _ = take(Layers, args)
    return fake_rows(layers.student_input, layers.teacher_input)


def _fake_gradients(layers: Layers, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    # An absent bias has an empty gradient too, in the dtype of its layer's input.
    layers = layers._replace(
        student_bias=layers.student_input if layers.student_bias is None else layers.student_bias,
        teacher_bias=layers.teacher_input if layers.teacher_bias is None else layers.teacher_bias,
    )
    return tuple(fake_gradient(tensor, need) for tensor, need in zip(layers, needs, strict=True) if tensor is not None)


def _fake_backward(grad_rows: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layers, (*_, needs) = take(Layers, args)
    return _fake_gradients(layers, needs)


def _fake_step(*args: Any) -> tuple[Tensor, ...]:
    rows = _fake_rows(*args)
    return rows.new_empty(()), *_fake_backward(rows, *args)


def _flops(
    student_input: Any, student_weight: Any, teacher_input: Any, teacher_weight: Any, needs: Needs = (), **_: Any
) -> int:
    student = flops.of_product(student_input, student_weight, needs[:3])
    return student + flops.of_product(teacher_input, teacher_weight, needs[3:])


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Loss of each row."""
    backward: Any
    """The gradients, given that of each row's loss; one that is not needed is an empty tensor."""
    step: Any
    """The reduced loss and its gradients."""


NATIVE, TRITON = define_ops(
    Ops,
    "linear_distillation",
    {
        "forward": Op(f"fwd({_INPUT}) -> Tensor", _fake_rows, differentiable=True),
        "backward": Op(f"bwd(Tensor grad_rows, {_INPUT}, bool[6] needs) -> ({_GRADIENTS})", _fake_backward),
        "step": Op(f"step({_INPUT}, bool mean, bool[6] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
    },
    flops=_flops,
)


def _reference(args: Args) -> Tensor:
    layers, options = take(Layers, args)
    return reference.losses(layers, Options(*options))


def _rule(ops: Ops) -> Rule:
    """Return the rule for the losses of rows."""

    return Rule(_INPUTS, gradients_by(ops.backward), _reference)


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the reduced loss of (*layers, *options, mean)."""

    def recompute(args: Args) -> Tensor:
        *args, mean = args
        layers, options = take(Layers, args)
        counted = counted_rows(layers.student_input, Options(*options))
        return reduce(_reference(args), counted, "mean" if mean else "sum")

    return Sweep(_INPUTS, ops.step, recompute, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor:
    mean = call.reduction in ("mean", "batchmean")
    inputs = _autocast(call.layers)
    args = *inputs, *call.options
    if in_one_sweep(inputs, args, call.reduction):
        return one_sweep(sweep, *args, mean, dtype=call.dtype)
    rows = apply(ops.forward, *args)
    return cast(reduce(rows, call.denominator(), "mean" if mean else call.reduction), call.dtype)


def _autocast(layers: Layers) -> Tensors:
    """Return the layers in the dtype that autocast gives to the arguments of `F.linear`."""
    device = layers.student_input.device.type
    if not torch.is_autocast_enabled(device):
        return layers
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in layers]


def _tensors(call: Arguments) -> Tensors:
    return *call.layers, call.options.target, call.options.row_weight


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.linear_distillation,
    served=native.served("linear_distillation_fwd"),
    tensors=_tensors,
    refuse=lambda call: refuse_options(call.options),
    strategy=lambda call: linear.describe([call.layers.student, call.layers.teacher]),
    rows=Rows(-1, ("student_weight", "student_bias", "teacher_weight", "teacher_bias")),
)
