"""Distillation's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss and its gradients come from one sweep over the logits. Elsewhere an op gives the
loss of each row and another the gradients, from the logits again, and the reduction is plain PyTorch.
"""

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
    differentiate,
    in_pytorch,
    one_sweep,
    plain,
    refuse_native,
    refuse_transforms,
    refuse_triton,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.ops import define
from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation import reference
from tlkernels.losses.distillation.call import Call, Options, rows_that_count

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
_DIFFERENTIABLE = ("fwd",)
NATIVE = Ops(
    *(define(f"distillation_{name}{schema}", fake, name in _DIFFERENTIABLE) for name, schema, fake in _SCHEMAS[:3])
)
_SERVED = native.served("distillation_fwd")
TRITON = Ops(
    *(
        triton.define(
            f"distillation_{name}_triton{schema}",
            fake,
            "tlkernels.losses.distillation.triton",
            function,
            name in (*_DIFFERENTIABLE, "bwd"),
        )
        for function, (name, schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _losses(args: Args) -> Tensor:
    student, teacher, *options = args[: 2 + len(Options._fields)]
    return reference.losses(student, teacher, Options(*options))


def _rule(ops: Ops) -> Rule:
    """The loss of each row."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(ops.backward(*upstreams, *args, *needs), needs)

    # Where there is a kernel of the second derivative, the gradients have a rule of their own.
    return Rule(2, backward, None if ops.second else _losses)


def _second_rule(ops: Ops) -> Rule:
    """The gradients for an upstream of each row, args being (upstream, student, teacher, *options, *needs)."""

    def backward(directions: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(ops.second(*directions, *args[:-2], *needs[1:]), needs)

    def gradients(args: Args) -> Tensors:
        upstream, *rest = args[:-2]
        return differentiate(_losses, [upstream], rest, args[-2:])

    return Rule(3, backward, gradients, results=(0, 1))


def _sweep(ops: Ops) -> Sweep:
    """The reduced loss; behind the options comes whether it is the mean."""

    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        loss, *grads = ops.step(*args, *needs)
        return loss, grads

    def reduced(args: Args) -> Tensor:
        *args, mean = args
        student, _, *options = args
        rows = apply(ops.forward, *args) if ops.second else _losses(args)
        return reduce(rows, rows_that_count(student, Options(*options)), "mean" if mean else "sum")

    return Sweep(2, step, reduced, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)
differentiable(TRITON.backward, _second_rule(TRITON), TRITON.second)
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}


def _run(ops: Ops, call: Call) -> Tensor:
    student, teacher, options, reduction = call
    mean = reduction in ("mean", "batchmean")
    args = student, teacher, *options
    differentiated = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    half = torch.float16 in (student.dtype, teacher.dtype)
    loss: Tensor
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction != "none" and plain(*args) and not (differentiated and half):
        return one_sweep(_SWEEPS[ops], *args, mean, dtype=call.dtype)
    loss = reduce(apply(ops.forward, *args), call.denominator(), "mean" if mean else reduction)
    return loss if loss.dtype == call.dtype else loss.to(call.dtype)


def refuse_options(options: Options) -> str | None:
    """Return why kernels cannot serve these options, or None."""
    if options.row_weight is not None and options.row_weight.requires_grad:
        return "it gives no gradient for row_weight, which requires one"
    return refuse_transforms()


def _refuse_native(call: Call) -> str | None:
    return refuse_native(*_tensors(call), served=_SERVED) or refuse_options(call.options)


def _refuse_triton(call: Call) -> str | None:
    return refuse_triton(*_tensors(call)) or refuse_options(call.options)


def _tensors(call: Call) -> Tensors:
    return call.student, call.teacher, call.options.target, call.options.row_weight


IMPLEMENTATIONS = (
    Implementation("native", _refuse_native, partial(_run, NATIVE)),
    Implementation("triton", _refuse_triton, partial(_run, TRITON), by_name_only=triton.INTERPRETED),
    Implementation("reference", lambda call: None, in_pytorch(reference.distillation)),
)
