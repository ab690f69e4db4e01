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
    is_differentiated,
    one_sweep,
    refuse_transforms,
    where_needed,
)
from tlkernels._core.dtypes import cast, compute_dtype
from tlkernels._core.loss import Op, Rows, define_ops, implementations, in_one_sweep, take
from tlkernels._core.reduction import reduce
from tlkernels._core.triton import linear
from tlkernels.losses.cross_entropy import vocab_parallel
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput, Options
from tlkernels.losses.cross_entropy.ops import OPTIONS
from tlkernels.losses.linear_cross_entropy import reference
from tlkernels.losses.linear_cross_entropy.call import Arguments, shaped

_LAYER = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
_OPTIONS = f"{OPTIONS}, Tensor? row_weight, int? num_valid"
_INPUT = f"{_LAYER}, {_OPTIONS}"
_UPSTREAM = "Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy"
_NORMALISER = "Tensor peak, Tensor log_sum, Tensor? entropy"
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"


def _fake_row(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(input.shape[:1], dtype=dtype or compute_dtype(input))


def _fake_stats(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(_fake_row(input) for _ in range(4)), _fake_row(input, torch.bool)


def _fake_backward(grad_loss: Tensor, g: Any, h: Any, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    *_, needs = rest
    shapes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _fake_step(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss = input.new_empty((), dtype=compute_dtype(input))
    return loss, *_fake_backward(loss, None, None, input, linear_weight, *rest)


class Ops(NamedTuple):
    """The ops of an implementation. `input` is a matrix, and `target` has an index or probabilities for each row.

    Of rows that are ignored or of weight 0 every result is 0.
    """

    forward: Any
    """Loss of each row, and the two parts of its lse: peak * softcap (or 1) / temperature + log_sum."""
    forward_stats: Any
    """The same, with entropy and correct."""
    backward: Any
    """The gradients, given those of each row's results; one that is not needed is an empty tensor."""
    step: Any
    """The reduced loss and its gradients."""


NATIVE, TRITON = define_ops(
    Ops,
    "linear_cross_entropy",
    {
        "forward": Op(
            f"fwd({_INPUT}) -> (Tensor loss, Tensor peak, Tensor log_sum)",
            lambda input, *_: tuple(_fake_row(input) for _ in range(3)),
            differentiable=True,
        ),
        "forward_stats": Op(
            f"fwd_stats({_INPUT}) -> (Tensor loss, Tensor peak, Tensor log_sum, Tensor entropy, Tensor correct)",
            _fake_stats,
            differentiable=True,
        ),
        "backward": Op(
            f"bwd({_UPSTREAM}, {_LAYER}, {_NORMALISER}, {_OPTIONS}, bool[3] needs) -> ({_GRADIENTS})", _fake_backward
        ),
        "step": Op(f"step({_INPUT}, bool mean, bool[3] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
    },
    flops=flops.of_linear_layer,
)


def _reference(args: Args, reduction: str, stats: bool = False) -> Tensor | CrossEntropyOutput:
    """Return the reference's result for an op's arguments up to `num_valid`."""
    input, linear_weight, linear_bias, target, *rest = args
    options, (row_weight, num_valid, *_) = take(Options, rest)
    call = Arguments(input, linear_weight, linear_bias, target, options, reduction, stats, row_weight, num_valid)
    return reference.linear_cross_entropy(call)


def _rule(ops: Ops, stats: bool) -> Rule:
    """Return the rule for the losses of rows; with `stats`, also for log_sum, of which lse is made, and entropy."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        input, linear_weight, linear_bias, target, *rest = args
        options, (row_weight, num_valid, *kept) = take(Options, rest)
        peak, log_sum, entropy = (value.detach() for value in kept) if stats else (*kept, None)
        grad_loss, grad_lse, grad_entropy = upstreams if stats else (*upstreams, None, None)
        grad_loss = torch.zeros_like(peak) if grad_loss is None else grad_loss
        grads = ops.backward(
            grad_loss, grad_lse, grad_entropy, input, linear_weight, linear_bias, target, peak, log_sum,
            None if grad_entropy is None else entropy, *options, row_weight, num_valid, needs,
        )  # fmt: skip
        return where_needed(grads, needs)

    def rows(args: Args) -> Tensor | Tensors:
        output = _reference(args, "none", stats)
        return output if isinstance(output, Tensor) else (output.loss, output.lse, output.entropy)

    return Rule(3, backward, rows, results=(0, 2, 3) if stats else (0,), kept=(1, 2, 3) if stats else (1, 2))


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the reduced loss of (*layer, target, *options, row_weight, num_valid, mean)."""

    def recompute(args: Args) -> Tensor:
        *args, mean = args
        loss = _reference(args, "mean" if mean else "sum")
        assert isinstance(loss, Tensor)
        return loss

    return Sweep(3, ops.step, recompute, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, stats=False), _ops.backward)
    differentiable(_ops.forward_stats, _rule(_ops, stats=True))


def _over_group(ops: Ops, flat: Arguments) -> Tensor | CrossEntropyOutput:
    """Compute a flat call with `vocab_group`."""
    of_logits = flat.on_shape()
    weightless = of_logits.weightless()
    # The rows' weights multiply their losses later; here rows of weight 0 are left out.
    row_weight = None if weightless is None else (~weightless).to(compute_dtype(flat.input))
    rows = row_weight, flat.num_valid

    def forward(target: Tensor, options: Options, stats: bool) -> Any:
        return (ops.forward_stats if stats else ops.forward)(*flat.layer, target, *options, *rows)

    def backward(grad_loss: Tensor, grad_lse: Any, grad_entropy: Any, layer: Tensors, *rest: Any) -> Tensors:
        *args, options, needs = rest
        grads = ops.backward(grad_loss, grad_lse, grad_entropy, *layer, *args, *options, *rows, needs)
        by_input, *others = where_needed(grads, needs)
        # The gradient of each rank's logits gives a part of the input's.
        return None if by_input is None else vocab_parallel.sum_over(by_input, flat.vocab_group), *others

    output: Tensor | CrossEntropyOutput = vocab_parallel.cross_entropy(of_logits, forward, backward, flat.layer)
    return output


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor | CrossEntropyOutput:
    shape, flat = call.input.shape[:-1], call.flat()
    if flat.vocab_group is not None:
        return shaped(_over_group(ops, flat), flat.reduction, shape)
    reduction, of_logits, options = flat.reduction, flat.on_shape(), flat.options
    # The gradient of row_weight is PyTorch's, of the rows' losses times their weights.
    later = flat.row_weight is not None and is_differentiated(flat.row_weight)
    args = *flat.layer, flat.target, *options, None if later else flat.row_weight, flat.num_valid
    if not call.stats and not later and in_one_sweep(flat.layer, args, reduction):
        return one_sweep(sweep, *args, reduction == "mean", dtype=of_logits.dtype)
    rows, peak, log_sum, *stats = apply(ops.forward_stats if call.stats else ops.forward, *args)
    rows = of_logits.weighted(rows) if later else rows
    loss = cast(reduce(rows, of_logits.denominator() if reduction == "mean" else 1, reduction), of_logits.dtype)
    if not call.stats:
        return shaped(loss, reduction, shape)
    lse = peak * ((options.softcap or 1) / options.temperature) + log_sum
    return shaped(CrossEntropyOutput(loss, lse, *stats), reduction, shape)


def _refuse(call: Arguments) -> str | None:
    for name, tensor in (("weight", call.options.weight), ("target", call.target)):
        if tensor is not None and tensor.requires_grad:
            return f"computes no gradient for {name}, which requires one"
    if call.vocab_group is not None and torch.compiler.is_compiling():
        return "vocab_group needs plain autograd, not torch.compile"
    return refuse_transforms()


def _tensors(call: Arguments) -> Tensors:
    return *call.layer, call.target, call.options.weight, call.row_weight


_ALL = "multiplies all rows"
_COUNTED = "multiplies only the rows that count"
_IGNORED_TOO = "multiplies ignored rows too, since num_valid is not given"


def _native_strategy(call: Arguments) -> str:
    """Say which rows the products have."""
    if call.input.device.type == "cpu":
        return _COUNTED
    return _ALL if call.target.is_floating_point() else _IGNORED_TOO if call.num_valid is None else _COUNTED


def _triton_strategy(call: Arguments) -> str:
    strategy = linear.describe([call.layer], call.num_valid)
    if call.target.is_floating_point():
        return f"{strategy}; {_ALL}"
    if call.num_valid is not None:
        return f"{strategy}; {_COUNTED}"
    return f"{strategy}; {'tiles of ignored rows end at once' if strategy.startswith('lean') else _IGNORED_TOO}"


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.linear_cross_entropy,
    served=native.served("linear_cross_entropy_fwd"),
    tensors=_tensors,
    refuse=_refuse,
    native_strategy=_native_strategy,
    strategy=_triton_strategy,
    rows=Rows(-1, ("linear_weight", "linear_bias", "weight"), lambda call: call._replace(num_valid=None)),
)
