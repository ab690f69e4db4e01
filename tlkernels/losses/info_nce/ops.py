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
from tlkernels._core.embeddings import as_tensor
from tlkernels._core.ops import define
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
    define(_FORWARD.format(""), _fake_native, differentiable=True),
    define(_BACKWARD.format(""), _fake_backward),
    define(_STEP, _fake_step),
)
_SERVED = native.served("info_nce_fwd")
TRITON = Ops(
    triton.define(_FORWARD.format("_triton"), _fake_triton, _KERNELS, "forward", differentiable=True),
    triton.define(_BACKWARD.format("_triton"), _fake_backward, _KERNELS, "backward"),
)


_TENSORS = len(Call._fields) - 3  # and then the options


def _call(args: Args, reduction: str) -> Call:
    tensors, options = args[:_TENSORS], Options(*args[_TENSORS : _TENSORS + len(Options._fields)])
    return Call._make((*tensors, options, reduction, compute_dtype(*tensors[:3])))


def _rule(ops: Ops) -> Rule:
    """The loss of each row."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        *args, state = args
        return where_needed(ops.backward(*upstreams, state, *args, needs), needs)

    return Rule(4, backward, lambda args: reference.rows_and_counted(_call(args, "none"))[0], kept=(1,))


def _step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
    loss, *grads = NATIVE.step(*args, needs)
    return loss, grads


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)
# Behind the options comes whether the loss is the mean.
_SWEEP = Sweep(4, _step, lambda args: reference.loss(_call(args, "mean" if args[-1] else "sum")))


def _run(ops: Ops, call: Call) -> Tensor:
    query, key, negatives, scale = call.differentiable
    tensors = (query, key, negatives, as_tensor(scale, query.device))
    args = *tensors, call.target, call.mask, call.query_ids, call.key_ids, *call.options
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    narrow = any(t is not None and t.dtype == torch.float16 for t in tensors)
    if ops.step and wanted and call.reduction != "none" and not narrow and plain(*args):
        return one_sweep(_SWEEP, *args, call.reduction == "mean", dtype=call.dtype)
    rows: Tensor
    rows, state = apply(ops.forward, *args)
    counted = (state[0, -1] > 0).sum() if call.options.by_label else query.shape[0]
    return reduce(rows, counted, call.reduction).to(call.dtype)


def _run_triton(call: Call) -> Tensor:
    reference.check_target(call, on_gpu=triton.CHECK)
    return _run(TRITON, call)


def _tensors(call: Call) -> Tensors:
    """What a call is refused by; a scale may be on the CPU whatever the rest is on."""
    return call.query, call.key, call.negatives, call.target, call.mask, call.query_ids, call.key_ids


IMPLEMENTATIONS = (
    Implementation(
        "native",
        lambda call: refuse_native(*_tensors(call), served=_SERVED) or refuse_transforms(),
        partial(_run, NATIVE),
    ),
    Implementation(
        "triton",
        lambda call: refuse_triton(*_tensors(call)) or refuse_transforms(),
        _run_triton,
        by_name_only=triton.INTERPRETED,
    ),
    Implementation("reference", lambda call: None, in_pytorch(reference.loss)),
)
