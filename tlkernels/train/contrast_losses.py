"""The losses of `tlkernels contrast`: tlkernels', and the lines that PyTorch's users write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train.contrast_config import ContrastLossConfig
from tlkernels.train.task import OURS, Loss


def losses(config: ContrastLossConfig, group: Any, slices: int | None) -> dict[str, Loss]:
    """Return the losses by name. Each takes embeddings of 2-norm 1, and is the mean over the batch.

    Args:
        config: the loss and its options.
        group: the process group over which the batch is split; None: there is one process.
        slices: rows of the micro-batches. With them, `info_nce` is compared with eager PyTorch in slices, which is what
            the cached losses of sentence-transformers compute.
    """
    ways: dict[str, Loss] = {OURS: _ours(config, group), "eager": _ours(config, group, "reference")}
    if config.name == "info_nce":
        ways["eager"] = _eager(config)
        if slices is not None:
            ways["eager in slices"] = _sliced(config, slices)
    return ways


def _ours(config: ContrastLossConfig, group: Any, impl: str | None = None) -> Loss:
    options: Any = {"group": group, "impl": impl or config.impl}

    def info_nce(q: Tensor, k: Tensor, negatives: Any, ids: Tensor, labels: Any, scale: Tensor, bias: Any) -> Tensor:
        return tlk.info_nce(
            q, k, logit_scale=scale, negatives=negatives, mask=(ids, ids), symmetric=config.symmetric,
            label_smoothing=config.label_smoothing, **options,
        )  # fmt: skip

    def sigmoid(q: Tensor, k: Tensor, negatives: Any, ids: Tensor, labels: Any, scale: Tensor, bias: Tensor) -> Tensor:
        return tlk.sigmoid_contrastive(q, k, logit_scale=scale, logit_bias=bias, **options)

    def nt_xent(q: Tensor, k: Tensor, negatives: Any, ids: Any, labels: Any, scale: Tensor, bias: Any) -> Tensor:
        return tlk.nt_xent(q, k, logit_scale=scale, normalize=False, **options)

    def sup_con(q: Tensor, k: Any, negatives: Any, ids: Any, labels: Tensor, scale: Tensor, bias: Any) -> Tensor:
        return tlk.sup_con(q, labels, logit_scale=scale, normalize=False, **options)

    by_name: dict[str, Loss] = {"info_nce": info_nce, "sigmoid": sigmoid, "nt_xent": nt_xent, "sup_con": sup_con}
    return by_name[config.name]


def _eager(config: ContrastLossConfig) -> Loss:
    def loss(q: Tensor, k: Tensor, negatives: Any, ids: Tensor, labels: Any, scale: Tensor, bias: Any) -> Tensor:
        rows = torch.arange(len(q), device=q.device)
        return _cross_entropies(config, q, k, negatives, ids, scale, rows) / len(q)

    return loss


def _cross_entropies(
    config: ContrastLossConfig, q: Tensor, k: Tensor, negatives: Tensor | None, ids: Tensor, scale: Tensor, rows: Tensor
) -> Tensor:
    """Return the sum over some rows of the batch, in plain PyTorch."""
    keys = k if negatives is None else torch.cat([k, negatives])
    known = ids[rows, None] == ids
    known = known & (rows[:, None] != torch.arange(len(k), device=k.device))  # false negatives, not the positive
    smoothing = config.label_smoothing

    def one(mine: Tensor, others: Tensor) -> Tensor:
        hidden = functional.pad(known, (0, len(others) - known.shape[1]))
        logits = (scale * mine[rows] @ others.T).masked_fill(hidden, -torch.inf)
        loss = functional.cross_entropy(logits, rows, reduction="sum")
        if smoothing == 0:
            return loss
        # PyTorch's label smoothing is infinite if a logit is; the uniform distribution is that over the other keys.
        log_p = logits.log_softmax(1).masked_fill(hidden, 0.0)
        return (1 - smoothing) * loss - smoothing * (log_p.sum(1) / (~hidden).sum(1)).sum()

    forward = one(q, keys)
    return (forward + one(k, q)) / 2 if config.symmetric else forward


def _sliced(config: ContrastLossConfig, rows_at_a_time: int) -> Loss:
    def loss(q: Tensor, k: Tensor, negatives: Any, ids: Tensor, labels: Any, scale: Tensor, bias: Any) -> Tensor:
        tensors = (q, k, scale) if negatives is None else (q, k, scale, negatives)
        apply: Any = _Slices.apply
        result: Tensor = apply(config, rows_at_a_time, ids, *tensors)
        return result

    return loss


class _Slices(Function):
    """The loss and its gradients in one forward pass, for some rows of the batch at a time."""

    @staticmethod
    def forward(ctx: Any, config: ContrastLossConfig, rows_at_a_time: int, ids: Tensor, *tensors: Tensor) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        q, k, scale, *negatives = leaves
        total = q.new_zeros(())
        with torch.enable_grad():
            for rows in torch.arange(len(q), device=q.device).split(rows_at_a_time):
                part = _cross_entropies(config, q, k, negatives[0] if negatives else None, ids, scale, rows) / len(q)
                part.backward()
                total += part.detach()
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, None, *(grad * upstream[0] for grad in ctx.saved_tensors)
