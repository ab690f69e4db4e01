"""The ops of mse and rmse: schemas, fakes, autograd, and the list of implementations.

All tensors of an op have one shape and dtype; broadcasting, promotion and the root are plain PyTorch around it. Under
plain autograd a reduced loss takes its gradients along.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import triton
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
    refuse_transforms,
    refuse_triton,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.ops import define
from tlkernels.losses.mse import reference
from tlkernels.losses.mse.call import Call

_TENSORS = "Tensor input, Tensor target, Tensor? weight"
_NEEDS = "bool needs_input, bool needs_target"


def _fake_gradients(input: Tensor, target: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    found = (torch.empty_like(t) if need else t.new_empty((0,)) for t, need in zip((input, target), needs, strict=True))
    return tuple(found)


def _fake_forward(input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input, dtype=compute_dtype(input))


def _fake_total(input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((), dtype=compute_dtype(input))


def _fake_backward(grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *needs: bool) -> Any:
    return _fake_gradients(input, target, *needs)


def _fake_step(input: Tensor, target: Tensor, *rest: Any) -> Any:
    return _fake_total(input), *_fake_gradients(input, target, *rest[-2:])


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The squared errors, times the weights."""
    total: Any
    """Their sum."""
    backward: Any
    """The gradients for `grad` of the sum, 0-d, or of each error; one that is not needed has no elements."""
    step: Any
    """The mean with its gradients."""


_SCHEMAS: tuple[tuple[str, Any], ...] = (
    (f"mse_fwd{{}}({_TENSORS}) -> Tensor", _fake_forward),
    (f"mse_sum{{}}({_TENSORS}) -> Tensor", _fake_total),
    (f"mse_bwd{{}}(Tensor grad, {_TENSORS}, {_NEEDS}) -> (Tensor grad_input, Tensor grad_target)", _fake_backward),
    (
        f"mse_step{{}}({_TENSORS}, {{}}, {_NEEDS}) -> (Tensor loss, Tensor grad_input, Tensor grad_target)",
        _fake_step,
    ),
)
# What divides the sum: a number; on a GPU, where the host does not read the sum of the weights, a factor and a tensor.
_DIFFERENTIABLE = ("forward", "total")
NATIVE = Ops(
    *(
        define(schema.format("", "float denominator"), fake, name in _DIFFERENTIABLE)
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)
TRITON = Ops(
    *(
        triton.define(
            schema.format("_triton", "Tensor? divisor, float factor"),
            fake,
            "tlkernels.losses.mse.triton",
            name,
            name in _DIFFERENTIABLE,
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _squared(args: Args, reduction: str) -> Tensor:
    input, target, weight = args[:3]
    return reference.squared(Call(input, target, weight, reduction, None))


def _rule(ops: Ops, reduction: str) -> Rule:
    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(ops.backward(*upstreams, *args, *needs), needs)

    return Rule(2, backward, partial(_squared, reduction=reduction))


def _sweep(ops: Ops) -> Sweep:
    """The sum divided, as `ops.step` is told to by the arguments behind the weight."""

    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        loss, *grads = ops.step(*args, *needs)
        return loss, grads

    def divided(args: Args) -> Tensor:
        loss, (divisor, *factor) = _squared(args, "sum"), args[3:]
        loss = loss * factor[0] if factor else loss
        return loss if divisor is None else loss / divisor

    return Sweep(2, step, divided, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, "none"), _ops.backward)
    differentiable(_ops.total, _rule(_ops, "sum"))
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}


def _divided(ops: Ops, call: Call) -> tuple[Any, ...]:
    """Return what `ops.step` takes to divide the sum by."""
    denominator = call.denominator() if call.reduction == "mean" else 1.0
    if ops is NATIVE:
        return (float(denominator),)
    if isinstance(denominator, Tensor):  # on a GPU the host does not read it
        return denominator, 1.0
    return None, 1 / denominator if denominator else float("inf")


def _run(ops: Ops, call: Call) -> Tensor:
    input, target, *rest = call.expanded(call.common)
    tensors = input, target, rest[0] if rest else None
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if call.reduction != "none" and call.common != torch.float16 and plain(*tensors):
        return call.finished(one_sweep(_SWEEPS[ops], *tensors, *_divided(ops, call)))
    errors: Tensor = apply(ops.forward if call.reduction == "none" else ops.total, *tensors)
    return call.finished(errors / call.denominator() if call.reduction == "mean" else errors)


def _refuse(call: Call) -> str | None:
    if call.weight is not None and call.weight.requires_grad:
        return "it gives no gradient for weight, which requires one"
    return refuse_transforms()


IMPLEMENTATIONS = (
    Implementation("native", lambda call: _refuse(call) or refuse_native(*call[:3]), partial(_run, NATIVE)),
    Implementation(
        "triton",
        lambda call: _refuse(call) or refuse_triton(*call[:3]),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
    ),
    Implementation("reference", lambda call: None, in_pytorch(reference.mse)),
)
