"""Linear cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss is computed along with its gradients, with three matrix products in all. Otherwise
an op computes the loss of each row, and the backward computes the logits again. Only the first derivative has kernels;
the reference computes the others.
"""

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
    refuse_transforms,
    where_needed,
)
from tlkernels._core.dtypes import cast, compute_dtype
from tlkernels._core.loss import Op, define_ops, implementations, in_one_sweep
from tlkernels._core.reduction import reduce
from tlkernels._core.triton import linear
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput, Options
from tlkernels.losses.cross_entropy.ops import OPTIONS
from tlkernels.losses.linear_cross_entropy import reference
from tlkernels.losses.linear_cross_entropy.call import Arguments

_INPUT = f"Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, {OPTIONS}"
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"


def _fake_row(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=dtype or compute_dtype(input))


def _fake_stats(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(_fake_row(input) for _ in range(3)), _fake_row(input, torch.bool)


def _fake_backward(grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    *_, needs = rest
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _fake_step(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss = input.new_empty((), dtype=compute_dtype(input))
    return loss, *_fake_backward(loss, None, input, linear_weight, *rest)


class Ops(NamedTuple):
    """The ops of an implementation. `input` is a matrix, and `target` has an index or probabilities for each row."""

    forward: Any
    """Loss of each row."""
    forward_stats: Any
    """The same, with lse, entropy and correct."""
    backward: Any
    """The gradients, given that of each row's loss; one that is not needed is an empty tensor."""
    step: Any
    """The reduced loss and its gradients."""


NATIVE, TRITON = define_ops(
    Ops,
    "linear_cross_entropy",
    {
        "forward": Op(f"fwd({_INPUT}) -> Tensor", lambda input, *_: _fake_row(input), differentiable=True),
        "forward_stats": Op(
            f"fwd_stats({_INPUT}) -> (Tensor loss, Tensor lse, Tensor entropy, Tensor correct)",
            _fake_stats,
            differentiable=True,
        ),
        "backward": Op(
            f"bwd(Tensor grad_loss, Tensor? grad_lse, {_INPUT}, bool[3] needs) -> ({_GRADIENTS})", _fake_backward
        ),
        "step": Op(f"step({_INPUT}, bool mean, bool[3] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
    },
    flops=flops.of_linear_layer,
)


def _reference(args: Args, reduction: str, stats: bool = False) -> Tensor | CrossEntropyOutput:
    input, linear_weight, linear_bias, target, *options = args
    call = Arguments(input, linear_weight, linear_bias, target, Options(*options), reduction, stats)
    return reference.linear_cross_entropy(call)


def _rule(ops: Ops, stats: bool) -> Rule:
    """Return the rule for the losses of rows; with `stats`, for their lse too."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        grad_loss, grad_lse = upstreams if stats else (*upstreams, None)
        if grad_loss is None:
            input, *_ = args
            grad_loss = torch.zeros_like(_fake_row(input))
        return where_needed(ops.backward(grad_loss, grad_lse, *args, needs), needs)

    def rows(args: Args) -> Tensor | Tensors:
        output = _reference(args, "none", stats)
        return output if isinstance(output, Tensor) else (output.loss, output.lse)

    return Rule(3, backward, rows, results=(0, 1) if stats else (0,))


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the reduced loss of (*layer, target, *options, mean)."""

    def recompute(args: Args) -> Tensor:
        *args, mean = args
        loss = _reference(args, "mean" if mean else "sum")
        assert isinstance(loss, Tensor)
        return loss

    return Sweep(3, ops.step, recompute, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, stats=False), _ops.backward)
    differentiable(_ops.forward_stats, _rule(_ops, stats=True))


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor | CrossEntropyOutput:
    shape, flat = call.input.shape[:-1], call.flat()
    args = *flat.layer, flat.target, *flat.options
    reduction, of_logits = flat.reduction, flat.on_shape()
    if not call.stats and in_one_sweep(flat.layer, args, reduction):
        return one_sweep(sweep, *args, reduction == "mean", dtype=of_logits.dtype)
    output = apply(ops.forward_stats if call.stats else ops.forward, *args)
    rows, *stats = output if call.stats else (output,)
    loss = cast(reduce(rows, of_logits.denominator() if reduction == "mean" else 1, reduction), of_logits.dtype)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(shape) for value in stats)) if call.stats else loss


def _refuse(call: Arguments) -> str | None:
    for name, tensor in (("weight", call.options.weight), ("target", call.target)):
        if tensor is not None and tensor.requires_grad:
            return f"computes no gradient for {name}, which requires one"
    return refuse_transforms()


def _tensors(call: Arguments) -> Tensors:
    return *call.layer, call.target, call.options.weight


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.linear_cross_entropy,
    served=native.served("linear_cross_entropy_fwd"),
    tensors=_tensors,
    refuse=_refuse,
    strategy=lambda call: linear.describe([call.layer]),
)
