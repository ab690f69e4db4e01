"""Ops of selective_log_softmax: schemas, fakes, autograd, and the list of implementations.

One op computes the log-probabilities and the entropy, another the gradient of the logits. The gradient has a rule of
its own, with the second derivatives in closed form.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import native
from tlkernels._core.autograd import Args, Needs, Rule, Tensors, apply, differentiable, refuse_transforms, where_needed
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.loss import Op, define_ops, implementations
from tlkernels.losses.selective_log_softmax import reference
from tlkernels.losses.selective_log_softmax.call import Arguments, Options
from tlkernels.losses.selective_log_softmax.second_order import directional

OPTIONS = "float temperature, float? softcap"
RESULTS = "(Tensor log_probs, Tensor entropy, Tensor peak, Tensor log_sum)"
UPSTREAMS = "Tensor grad_log_probs, Tensor? grad_entropy"
NORMALISER = "Tensor peak, Tensor log_sum, Tensor entropy"


def fake_results(input: Tensor, index: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Return the results of a forward op: log-probabilities, entropy, peak and log_sum."""
    row = input.new_empty(input.shape[:1], dtype=compute_dtype(input))
    return row.new_empty(index.shape), row.new_empty(row.shape if entropy else (0,)), row, torch.empty_like(row)


def upstreams_of(upstreams: Tensors, index: Tensor, peak: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the upstreams of log-probabilities and entropy, the first one zeros where it is absent."""
    grad_log_probs, grad_entropy = upstreams
    return torch.zeros_like(index, dtype=peak.dtype) if grad_log_probs is None else grad_log_probs, grad_entropy


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Log-probabilities, entropy (empty where it is not asked for), and the two parts of the normaliser, as in cross
    entropy: peak * softcap (or 1) / temperature + log_sum."""
    backward: Any
    """Gradient of the logits."""


NATIVE, TRITON = define_ops(
    Ops,
    "selective_log_softmax",
    {
        "forward": Op(
            f"fwd(Tensor logits, Tensor index, {OPTIONS}, bool entropy) -> {RESULTS}",
            lambda logits, index, temperature, softcap, entropy: fake_results(logits, index, entropy),
            differentiable=True,
        ),
        "backward": Op(
            f"bwd({UPSTREAMS}, Tensor logits, Tensor index, {NORMALISER}, {OPTIONS}) -> Tensor",
            lambda grad_log_probs, grad_entropy, logits, *_: torch.empty_like(logits),
            differentiable=True,
        ),
    },
)


def _rule(ops: Ops) -> Rule:
    """Return the rule for the log-probabilities and the entropy."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        logits, index, temperature, softcap, _, entropy, peak, log_sum = args
        call = *upstreams_of(upstreams, index, peak), logits, index, peak.detach(), log_sum.detach(), entropy.detach()
        return (ops.backward(*call, temperature, softcap),)

    return Rule(1, backward, None, results=(0, 1), kept=(1, 2, 3))


def _gradient_rule() -> Rule:
    """Return the rule for the gradient of the logits, a function of the arguments of `ops.backward`."""

    def backward(directions: Tensors, args: Args, needs: Needs) -> Tensors:
        (direction,) = directions
        assert direction is not None
        grad_log_probs, grad_entropy, logits, index, _, _, _, temperature, softcap = args
        call = direction, grad_log_probs, grad_entropy, logits, index
        return where_needed(directional(*call, Options(temperature, softcap, entropy=True)), needs)

    return Rule(3, backward, None)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)
    differentiable(_ops.backward, _gradient_rule())


def _run(ops: Ops, call: Arguments) -> tuple[Tensor, Tensor]:
    log_probs, entropy, _, _ = apply(ops.forward, call.logits, call.indices, *call.options)
    return log_probs, entropy


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE),
    triton=partial(_run, TRITON),
    reference=reference.selective_log_softmax,
    served=native.served("selective_log_softmax_fwd"),
    tensors=lambda call: (call.logits, call.indices),
    refuse=lambda call: refuse_transforms(),
)
"""Their results are log-probabilities and entropy of the flattened rows, in the dtype of the computation."""
