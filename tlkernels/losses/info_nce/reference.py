"""Reference and test oracle of InfoNCE, nt_xent and sup_con: plain PyTorch, any device, differentiable to any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.autograd import eager
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.embeddings import numbers
from tlkernels._core.reduction import reduce
from tlkernels.losses.info_nce.call import Arguments


def loss(call: Arguments) -> Tensor:
    """Return the loss."""
    rows, counted = rows_and_counted(call)
    return reduce(rows, counted, call.reduction).to(call.dtype)


def rows_and_counted(call: Arguments) -> tuple[Tensor, Tensor | int]:
    """Return the loss of each row in the dtype of the computation, and the divisor of "mean"."""
    with torch.autocast(call.query.device.type, enabled=False):
        return _by_label(call) if call.options.by_label else _by_target(call)


def _logits(call: Arguments) -> tuple[Tensor, int]:
    """Return the logits of all columns, and how many of them are keys."""
    compute = compute_dtype(call.query, call.key, call.negatives)

    def prepared(x: Tensor) -> Tensor:
        x = x.to(compute)
        return F.normalize(x, dim=-1) if call.options.normalize else x

    query = prepared(call.query)
    key = query if call.key is None else prepared(call.key)
    similarities = query @ key.T
    if call.negatives is not None:
        negatives = prepared(call.negatives)
        further = query @ negatives.T if negatives.dim() == 2 else (negatives @ query.unsqueeze(2)).squeeze(2)
        similarities = torch.cat([similarities, further], 1)
    scale = call.logit_scale
    return similarities * (scale.to(compute) if isinstance(scale, Tensor) else scale), key.shape[0]


def _to_itself(call: Arguments, columns: int) -> Tensor:
    """Return which entries are a row's similarity to itself."""
    row = numbers(call.query.shape[0], call.query).unsqueeze(1)
    return numbers(columns, call.query) == row + call.options.self_column


def _same_id(call: Arguments) -> Tensor:
    assert call.query_ids is not None
    key_ids = call.query_ids if call.key_ids is None else call.key_ids
    return call.query_ids.unsqueeze(1).long() == key_ids.long()


def _by_label(call: Arguments) -> tuple[Tensor, Tensor]:
    logits, columns = _logits(call)
    to_itself = _to_itself(call, columns)
    positive = _same_id(call) & ~to_itself
    count = positive.sum(1)
    # A row without positives keeps that entry: its softmax must not be empty.
    log_p = logits.masked_fill(to_itself & (count > 0).unsqueeze(1), -torch.inf).log_softmax(1)
    total = log_p.masked_fill(~positive, 0).sum(1)
    rows = torch.where(count > 0, -total / count.clamp(min=1), 0)
    return rows, (count > 0).sum()


def check_target(call: Arguments, on_gpu: bool = False) -> None:
    """Raise IndexError for a target out of range. Without `on_gpu` it skips GPU tensors, whose row becomes NaN."""
    query, target = call.query, call.target
    columns = [query if call.key is None else call.key] + [call.negatives] * (call.negatives is not None)
    classes = sum(x.shape[-2] for x in columns if x is not None)
    if call.options.by_label or not eager(query, target):
        return
    if query.device.type != "cpu" and not on_gpu:
        return
    if target is None:
        if query.shape[0] <= classes:
            return
        target = torch.arange(query.shape[0], device=query.device)
    wrong = (target.long() < 0) | (target.long() >= classes)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise IndexError(f"target: expected indices of keys in [0, {classes}), got {target[i]} at position {i}")


def _by_target(call: Arguments) -> tuple[Tensor, int]:
    check_target(call)
    logits, keys = _logits(call)
    rows, classes = logits.shape
    target = numbers(rows, logits) if call.target is None else call.target.long()
    masks = [call.mask] if call.mask is not None else []
    masks += [_same_id(call)] if call.query_ids is not None else []
    masks += [_to_itself(call, keys)] if call.options.self_column >= 0 else []
    mask = None
    if masks:
        mask = torch.stack([F.pad(each, (0, classes - each.shape[1])) for each in masks]).any(0)
        mask = mask & (numbers(classes, logits) != target.unsqueeze(1))
    smoothing = call.options.label_smoothing
    losses = _cross_entropy(logits, mask, target, smoothing)
    if call.options.symmetric:
        mask = None if mask is None else mask[:, :keys].T
        losses = (losses + _cross_entropy(logits[:, :keys].T, mask, target, smoothing)) / 2
    return losses, rows


def _cross_entropy(logits: Tensor, mask: Tensor | None, target: Tensor, smoothing: float) -> Tensor:
    log_p = (logits if mask is None else logits.masked_fill(mask, -torch.inf)).log_softmax(1)
    log_p_target = log_p.gather(1, target.clamp(0, max(logits.shape[1] - 1, 0)).unsqueeze(1)).squeeze(1)
    losses = torch.where((target >= 0) & (target < logits.shape[1]), -log_p_target, torch.nan)
    if not smoothing:
        return losses
    uniform = log_p.mean(1) if mask is None else log_p.masked_fill(mask, 0).sum(1) / (~mask).sum(1)
    return (1 - smoothing) * losses - smoothing * uniform
