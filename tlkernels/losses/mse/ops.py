"""The ops of mse and rmse: schemas, fakes, autograd, and the list of implementations.

All tensors of an op have one shape and dtype; broadcasting, promotion and the root are plain PyTorch around it. Under
plain autograd a reduced loss takes its gradients along.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core.autograd import Tensors, differentiate, one_sweep, plain, refuse_native, where_needed
from tlkernels._core.dispatch import Implementation
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.library import define
from tlkernels.losses.mse import reference
from tlkernels.losses.mse.call import Call

_TENSORS = "Tensor input, Tensor target, Tensor? weight"
_NEEDS = "bool needs_input, bool needs_target"


def _fake_gradients(input: Tensor, target: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    found = (torch.empty_like(t) if need else t.new_empty((0,)) for t, need in zip((input, target), needs, strict=True))
    return tuple(found)


# The squared errors, times the weights, and their sum. A gradient that is not needed has no elements.
forward = define(
    f"mse_fwd({_TENSORS}) -> Tensor",
    lambda input, *rest: torch.empty_like(input, dtype=compute_dtype(input)),
)
total = define(
    f"mse_sum({_TENSORS}) -> Tensor",
    lambda input, *rest: input.new_empty((), dtype=compute_dtype(input)),
)
# `grad` is for the sum, 0-d, or one number for each error.
backward = define(
    f"mse_bwd(Tensor grad, {_TENSORS}, {_NEEDS}) -> (Tensor grad_input, Tensor grad_target)",
    lambda grad, input, target, weight, *needs: _fake_gradients(input, target, *needs),
)
# The sum over `denominator` with its gradients.
step = define(
    f"mse_step({_TENSORS}, float denominator, {_NEEDS}) -> (Tensor loss, Tensor grad_input, Tensor grad_target)",
    lambda input, target, weight, denominator, *needs: (
        input.new_empty((), dtype=compute_dtype(input)),
        *_fake_gradients(input, target, *needs),
    ),
)


class _Squared(Function):
    """(input, target, weight, whether to sum) -> squared errors, or their sum."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, summed: bool) -> Tensor:
        result: Tensor = (total if summed else forward)(input, target, weight)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.summed = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, target, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        # A compiler traces the first derivative alone, and raises itself where another is asked of it.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            reduction = "sum" if ctx.summed else "none"
            grads = differentiate(_again(weight, reduction), (input, target), needs, grad)
        else:
            grads = where_needed(backward(grad, *ctx.saved_tensors, *needs), needs)
        return *grads, None, None


def _again(weight: Tensor | None, reduction: str) -> Any:
    def squared(tensors: Tensors) -> Tensor:
        input, target = tensors
        assert input is not None and target is not None
        return reference.squared(Call(input, target, weight, reduction, None))

    return squared


def _reduced(call: Call, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The reduced squared errors under plain autograd."""
    denominator = float(call.denominator()) if call.reduction == "mean" else 1.0

    def sweep(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        loss, *grads = step(*tensors, weight, denominator, *needs)
        return loss, where_needed(grads, needs)

    def again(tensors: Tensors) -> Tensor:
        loss: Tensor = _again(weight, "sum")(tensors)
        return loss / denominator

    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        return one_sweep(sweep, again, input, target)
    return sweep((input, target), (False, False))[0]


def _run_native(call: Call) -> Tensor:
    input, target, *rest = call.expanded(call.common)
    weight = rest[0] if rest else None
    reduced = call.reduction != "none"
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduced and call.common != torch.float16 and plain(input, target, weight):
        return call.finished(_reduced(call, input, target, weight))
    errors: Tensor = _Squared.apply(input, target, weight, reduced)  # type: ignore[no-untyped-call]
    return call.finished(errors / call.denominator() if call.reduction == "mean" else errors)


def _refuse_native(call: Call) -> str | None:
    if call.weight is not None and call.weight.requires_grad:
        return "it gives no gradient for weight, which requires one"
    return refuse_native(call.input)


IMPLEMENTATIONS = (
    Implementation("native", _refuse_native, _run_native),
    Implementation("reference", lambda call: None, reference.mse),
)
