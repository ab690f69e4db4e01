"""Linear cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss takes its gradients along, so that three GEMMs are all. Elsewhere an op gives the
loss of each row, and the backward makes the logits anew. What is not a first derivative goes through the reference.
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
from tlkernels._core.triton import linear
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
_DIFFERENTIABLE = ("forward", "forward_stats")
NATIVE = Ops(
    *(
        define(_NAME.format(schema.format("")), fake, name in _DIFFERENTIABLE)
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)
_SERVED = native.served(_NAME.format("fwd"))
TRITON = Ops(
    *(
        triton.define(
            _NAME.format(schema.format("_triton")),
            fake,
            "tlkernels.losses.linear_cross_entropy.triton",
            name,
            name in _DIFFERENTIABLE,
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _call(args: Args, reduction: str, stats: bool) -> Call:
    input, linear_weight, linear_bias, target, *options = args
    return Call(input, linear_weight, linear_bias, target, Options(*options), reduction, stats)


def _rule(ops: Ops, stats: bool) -> Rule:
    """The loss of each row, with `stats` its lse too."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        by_loss, by_lse = upstreams if stats else (*upstreams, None)
        if by_loss is None:
            by_loss = args[0].new_zeros(args[0].shape[:1], dtype=compute_dtype(args[0]))
        return where_needed(ops.backward(by_loss, by_lse, *args, *needs), needs)

    def rows(args: Args) -> Tensor | Tensors:
        output = reference.linear_cross_entropy(_call(args, "none", stats))
        return output if isinstance(output, Tensor) else (output.loss, output.lse)

    return Rule(3, backward, rows, results=(0, 1) if stats else (0,))


def _sweep(ops: Ops) -> Sweep:
    """The reduced loss; behind the options comes whether it is the mean."""

    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        loss, *grads = ops.step(*args, *needs)
        return loss, grads

    def reduced(args: Args) -> Tensor:
        *args, mean = args
        loss = reference.linear_cross_entropy(_call(args, "mean" if mean else "sum", False))
        assert isinstance(loss, Tensor)
        return loss

    return Sweep(3, step, reduced, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, stats=False), _ops.backward)
    differentiable(_ops.forward_stats, _rule(_ops, stats=True))
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}


def _run(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    shape, flat = call.input.shape[:-1], call.flat()
    args = *flat.layer, flat.target, *flat.options
    reduction, dtype = flat.reduction, flat.on_shape().dtype
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if not call.stats and reduction != "none" and call.input.dtype != torch.float16 and plain(*args):
        return one_sweep(_SWEEPS[ops], *args, reduction == "mean", dtype=dtype)
    output = apply(ops.forward_stats if call.stats else ops.forward, *args)
    rows, *stats = output if call.stats else (output,)
    loss = reduce(rows, flat.on_shape().denominator() if reduction == "mean" else 1, reduction).to(dtype)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(shape) for value in stats)) if call.stats else loss


def _refuse_gradients(call: Call) -> str | None:
    for name, tensor in (("weight", call.options.weight), ("target", call.target)):
        if tensor is not None and tensor.requires_grad:
            return f"it gives no gradient for {name}, which requires one"
    return refuse_transforms()


def _tensors(call: Call) -> Tensors:
    return *call.layer, call.target, call.options.weight


IMPLEMENTATIONS = (
    Implementation(
        "native",
        lambda call: _refuse_gradients(call) or refuse_native(*_tensors(call), served=_SERVED),
        partial(_run, NATIVE),
    ),
    Implementation(
        "triton",
        lambda call: _refuse_gradients(call) or refuse_triton(*_tensors(call)),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
        how=lambda call: linear.describe([call.layer]),
    ),
    Implementation("reference", lambda call: None, in_pytorch(reference.linear_cross_entropy)),
)
