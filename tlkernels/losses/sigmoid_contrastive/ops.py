"""The sigmoid contrastive loss's ops: schemas, fakes, autograd, and the list of implementations.

One sweep over the logits gives the loss and, where wanted, all gradients: each entry's is known at once.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import triton
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
from tlkernels._core.embeddings import as_tensor
from tlkernels._core.ops import define
from tlkernels.losses.sigmoid_contrastive import reference
from tlkernels.losses.sigmoid_contrastive.call import Call

_ARGUMENTS = "Tensor query, Tensor key, Tensor logit_scale, Tensor logit_bias, int own"


def _fake_loss(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    return query.new_empty((), dtype=compute_dtype(query, key))


def _fake_step(upstream: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tensors, wanted = rest[:4], rest[-1]
    grads = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want or i >= 2 else tensor.new_empty((0,))
        for i, (tensor, want) in enumerate(zip(tensors, wanted, strict=True))
    )
    return _fake_loss(*tensors), *grads


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    step: Any
    """The loss, and its gradients times `upstream`. One that is not wanted has no elements, but scale and bias get
    theirs, or with Triton some value."""


_SCHEMAS: tuple[tuple[str, Any], ...] = (
    (f"sigmoid_contrastive_fwd{{}}({_ARGUMENTS}) -> Tensor", _fake_loss),
    (
        f"sigmoid_contrastive_step{{}}(Tensor upstream, {_ARGUMENTS}, bool[4] wanted)"
        " -> (Tensor loss, Tensor grad_query, Tensor grad_key, Tensor grad_logit_scale, Tensor grad_logit_bias)",
        _fake_step,
    ),
)
NATIVE = Ops(
    *(
        define(schema.format(""), fake, name == "forward")
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)
TRITON = Ops(
    *(
        triton.define(
            schema.format("_triton"), fake, "tlkernels.losses.sigmoid_contrastive.triton", name, name == "forward"
        )
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _loss(args: Args) -> Tensor:
    return reference.loss_in_compute_dtype(Call._make((*args, args[0].dtype)))


def _rule(ops: Ops) -> Rule:
    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(ops.step(*upstreams, *args, needs)[1:], needs)

    return Rule(4, backward, _loss)


def _sweep(ops: Ops) -> Sweep:
    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        one = torch.ones((), dtype=torch.float64, device=args[0].device)
        loss, *grads = ops.step(one, *args, needs)
        return loss, grads

    return Sweep(4, step, _loss, by_triton=ops is TRITON)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.step)
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}


def _run(ops: Ops, call: Call) -> Tensor:
    query, key, own = call.query, call.key, call.own
    tensors = (query, key, *(as_tensor(value, query.device) for value in (call.logit_scale, call.logit_bias)))
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if wanted and not any(tensor.dtype == torch.float16 for tensor in tensors) and plain(*tensors):
        return one_sweep(_SWEEPS[ops], *tensors, own, dtype=call.dtype)
    loss: Tensor = apply(ops.forward, *tensors, own)
    return loss.to(call.dtype)


IMPLEMENTATIONS = (
    Implementation(
        "native", lambda call: refuse_native(call.query, call.key) or refuse_transforms(), partial(_run, NATIVE)
    ),
    Implementation(
        "triton",
        lambda call: refuse_triton(call.query, call.key) or refuse_transforms(),
        partial(_run, TRITON),
        by_name_only=triton.INTERPRETED,
    ),
    Implementation("reference", lambda call: None, in_pytorch(reference.loss)),
)
