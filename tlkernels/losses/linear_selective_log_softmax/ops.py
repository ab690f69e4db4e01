"""Ops of linear_selective_log_softmax: schemas, fakes, autograd, and the list of implementations.

One op computes the log-probabilities and the entropy, another the gradients, from the logits that it computes again.
Only the first derivative has kernels; the reference computes the others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tlkernels._core import flops, native
from tlkernels._core.autograd import Args, Needs, Rule, Tensors, apply, differentiable, refuse_transforms, where_needed
from tlkernels._core.loss import Op, define_ops, implementations, take
from tlkernels._core.triton import linear
from tlkernels.losses.linear_selective_log_softmax import reference
from tlkernels.losses.linear_selective_log_softmax.call import Arguments, Layer
from tlkernels.losses.selective_log_softmax.call import Options
from tlkernels.losses.selective_log_softmax.ops import (
    NORMALISER,
    OPTIONS,
    RESULTS,
    UPSTREAMS,
    fake_results,
    upstreams_of,
)

_LAYER = "Tensor input, Tensor linear_weight, Tensor? linear_bias"


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    layer, (index, _, _, entropy) = take(Layer, args)
    return fake_results(layer.input, index, entropy)


def _fake_backward(grad_log_probs: Tensor, grad_entropy: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    (input, weight, _), (*_, needs) = take(Layer, args)
    shapes: Sequence[Sequence[int]] = (input.shape, weight.shape, weight.shape[:1])
    return tuple(input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Log-probabilities, entropy (empty where it is not asked for), and the two parts of the normaliser."""
    backward: Any
    """The gradients of the layer; one that is not needed is an empty tensor."""


NATIVE, TRITON = define_ops(
    Ops,
    "linear_selective_log_softmax",
    {
        "forward": Op(
            f"fwd({_LAYER}, Tensor index, {OPTIONS}, bool entropy) -> {RESULTS}", _fake_forward, differentiable=True
        ),
        "backward": Op(
            f"bwd({UPSTREAMS}, {_LAYER}, Tensor index, {NORMALISER}, {OPTIONS}, bool[3] needs)"
            " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
            _fake_backward,
        ),
    },
    flops=flops.of_linear_layer,
)


def _reference(args: Args) -> Tensors:
    layer, (index, temperature, softcap, entropy, *_) = take(Layer, args)
    call = Arguments(layer, index, Options(temperature, softcap, entropy))
    return reference.linear_selective_log_softmax(call)


def _rule(ops: Ops) -> Rule:
    """Return the rule for the log-probabilities and the entropy."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        layer, (index, temperature, softcap, _, entropy, peak, log_sum) = take(Layer, args)
        call = *upstreams_of(upstreams, index, peak), *layer, index, peak, log_sum, entropy, temperature, softcap
        return where_needed(ops.backward(*call, needs), needs)

    return Rule(3, backward, _reference, results=(0, 1), kept=(1, 2, 3))


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)


def _run(ops: Ops, call: Arguments) -> tuple[Tensor, Tensor]:
    log_probs, entropy, _, _ = apply(ops.forward, *call.layer, call.indices, *call.options)
    return log_probs, entropy


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE),
    triton=partial(_run, TRITON),
    reference=reference.linear_selective_log_softmax,
    served=native.served("linear_selective_log_softmax_fwd"),
    tensors=lambda call: (*call.layer, call.indices),
    refuse=lambda call: refuse_transforms(),
    strategy=lambda call: linear.describe([call.layer], only="chunks"),
)
"""Their results are log-probabilities and entropy of the flattened rows, in the dtype of the computation."""
