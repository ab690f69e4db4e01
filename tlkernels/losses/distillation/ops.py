"""Distillation's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss and its gradients come from one sweep over the logits. Otherwise one op computes the
loss of each row, another the gradients from the logits again, and the reduction is plain PyTorch.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import native
from tlkernels._core.autograd import (
    Args,
    Needs,
    Rule,
    Sweep,
    Tensors,
    apply,
    differentiable,
    differentiate,
    one_sweep,
    refuse_transforms,
    where_needed,
)
from tlkernels._core.dtypes import cast, compute_dtype
from tlkernels._core.loss import Op, Rows, define_ops, gradients_by, implementations, in_one_sweep, take
from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation import reference
from tlkernels.losses.distillation.call import Arguments, Options, counted_rows

OPTIONS = (
    "Tensor? target, Tensor? row_weight, float temperature, str divergence, float beta, float hard_weight,"
    " int ignore_index, float label_smoothing, float? student_softcap, float? teacher_softcap"
)
_INPUT = f"Tensor student, Tensor teacher, {OPTIONS}"


def fake_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """Return a loss per row."""
    return student.new_empty(student.shape[:-1], dtype=compute_dtype(student, teacher))


def fake_gradient(tensor: Tensor, needed: bool) -> Tensor:
    """Return a contiguous gradient, or an empty tensor where it is not needed."""
    return tensor.new_empty(tensor.shape if needed else (0,))


def _fake_backward(grad_rows: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, (needs_student, needs_teacher) = rest
    return fake_gradient(student, needs_student), fake_gradient(teacher, needs_teacher)


def _fake_step(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = fake_rows(student, teacher)
    return rows.new_empty(()), *_fake_backward(rows, student, teacher, *rest)


def _fake_second(v_student: Any, v_teacher: Any, *args: Any) -> tuple[Tensor, ...]:
    grad_rows, *_ = args
    return torch.empty_like(grad_rows), *_fake_backward(*args)


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Loss of each row."""
    backward: Any
    """The gradients, given that of each row's loss; one that is not needed is an empty tensor."""
    step: Any
    """The reduced loss and its gradients."""
    second: Any = None
    """The derivatives of <v, gradients> by grad_rows, student and teacher; without it the reference computes them."""


_BACKWARD = f"bwd(Tensor grad_rows, {_INPUT}, bool[2] needs) -> (Tensor, Tensor)"
NATIVE, TRITON = define_ops(
    Ops,
    "distillation",
    {
        "forward": Op(f"fwd({_INPUT}) -> Tensor", lambda s, t, *_: fake_rows(s, t), differentiable=True),
        "step": Op(f"step({_INPUT}, bool mean, bool[2] needs) -> (Tensor loss, Tensor, Tensor)", _fake_step),
    },
    only_native={"backward": Op(_BACKWARD, _fake_backward)},
    only_triton={
        "backward": Op(_BACKWARD, _fake_backward, differentiable=True),
        "second": Op(
            f"second(Tensor? v_student, Tensor? v_teacher, Tensor grad_rows, {_INPUT}, bool[2] needs)"
            " -> (Tensor by_rows, Tensor by_student, Tensor by_teacher)",
            _fake_second,
        ),
    },
)


def _reference(args: Args) -> Tensor:
    student, teacher, *rest = args
    options, _ = take(Options, rest)
    return reference.losses(student, teacher, options)


def _rule(ops: Ops) -> Rule:
    """Return the rule for the losses of rows."""

    # Where the second derivative has a kernel, the gradients have a rule of their own.
    return Rule(2, gradients_by(ops.backward), None if ops.second else _reference)


def _gradient_rule(ops: Ops) -> Rule:
    """Return the rule for the gradients, functions of (grad_rows, student, teacher, *options, needs)."""

    def backward(directions: Tensors, args: Args, needs: Needs) -> Tensors:
        *args, _ = args
        _, *needs_logits = needs
        return where_needed(ops.second(*directions, *args, needs_logits), needs)

    def gradients(args: Args) -> Tensors:
        grad_rows, *args, needs = args
        return differentiate(_reference, [grad_rows], args, needs)

    return Rule(3, backward, gradients, results=(0, 1))


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the reduced loss of (student, teacher, *options, mean)."""

    def recompute(args: Args) -> Tensor:
        *args, mean = args
        student, _, *options = args
        rows = apply(ops.forward, *args) if ops.second else _reference(args)
        return reduce(rows, counted_rows(student, Options(*options)), "mean" if mean else "sum")

    return Sweep(2, ops.step, recompute, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)
differentiable(TRITON.backward, _gradient_rule(TRITON), TRITON.second)


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor:
    inputs, mean = (call.student, call.teacher), call.reduction in ("mean", "batchmean")
    args = *inputs, *call.options
    if in_one_sweep(inputs, args, call.reduction):
        return one_sweep(sweep, *args, mean, dtype=call.dtype)
    rows = apply(ops.forward, *args)
    return cast(reduce(rows, call.denominator(), "mean" if mean else call.reduction), call.dtype)


def refuse_options(options: Options) -> str | None:
    """Return why kernels cannot serve these options, or None."""
    if options.row_weight is not None and options.row_weight.requires_grad:
        return "computes no gradient for row_weight, which requires one"
    return refuse_transforms()


def _tensors(call: Arguments) -> Tensors:
    return call.student, call.teacher, call.options.target, call.options.row_weight


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.distillation,
    served=native.served("distillation_fwd"),
    tensors=_tensors,
    refuse=lambda call: refuse_options(call.options),
    rows=Rows(-1),
)
