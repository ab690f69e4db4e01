"""The sigmoid contrastive loss's ops: schemas, fakes, autograd, and the list of implementations.

One sweep over the logits gives the loss and, where wanted, all gradients: each entry's is known at once.
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
from tlkernels._core.embeddings import as_tensor
from tlkernels._core.library import define
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
NATIVE = Ops(*(define(schema.format(""), fake) for schema, fake in _SCHEMAS))
TRITON = Ops(
    *(
        triton.define(schema.format("_triton"), fake, "tlkernels.losses.sigmoid_contrastive.triton", name)
        for name, (schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _again(own: int, tensors: Tensors) -> Tensor:
    query, key, scale, bias = tensors
    assert query is not None and key is not None and scale is not None and bias is not None
    return reference.loss_in_compute_dtype(Call(query, key, scale, bias, own, query.dtype))


class _Loss(Function):
    """(query, key, logit_scale, logit_bias, own, ops) -> loss."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, own, ops = args
        return ops.forward(*tensors, own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.own, ctx.ops = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        needs, own = ctx.needs_input_grad[:4], ctx.own
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiate(lambda tensors: _again(own, tensors), ctx.saved_tensors, needs, upstream)
        else:
            grads = where_needed(ctx.ops.step(upstream, *ctx.saved_tensors, own, needs)[1:], needs)
        return *grads, None, None


def _run(ops: Ops, call: Call) -> Tensor:
    query, key, own = call.query, call.key, call.own
    tensors = (query, key, *(as_tensor(value, query.device) for value in (call.logit_scale, call.logit_bias)))
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    loss: Tensor
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if wanted and not any(tensor.dtype == torch.float16 for tensor in tensors) and plain(*tensors):

        def compute(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            one = torch.ones((), dtype=torch.float64, device=query.device)
            loss, *grads = ops.step(one, *tensors, own, needs)
            return loss, where_needed(grads, needs)

        by_triton = ops is TRITON
        loss = one_sweep(compute, lambda t: _again(own, t), *tensors, dtype=call.dtype, by_triton=by_triton)
    else:
        loss = _Loss.apply(*tensors, own, ops)  # type: ignore[no-untyped-call]
    return loss.to(call.dtype)


IMPLEMENTATIONS = (
    Implementation("native", lambda call: refuse_native(call.query), partial(_run, NATIVE)),
    Implementation(
        "triton", lambda call: refuse_triton(call.query), partial(_run, TRITON), by_name_only=triton.INTERPRETED
    ),
    Implementation("reference", lambda call: None, reference.loss),
)
