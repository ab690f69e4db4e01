"""The ops of mse and rmse: schemas, fakes, autograd, and the list of implementations.

All tensors of an op have one shape and dtype; broadcasting, promotion and the root are plain PyTorch. Under plain
autograd a reduced loss is computed along with its gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import native
from tlkernels._core.autograd import (
    Args,
    Rule,
    Sweep,
    apply,
    differentiable,
    one_sweep,
    refuse_transforms,
)
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.loss import Op, Rows, define_ops, gradients_by, implementations, in_one_sweep
from tlkernels.losses.mse import reference
from tlkernels.losses.mse.call import Arguments

_INPUT = "Tensor input, Tensor target, Tensor? weight"
_GRADIENTS = "Tensor grad_input, Tensor grad_target"


def _fake_total(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((), dtype=compute_dtype(input))


def _fake_backward(grad: Tensor, input: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, (needs_input, needs_target) = rest
    return (
        torch.empty_like(input) if needs_input else input.new_empty((0,)),
        torch.empty_like(target) if needs_target else target.new_empty((0,)),
    )


def _fake_step(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss = _fake_total(input)
    return loss, *_fake_backward(loss, input, *rest)


def _step(divided: str) -> Op:
    return Op(f"step({_INPUT}, {divided}, bool[2] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step)


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The squared errors, times the weights."""
    total: Any
    """Their sum."""
    backward: Any
    """The gradients, given `grad` of the sum, 0-d, or of each error; one that is not needed is an empty tensor."""
    step: Any
    """The sum divided, and its gradients."""


NATIVE, TRITON = define_ops(
    Ops,
    "mse",
    {
        "forward": Op(
            f"fwd({_INPUT}) -> Tensor",
            lambda input, *_: torch.empty_like(input, dtype=compute_dtype(input)),
            differentiable=True,
        ),
        "total": Op(f"sum({_INPUT}) -> Tensor", _fake_total, differentiable=True),
        "backward": Op(f"bwd(Tensor grad, {_INPUT}, bool[2] needs) -> ({_GRADIENTS})", _fake_backward),
    },
    only_native={"step": _step("float denominator")},
    # On a GPU the host does not read the sum of the weights.
    only_triton={"step": _step("Tensor? divisor, float factor")},
)


def _squared(args: Args, reduction: str) -> Tensor:
    input, target, weight = args
    return reference.squared(Arguments(input, target, weight, reduction, None))


def _rule(ops: Ops, reduction: str) -> Rule:
    """Return the rule for the squared errors, or with "sum" for their sum."""
    return Rule(2, gradients_by(ops.backward), partial(_squared, reduction=reduction))


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the sum divided, a function of the first arguments of `ops.step`."""

    def recompute(args: Args) -> Tensor:
        input, target, weight, divisor, *factor = args
        loss = _squared((input, target, weight), "sum")
        loss = loss * factor[0] if factor else loss
        return loss if divisor is None else loss / divisor

    return Sweep(2, ops.step, recompute, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, "none"), _ops.backward)
    differentiable(_ops.total, _rule(_ops, "sum"))


def _divided(ops: Ops, call: Arguments) -> tuple[Any, ...]:
    """Return what `ops.step` divides the sum by: (denominator,), and for Triton (divisor, factor)."""
    denominator = call.denominator() if call.reduction == "mean" else 1.0
    if ops is NATIVE:
        return (float(denominator),)
    if isinstance(denominator, Tensor):
        return denominator, 1.0
    return None, 1 / denominator if denominator else float("inf")


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor:
    tensors = call.expanded(call.common)
    input, target, _ = tensors
    if in_one_sweep((input, target), tensors, call.reduction):
        return call.finished(one_sweep(sweep, *tensors, *_divided(ops, call)))
    errors: Tensor = apply(ops.forward if call.reduction == "none" else ops.total, *tensors)
    return call.finished(errors / call.denominator() if call.reduction == "mean" else errors)


def _refuse(call: Arguments) -> str | None:
    if call.weight is not None and call.weight.requires_grad:
        return "computes no gradient for weight, which requires one"
    return refuse_transforms()


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.mse,
    served=native.served("mse_fwd"),
    tensors=lambda call: (call.input, call.target, call.weight),
    refuse=_refuse,
    # The root of rmse is that of the whole sum.
    rows=Rows(None, (), lambda call: call if call.reduction == "none" else call._replace(eps=None), Arguments.finished),
)
