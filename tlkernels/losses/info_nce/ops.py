"""InfoNCE's ops: schemas, fakes, autograd, and the list of implementations; nt_xent and sup_con are calls of them too.

An op gives the loss of each row and another the gradients. The native path has a second form: under plain autograd a
reduced loss and its gradients come from one op (`step`): on CPU it keeps a small matrix of logits from the first sweep
to the second, and everywhere it spares a small call its nodes in autograd's graph.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core import native, triton
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
from tlkernels._core.reduction import reduce
from tlkernels.losses.info_nce import reference
from tlkernels.losses.info_nce.call import Call, Options

_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor? negatives, Tensor logit_scale, Tensor? target, Tensor? mask,"
    " Tensor? query_ids, Tensor? key_ids, int own, bool by_label, bool symmetric, bool normalize, float label_smoothing"
)


def _fake_native(query: Tensor, key: Tensor | None, negatives: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, symmetric = query.shape[0], rest[-3]
    loss = query.new_empty((rows,), dtype=compute_dtype(query, key, negatives))
    return loss, query.new_empty((1 + symmetric, 6, rows), dtype=torch.float64)  # kStatistics in csrc/info_nce.h


def _fake_triton(query: Tensor, key: Tensor | None, negatives: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    loss, state = _fake_native(query, key, negatives, *rest)
    return loss, loss.new_empty((state.shape[0], 5, state.shape[2]))  # STATISTICS in triton.py


def _fake_gradients(tensors: Tensors, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    query = tensors[0]
    assert query is not None
    return tuple(
        query.new_empty((0,)) if tensor is None or not (want or i == 3) else
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for i, (tensor, want) in enumerate(zip(tensors, wanted, strict=True))
    )  # fmt: skip


def _fake_step(query: Tensor, key: Tensor | None, negatives: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    loss = query.new_empty((), dtype=compute_dtype(query, key, negatives))
    return loss, *_fake_gradients((query, key, negatives, rest[0]), rest[-1])


_GRADIENTS = "Tensor grad_query, Tensor grad_key, Tensor grad_negatives, Tensor grad_logit_scale"

_FORWARD = f"info_nce_fwd{{}}({_ARGUMENTS}) -> (Tensor loss, Tensor state)"
_BACKWARD = f"info_nce_bwd{{}}(Tensor grad_loss, Tensor state, {_ARGUMENTS}, bool[4] wanted) -> ({_GRADIENTS})"
_STEP = f"info_nce_step({_ARGUMENTS}, bool mean, bool[4] wanted) -> (Tensor loss, {_GRADIENTS})"
_KERNELS = "tlkernels.losses.info_nce.triton"


def _fake_backward(grad_loss: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(rest[:4], rest[-1])


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """The loss of each row, and the statistics that the gradients need; the last is the number of the set."""
    backward: Any
    """The gradients. One that is not wanted has no elements; the scale's then has some value."""
    step: Any = None
    """The mean or sum, and its gradients."""


NATIVE = Ops(
    define(_FORWARD.format(""), _fake_native), define(_BACKWARD.format(""), _fake_backward), define(_STEP, _fake_step)
)
_SERVED = native.served("info_nce_fwd")
TRITON = Ops(
    triton.define(_FORWARD.format("_triton"), _fake_triton, _KERNELS, "forward"),
    triton.define(_BACKWARD.format("_triton"), _fake_backward, _KERNELS, "backward"),
)


def _with(call: Call, tensors: Tensors) -> Call:
    query, key, negatives, logit_scale = tensors
    assert query is not None
    assert logit_scale is not None
    return call._replace(query=query, key=key, negatives=negatives, logit_scale=logit_scale)


class _Rows(Function):
    """(query, key, negatives, logit_scale, target, mask, query_ids, key_ids, options, ops) -> rows' losses, state."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, options, ops = args
        return ops.forward(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options, ctx.ops = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, _: Any) -> Any:
        *tensors, state = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = Call._make((*tensors, ctx.options, "none", grad_rows.dtype))
            grads = differentiate(
                lambda t: reference.rows_and_counted(_with(call, t))[0], tensors[:4], needs, grad_rows
            )
        else:
            grads = where_needed(ctx.ops.backward(grad_rows, state, *tensors, *ctx.options, needs), needs)
        return *grads, *(None,) * 6


def _run(ops: Ops, call: Call) -> Tensor:
    query, key, negatives, scale = call.differentiable
    tensors = (query, key, negatives, as_tensor(scale, query.device))
    rest: tuple[Any, ...] = (call.target, call.mask, call.query_ids, call.key_ids)
    options: Options = call.options
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    narrow = any(t is not None and t.dtype == torch.float16 for t in tensors)
    if ops.step and wanted and call.reduction != "none" and not narrow and plain(*tensors):

        def compute(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
            loss, *grads = ops.step(*tensors, *rest, *options, call.reduction == "mean", needs)
            return loss, where_needed(grads, needs)

        def again(tensors: Tensors) -> Tensor:
            same = _with(call, tensors)
            return reference.loss(same._replace(dtype=compute_dtype(*tensors[:3])))

        return one_sweep(compute, again, *tensors, dtype=call.dtype)
    rows: Tensor
    rows, state = _Rows.apply(*tensors, *rest, options, ops)  # type: ignore[no-untyped-call]
    counted = (state[0, -1] > 0).sum() if options.by_label else query.shape[0]
    return reduce(rows, counted, call.reduction).to(call.dtype)


def _run_triton(call: Call) -> Tensor:
    reference.check_target(call, on_gpu=triton.CHECK)
    return _run(TRITON, call)


IMPLEMENTATIONS = (
    Implementation("native", lambda call: refuse_native(call.query, served=_SERVED), partial(_run, NATIVE)),
    Implementation("triton", lambda call: refuse_triton(call.query), _run_triton, by_name_only=triton.INTERPRETED),
    Implementation("reference", lambda call: None, reference.loss),
)
