"""The ops of mse and rmse: schemas, fakes, autograd, and the list of implementations.

All tensors of an op have one shape and dtype; broadcasting, promotion and the root are plain PyTorch around it. Under
plain autograd a reduced loss takes its gradients along.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core import triton
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
NATIVE = Ops(*(define(schema.format("", "float denominator"), fake) for schema, fake in _SCHEMAS))
TRITON = Ops(
    *(
        triton.define(
            schema.format("_triton", "Tensor? divisor, float factor"), fake, "tlkernels.losses.mse.triton", name
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


class _Squared(Function):
    """(input, target, weight, whether to sum, ops) -> squared errors, or their sum."""

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, summed: bool, ops: Ops) -> Tensor:
        result: Tensor = (ops.total if summed else ops.forward)(input, target, weight)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.summed, ctx.ops = inputs
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
            grads = where_needed(ctx.ops.backward(grad, *ctx.saved_tensors, *needs), needs)
        return *grads, None, None, None


def _again(weight: Tensor | None, reduction: str) -> Any:
    def squared(tensors: Tensors) -> Tensor:
        input, target = tensors
        assert input is not None and target is not None
        return reference.squared(Call(input, target, weight, reduction, None))

    return squared


def _reduced(call: Call, ops: Ops, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The reduced squared errors under plain autograd."""
    denominator = call.denominator() if call.reduction == "mean" else 1.0
    divided: tuple[Any, ...]
    if ops is NATIVE:
        divided = (float(denominator),)
    elif isinstance(denominator, Tensor):  # on a GPU the host does not read it
        divided = denominator, 1.0
    else:
        divided = None, _reciprocal(denominator)

    def sweep(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        loss, *grads = ops.step(*tensors, weight, *divided, *needs)
        return loss, where_needed(grads, needs)

    def again(tensors: Tensors) -> Tensor:
        loss: Tensor = _again(weight, "sum")(tensors)
        return loss / denominator

    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        return one_sweep(sweep, again, input, target, by_triton=ops is TRITON)
    return sweep((input, target), (False, False))[0]


def _reciprocal(count: float) -> float:
    return 1 / count if count else float("inf")


def _run(ops: Ops, call: Call) -> Tensor:
    input, target, *rest = call.expanded(call.common)
    weight = rest[0] if rest else None
    reduced = call.reduction != "none"
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduced and call.common != torch.float16 and plain(input, target, weight):
        return call.finished(_reduced(call, ops, input, target, weight))
    errors: Tensor = _Squared.apply(input, target, weight, reduced, ops)  # type: ignore[no-untyped-call]
    return call.finished(errors / call.denominator() if call.reduction == "mean" else errors)


def _refuse_weight(call: Call) -> str | None:
    if call.weight is not None and call.weight.requires_grad:
        return "it gives no gradient for weight, which requires one"
    return None


IMPLEMENTATIONS = (
    Implementation("native", lambda call: _refuse_weight(call) or refuse_native(call.input), partial(_run, NATIVE)),
    Implementation(
        "triton",
        lambda call: _refuse_weight(call) or refuse_triton(call.input),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
    ),
    Implementation("reference", lambda call: None, reference.mse),
)
