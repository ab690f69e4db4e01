"""InfoNCE's ops: schemas, fakes, autograd, and the list of implementations; nt_xent and sup_con call them too.

One op computes the loss of each row, another the gradients. The extension also has `step`, which under plain autograd
computes a reduced loss along with its gradients: on CPU it keeps a small matrix of logits from the first sweep to the
second, and on every device it saves a small call the nodes in autograd's graph.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import flops, native, triton
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
from tlkernels._core.loss import Op, define_ops, implementations, in_one_sweep, take
from tlkernels._core.reduction import reduce
from tlkernels.losses.info_nce import reference
from tlkernels.losses.info_nce.call import Arguments, Inputs, Options

_INPUT = (
    "Tensor query, Tensor? key, Tensor? negatives, Tensor logit_scale, Tensor? target, Tensor? mask,"
    " Tensor? query_ids, Tensor? key_ids,"
    " int self_column, bool by_label, bool symmetric, bool normalize, float label_smoothing"
)
_GRADIENTS = "Tensor grad_query, Tensor grad_key, Tensor grad_negatives, Tensor grad_logit_scale"
_FORWARD = f"fwd({_INPUT}) -> (Tensor loss, Tensor state)"


def _fake_loss(inputs: Inputs) -> Tensor:
    compute = compute_dtype(inputs.query, inputs.key, inputs.negatives)
    return inputs.query.new_empty(inputs.query.shape[:1], dtype=compute)


def _fake_forward(*args: Any, statistics: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    inputs, options = take(Inputs, args)
    directions, loss = 1 + Options(*options).symmetric, _fake_loss(inputs)
    return loss, loss.new_empty((directions, statistics, *loss.shape), dtype=dtype)


_fake_native = partial(_fake_forward, statistics=6, dtype=torch.float64)  # kStatistics in info_nce/kernel.h
_fake_triton = partial(_fake_forward, statistics=5)  # STATISTICS in triton.py


def _fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    inputs, (*_, (needs_query, needs_key, needs_negatives, _)) = take(Inputs, args)
    query, key, negatives, logit_scale = inputs.differentiable
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and needed
        else query.new_empty((0,))
        for tensor, needed in (
            (query, needs_query),
            (key, needs_key),
            (negatives, needs_negatives),
            (logit_scale, True),
        )
    )


def _fake_step(*args: Any) -> tuple[Tensor, ...]:
    inputs, _ = take(Inputs, args)
    return _fake_loss(inputs).new_empty(()), *_fake_gradients(*args)


def _flops(query: Any, key: Any, negatives: Any, state: Any = None, needs: Needs = (False,) * 4, **_: Any) -> int:
    needs_query, needs_key, needs_negatives = needs[:3]
    total = 0
    for columns, needs_columns in ((key or query, needs_key and key is not None), (negatives, needs_negatives)):
        if columns is not None:
            product, gradients = flops.of_product(query, columns[-2:]), needs_query + needs_columns
            total += product * gradients
            if state is None or gradients:  # a backward for the scale alone computes no similarities
                # Without a key, similarities are a symmetric matrix, of which a half is computed.
                total += product // 2 if columns is query else product
    return total


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Loss of each row, and `state`: the rows' softmax statistics, of which the last is the number of positives."""
    backward: Any
    """The gradients, given that of each row's loss. One that is not needed is an empty tensor, but that of the scale
    always has a value, which is undefined where it is not needed."""
    step: Any = None
    """The reduced loss and its gradients."""


NATIVE, TRITON = define_ops(
    Ops,
    "info_nce",
    {
        "backward": Op(
            f"bwd(Tensor grad_loss, Tensor state, {_INPUT}, bool[4] needs) -> ({_GRADIENTS})",
            lambda grad_loss, state, *args: _fake_gradients(*args),
        ),
    },
    only_native={
        "forward": Op(_FORWARD, _fake_native, differentiable=True),
        "step": Op(f"step({_INPUT}, bool mean, bool[4] needs) -> (Tensor loss, {_GRADIENTS})", _fake_step),
    },
    only_triton={"forward": Op(_FORWARD, _fake_triton, differentiable=True)},
    flops=_flops,
)


def _call(args: Args, reduction: str) -> Arguments:
    inputs, options = take(Inputs, args)
    return Arguments(*inputs, Options(*options), reduction, compute_dtype(inputs.query, inputs.key, inputs.negatives))


def _rule(ops: Ops) -> Rule:
    """Return the rule for the losses of rows."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        *args, state = args
        return where_needed(ops.backward(*upstreams, state, *args, needs), needs)

    def rows(args: Args) -> Tensor:
        *args, _ = args
        return reference.rows_and_counted(_call(args, "none"))[0]

    return Rule(4, backward, rows, kept=(1,))


def _one_sweep() -> Sweep:
    """Return the sweep for the reduced loss of (*inputs, *options, mean)."""

    def recompute(args: Args) -> Tensor:
        *args, mean = args
        return reference.loss(_call(args, "mean" if mean else "sum"))

    return Sweep(4, NATIVE.step, recompute)


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops), _ops.backward)


def _run(ops: Ops, sweep: Sweep | None, call: Arguments) -> Tensor:
    inputs, _ = take(Inputs, call)
    inputs = inputs._replace(logit_scale=as_tensor(call.logit_scale, call.query.device))
    args = *inputs, *call.options
    if sweep and needs_grad(inputs.differentiable) and in_one_sweep(inputs.differentiable, args, call.reduction):
        return one_sweep(sweep, *args, call.reduction == "mean", dtype=call.dtype)
    rows, state = apply(ops.forward, *args)
    counted = (state[0, -1] > 0).sum() if call.options.by_label else call.query.shape[0]
    return cast(reduce(rows, counted, call.reduction), call.dtype)


def _run_triton(call: Arguments) -> Tensor:
    reference.check_target(call, on_gpu=triton.CHECK)
    return _run(TRITON, None, call)


def _tensors(call: Arguments) -> Tensors:
    """Return the tensors that have to be on one device; the scale may be on the CPU."""
    return call.query, call.key, call.negatives, call.target, call.mask, call.query_ids, call.key_ids


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep()),
    triton=_run_triton,
    reference=reference.loss,
    served=native.served("info_nce_fwd"),
    tensors=_tensors,
    refuse=lambda call: refuse_transforms(),
)
