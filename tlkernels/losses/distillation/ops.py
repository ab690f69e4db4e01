"""Distillation's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss and its gradients come from one sweep over the logits. Elsewhere an op gives the
loss of each row and another the gradients, from the logits again, and the reduction is plain PyTorch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core import native, triton
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
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.library import define
from tlkernels._core.reduction import reduce, sum_in_order
from tlkernels.losses.distillation import reference
from tlkernels.losses.distillation.call import Call, Options

OPTIONS = (
    "Tensor? target, Tensor? row_weight, float temperature, str divergence, float beta, float hard_weight,"
    " int ignore_index, float label_smoothing"
)
_LOGITS = f"Tensor student, Tensor teacher, {OPTIONS}"
_NEEDS = "bool needs_student, bool needs_teacher"


def fake_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """Return a loss per row."""
    return student.new_empty(student.shape[:-1], dtype=compute_dtype(student, teacher))


def fake_gradient(tensor: Tensor, needed: bool) -> Tensor:
    """Return a contiguous gradient; an empty one where it is not needed."""
    return tensor.new_empty(tensor.shape if needed else (0,))


def _fake_backward(grad_rows: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return fake_gradient(student, rest[-2]), fake_gradient(teacher, rest[-1])


def _fake_step(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = fake_rows(student, teacher).new_empty(())
    return loss, fake_gradient(student, rest[-2]), fake_gradient(teacher, rest[-1])


def _fake_second(
    v_student: Any, v_teacher: Any, grad_rows: Tensor, student: Tensor, teacher: Tensor, *rest: Any
) -> Any:
    return fake_rows(student, teacher), *_fake_backward(grad_rows, student, teacher, *rest)


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The loss of each row."""
    backward: Any
    """The gradients for an upstream of each."""
    step: Any
    """The reduced loss with its gradients."""
    second: Any = None
    """The derivatives of <v, gradients> by grad_rows and the logits; nothing where the reference serves."""


_SCHEMAS: tuple[tuple[str, str, Any], ...] = (
    ("fwd", f"({_LOGITS}) -> Tensor", lambda student, teacher, *_: fake_rows(student, teacher)),
    ("bwd", f"(Tensor grad_rows, {_LOGITS}, {_NEEDS}) -> (Tensor, Tensor)", _fake_backward),
    ("step", f"({_LOGITS}, bool mean, {_NEEDS}) -> (Tensor loss, Tensor, Tensor)", _fake_step),
    (
        "second",
        f"(Tensor? v_student, Tensor? v_teacher, Tensor grad_rows, {_LOGITS}, {_NEEDS})"
        " -> (Tensor by_rows, Tensor by_student, Tensor by_teacher)",
        _fake_second,
    ),
)
NATIVE = Ops(*(define(f"distillation_{name}{schema}", fake) for name, schema, fake in _SCHEMAS[:3]))
_SERVED = native.served("distillation_fwd")
TRITON = Ops(
    *(
        triton.define(f"distillation_{name}_triton{schema}", fake, "tlkernels.losses.distillation.triton", function)
        for function, (name, schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _losses(logits: Tensors, options: Options) -> Tensor:
    student, teacher = logits
    assert student is not None
    assert teacher is not None
    return reference.losses(student, teacher, options)


class _Rows(Function):
    """(student, teacher, options, ops) -> the loss of each row."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, options: Options, ops: Ops) -> Tensor:
        rows: Tensor = ops.forward(student, teacher, *options)
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        student, teacher, options, ctx.ops = inputs
        ctx.save_for_backward(student, teacher, *options[:2])
        ctx.numbers = options[2:]

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> Any:
        student, teacher, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        options = Options(*rest, *ctx.numbers)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.ops.second is not None:
                return *_Gradients.apply(grad_rows, student, teacher, options, ctx.ops, needs), None, None  # type: ignore[no-untyped-call]
            return *differentiate(lambda t: _losses(t, options), (student, teacher), needs, grad_rows), None, None
        return *where_needed(ctx.ops.backward(grad_rows, student, teacher, *options, *needs), needs), None, None


class _Gradients(Function):
    """(grad_rows, student, teacher, options, ops, which are needed) -> the gradients, differentiable to any order."""

    @staticmethod
    def forward(
        grad_rows: Tensor, student: Tensor, teacher: Tensor, options: Options, ops: Ops, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        return tuple(where_needed(ops.backward(grad_rows, student, teacher, *options, *needs), needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_rows, student, teacher, options, ctx.ops, ctx.needs = inputs
        ctx.save_for_backward(grad_rows, student, teacher, *options[:2])
        ctx.numbers = options[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:
        grad_rows, student, teacher, *rest = ctx.saved_tensors
        options = Options(*rest, *ctx.numbers)
        needs = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            found = ctx.ops.second(*directions, grad_rows, student, teacher, *options, *needs[1:])
            return *where_needed(found, needs), None, None, None

        def gradients(tensors: Tensors) -> Tensor:
            upstream, *logits = tensors
            assert upstream is not None
            grads = differentiate(lambda t: _losses(t, options), logits, ctx.needs, upstream)
            pairs = zip(grads, directions, strict=True)
            return sum_in_order(
                torch.stack([(grad * v).sum() for grad, v in pairs if grad is not None and v is not None])
            )

        one = torch.ones((), dtype=compute_dtype(student, teacher), device=student.device)
        return *differentiate(gradients, (grad_rows, student, teacher), needs, one), None, None, None


def _run(ops: Ops, call: Call) -> Tensor:
    student, teacher, options, reduction = call
    mean = reduction in ("mean", "batchmean")
    differentiable = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    half = torch.float16 in (student.dtype, teacher.dtype)
    loss: Tensor
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction == "none" or not plain(student, teacher) or (differentiable and half):
        rows: Tensor = _Rows.apply(student, teacher, options, ops)  # type: ignore[no-untyped-call]
        loss = reduce(rows, call.denominator(), "mean" if mean else reduction)
    elif differentiable:

        def run(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            loss, *grads = ops.step(*tensors, *options, mean, *needs)
            return loss, where_needed(grads, needs)

        def again(tensors: Tensors) -> Tensor:
            rows = _Rows.apply(*tensors, options, ops) if ops.second else _losses(tensors, options)  # type: ignore[no-untyped-call]
            return reduce(rows, call.denominator(), "mean" if mean else reduction)

        loss = one_sweep(run, again, student, teacher, dtype=call.dtype, by_triton=ops is TRITON)
    else:
        loss = ops.step(student, teacher, *options, mean, False, False)[0]
    return loss if loss.dtype == call.dtype else loss.to(call.dtype)


def refuse_row_weight(options: Options) -> str | None:
    """Return why kernels cannot serve these options, or None."""
    if options.row_weight is not None and options.row_weight.requires_grad:
        return "it gives no gradient for row_weight, which requires one"
    return None


def _refuse_native(call: Call) -> str | None:
    return refuse_native(call.student, call.teacher, served=_SERVED) or refuse_row_weight(call.options)


def _refuse_triton(call: Call) -> str | None:
    return refuse_triton(call.student, call.teacher) or refuse_row_weight(call.options)


IMPLEMENTATIONS = (
    Implementation("native", _refuse_native, partial(_run, NATIVE)),
    Implementation("triton", _refuse_triton, partial(_run, TRITON), by_name_only=triton.INTERPRETED),
    Implementation("reference", lambda call: None, reference.distillation),
)
