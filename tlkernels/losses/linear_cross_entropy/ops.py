"""Linear cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss takes its gradients along, so that three GEMMs are all. Elsewhere an op gives the
loss of each row, and the backward makes the logits anew. What is not a first derivative goes through the reference.
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
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.library import define
from tlkernels._core.reduction import reduce
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput, Options
from tlkernels.losses.cross_entropy.ops import OPTIONS
from tlkernels.losses.linear_cross_entropy import reference
from tlkernels.losses.linear_cross_entropy.call import Call

_LAYER = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
_NEEDS = "bool needs_input, bool needs_weight, bool needs_bias"


def _fake_row(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=dtype or compute_dtype(input))


def _fake_gradients(input: Tensor, linear_weight: Tensor, needs: Any) -> tuple[Tensor, ...]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _fake_forward(input: Tensor, *rest: Any) -> Tensor:
    return _fake_row(input)


def _fake_stats(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(_fake_row(input) for _ in range(3)), _fake_row(input, torch.bool)


def _fake_backward(grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    return _fake_gradients(input, weight, rest[-3:])


def _fake_step(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return input.new_empty((), dtype=compute_dtype(input)), *_fake_gradients(input, linear_weight, rest[-3:])


class Ops(NamedTuple):
    """The ops of an implementation. `input` has rows, and `target` an index or probabilities for each."""

    forward: Any
    """The loss of each row."""
    forward_stats: Any
    """The same with lse, entropy and correct."""
    backward: Any
    """The gradients for an upstream of each row; one that is not needed has no elements."""
    step: Any
    """The reduced loss with its gradients."""


_CALL = f"{_LAYER}, {OPTIONS}"
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"
_SCHEMAS: tuple[tuple[str, Any], ...] = (
    (f"fwd{{}}({_CALL}) -> Tensor", _fake_forward),
    (f"fwd_stats{{}}({_CALL}) -> (Tensor loss, Tensor lse, Tensor entropy, Tensor correct)", _fake_stats),
    (f"bwd{{}}(Tensor grad_loss, Tensor? grad_lse, {_CALL}, {_NEEDS}) -> ({_GRADIENTS})", _fake_backward),
    (f"step{{}}({_CALL}, bool mean, {_NEEDS}) -> (Tensor loss, {_GRADIENTS})", _fake_step),
)
_NAME = "linear_cross_entropy_{}"
NATIVE = Ops(*(define(_NAME.format(schema.format("")), fake) for schema, fake in _SCHEMAS))
_SERVED = native.served(_NAME.format("fwd"))
TRITON = Ops(
    *(
        triton.define(
            _NAME.format(schema.format("_triton")), fake, "tlkernels.losses.linear_cross_entropy.triton", name
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


class _Rows(Function):
    """(layer's tensors, target, weight, other options, stats, ops) -> loss[, lse, entropy, correct]."""

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        numbers: Any,
        stats: bool,
        ops: Ops,
    ) -> Any:
        op = ops.forward_stats if stats else ops.forward
        return op(input, linear_weight, linear_bias, target, weight, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.numbers, ctx.stats, ctx.ops = inputs
        ctx.save_for_backward(*tensors)
        if ctx.stats:
            ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None = None, *_: Any) -> Any:
        input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
        layer, needs = (input, linear_weight, linear_bias), ctx.needs_input_grad[:3]
        if grad_loss is None:
            grad_loss = input.new_zeros(input.shape[:1], dtype=compute_dtype(input))
        # A compiler traces the first derivative alone, and raises itself where another is asked of it.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = Call(*layer, target, Options(weight, *ctx.numbers), "none", grad_lse is not None)
            upstream = grad_loss

            def dot(tensors: Tensors) -> Tensor:
                """The rows times their upstream values, which get their derivatives too."""
                output = reference.linear_cross_entropy(call.of(tensors))
                if isinstance(output, Tensor):
                    return (output * upstream).sum()
                assert grad_lse is not None
                return (output.loss * upstream).sum() + (output.lse * grad_lse).sum()

            grads = differentiate(dot, layer, needs, torch.ones((), device=target.device))
        else:
            found = ctx.ops.backward(grad_loss, grad_lse, *layer, target, weight, *ctx.numbers, *needs)
            grads = where_needed(found, needs)
        return *grads, *(None,) * 5


def _reduced(call: Call, ops: Ops, dtype: torch.dtype) -> Tensor:
    """The reduced loss of a flat call under plain autograd."""
    target, (weight, *numbers), mean = call.target, call.options, call.reduction == "mean"

    def sweep(layer: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        loss, *grads = ops.step(*layer, target, weight, *numbers, mean, *needs)
        return loss, where_needed(grads, needs)

    def again(layer: Tensors) -> Tensor:
        loss = reference.linear_cross_entropy(call.of(layer))
        assert isinstance(loss, Tensor)
        return loss

    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in call.layer):
        return one_sweep(sweep, again, *call.layer, dtype=dtype, by_triton=ops is TRITON)
    return sweep(call.layer, (False, False, False))[0].to(dtype)


def _run(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    shape, flat = call.input.shape[:-1], call.flat()
    target, (weight, *numbers), reduction = flat.target, flat.options, flat.reduction
    dtype = flat.on_shape().dtype
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if not call.stats and reduction != "none" and call.input.dtype != torch.float16 and plain(*call.layer):
        return _reduced(flat, ops, dtype)
    output = _Rows.apply(*flat.layer, target, weight, numbers, call.stats, ops)  # type: ignore[no-untyped-call]
    rows, *stats = output if call.stats else (output,)
    loss = reduce(rows, flat.on_shape().denominator() if reduction == "mean" else 1, reduction).to(dtype)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(shape) for value in stats)) if call.stats else loss


def _refuse_gradients(call: Call) -> str | None:
    for name, tensor in (("weight", call.options.weight), ("target", call.target)):
        if tensor is not None and tensor.requires_grad:
            return f"it gives no gradient for {name}, which requires one"
    return None


IMPLEMENTATIONS = (
    Implementation(
        "native",
        lambda call: _refuse_gradients(call) or refuse_native(*call.layer, served=_SERVED),
        partial(_run, NATIVE),
    ),
    Implementation(
        "triton",
        lambda call: _refuse_gradients(call) or refuse_triton(*call.layer),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
        how=lambda call: linear.describe([call.layer]),
    ),
    Implementation("reference", lambda call: None, reference.linear_cross_entropy),
)
