"""The sigmoid contrastive loss's ops: schemas, fakes, autograd, and the list of implementations.

One sweep over the logits computes the loss and, where needed, all gradients.
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
    needs_grad,
    one_sweep,
    refuse_transforms,
    where_needed,
)
from tlkernels._core.dtypes import cast, compute_dtype
from tlkernels._core.embeddings import as_tensor
from tlkernels._core.loss import Op, define_ops, implementations, in_one_sweep
from tlkernels.losses.sigmoid_contrastive import reference
from tlkernels.losses.sigmoid_contrastive.call import Arguments

_INPUT = "Tensor query, Tensor key, Tensor logit_scale, Tensor logit_bias, int positive_offset"
_GRADIENTS = "Tensor grad_query, Tensor grad_key, Tensor grad_logit_scale, Tensor grad_logit_bias"


def _fake_loss(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return query.new_empty((), dtype=compute_dtype(query, key))


def _fake_step(
    upstream: Tensor, query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, (needs_query, needs_key, _, _) = rest
    needs = (query, needs_query), (key, needs_key), (logit_scale, True), (logit_bias, True)
    return _fake_loss(query, key), *(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty((0,))
        for tensor, need in needs
    )


def _flops(query: Any, key: Any, needs: Needs = (), **_: Any) -> int:
    return flops.of_product(query, key, needs)


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The loss."""
    step: Any
    """The loss, and its gradients times `upstream`.

    A gradient of an embedding that is not needed is an empty tensor. Those of scale and bias always have a value,
    which with Triton is undefined where it is not needed."""


NATIVE, TRITON = define_ops(
    Ops,
    "sigmoid_contrastive",
    {
        "forward": Op(f"fwd({_INPUT}) -> Tensor", _fake_loss, differentiable=True),
        "step": Op(f"step(Tensor upstream, {_INPUT}, bool[4] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
    },
    flops=_flops,
)


def _reference(args: Args) -> Tensor:
    query, key, logit_scale, logit_bias, positive_offset = args
    return reference.loss_in_compute_dtype(Arguments(query, key, logit_scale, logit_bias, positive_offset, query.dtype))


def _rule(ops: Ops) -> Rule:
    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        _, *grads = ops.step(*upstreams, *args, needs)
        return where_needed(grads, needs)

    return Rule(4, backward, _reference)


def _one_sweep(ops: Ops) -> Sweep:
    def step(query: Tensor, *args: Any) -> Any:
        one = torch.ones((), dtype=torch.float64, device=query.device)
        return ops.step(one, query, *args)

    return Sweep(4, step, _reference, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.step)


def _run(ops: Ops, sweep: Sweep, call: Arguments) -> Tensor:
    device = call.query.device
    tensors = call.query, call.key, as_tensor(call.logit_scale, device), as_tensor(call.logit_bias, device)
    if needs_grad(tensors) and in_one_sweep(tensors, tensors, "mean"):
        return one_sweep(sweep, *tensors, call.positive_offset, dtype=call.dtype)
    return cast(apply(ops.forward, *tensors, call.positive_offset), call.dtype)


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON)),
    reference=reference.loss,
    served=native.served("sigmoid_contrastive_fwd"),
    tensors=lambda call: (call.query, call.key),
    refuse=lambda call: refuse_transforms(),
)
