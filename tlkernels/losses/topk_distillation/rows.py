"""Top-k distillation in plain PyTorch, from the student's log-probabilities of the teacher's classes."""

from collections.abc import Callable

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation.reference import divergence_of
from tlkernels.losses.topk_distillation.call import Arguments

Select = Callable[[Tensor, float], Tensor]
"""(class indices (N, K), temperature) -> the student's log-probabilities (N, K); -1 is no class: -inf."""


def loss(call: Arguments, select: Select, dtype: torch.dtype) -> Tensor:
    """Return the loss in `dtype`."""
    reduction = "mean" if call.reduction == "batchmean" else call.reduction
    value = reduce(_losses(call, select), call.denominator(), reduction).to(dtype)
    return value.reshape(call.rows) if reduction == "none" else value


def _losses(call: Arguments, select: Select) -> Tensor:
    """Return the loss of each row, in the dtype of the computation."""
    options, skipped = call.options.distillation, call.skipped()
    temperature, hard_weight = options.temperature, options.hard_weight
    index, target = call.indices, call.target
    if skipped is not None:  # rows without a class cost nothing
        index = index.masked_fill(skipped.unsqueeze(-1), -1)
        target = None if target is None else target.masked_fill(skipped, -1)
    hard = None
    if not hard_weight or target is None:
        log_p = select(index, temperature)
    elif temperature == 1:  # the target is one more class of the same sweep
        log_p = select(torch.cat([index, target.unsqueeze(-1)], -1), temperature)
        log_p, hard = log_p[:, :-1], -log_p[:, -1]
    else:
        log_p, hard = select(index, temperature), -select(target.unsqueeze(-1), 1.0).squeeze(-1)
    rows = (1 - hard_weight) * temperature**2 * _divergences(log_p, index, call)
    if hard is not None:
        rows = rows + hard_weight * hard
    if skipped is not None:
        rows = rows.masked_fill(skipped, 0)
    if call.row_weight is None:
        return rows
    weight = call.row_weight.to(rows.dtype)
    return rows * (weight if skipped is None else weight.masked_fill(skipped, 0))


def _divergences(log_p: Tensor, index: Tensor, call: Arguments) -> Tensor:
    """Return the divergence of each row; 0 in rows without a class."""
    options, tail = call.options.distillation, call.options.tail
    dtype = compute_dtype(log_p, call.log_probs)
    count = (index >= 0).sum(-1, keepdim=True)
    empty = count == 0
    # Zeros in place of empty rows: a value that is not finite would make their gradient 0 * NaN.
    log_q = call.log_probs.to(dtype).masked_fill(index < 0, -torch.inf).masked_fill(empty, 0)
    log_p = log_p.to(dtype).masked_fill(empty, 0)
    if tail == "renormalize":
        log_q, log_p = (log_q / options.temperature).log_softmax(-1), log_p.log_softmax(-1)
    else:
        whole = count == call.classes
        log_q = torch.cat([log_q, _log_rest(log_q, whole)], -1)
        log_q = (log_q / options.temperature).log_softmax(-1)
        if tail == "bucket":
            log_p = torch.cat([log_p, _log_rest(log_p, whole)], -1)
        else:
            log_q = log_q[:, :-1]
    return divergence_of(log_q, log_p, options.divergence, options.beta).masked_fill(empty.squeeze(-1), 0)


def _log_rest(log_probs: Tensor, whole: Tensor) -> Tensor:
    """Return log(1 - sum of the probabilities) of each row; -inf in rows with all classes.

    Rounding can make the sum 1 or more, and the rest infinitely improbable. So the rest is at least the dtype's eps.
    """
    total = log_probs.exp().sum(-1, keepdim=True)
    return torch.log1p(-total.clamp(max=1 - torch.finfo(total.dtype).eps)).masked_fill(whole, -torch.inf)
