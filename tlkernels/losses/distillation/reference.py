"""Reference and test oracle: distillation in plain PyTorch, on any device, differentiable to any order."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation.call import Arguments, Options, absent_rows


def distillation(call: Arguments) -> Tensor:
    """Return the loss."""
    rows = losses(call.student, call.teacher, call.options)
    mean = call.reduction in ("mean", "batchmean")
    return reduce(rows, call.denominator(), "mean" if mean else call.reduction).to(call.dtype)


def losses(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """Return the loss of each row, in the dtype of the computation."""
    target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing, *caps = options
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    absent = absent_rows(options)
    if absent is not None:
        student = student.masked_fill(absent.unsqueeze(-1), 0)
        teacher = teacher.masked_fill(absent.unsqueeze(-1), 0)
    student, teacher = (_capped(x, cap) for x, cap in zip((student, teacher), caps, strict=True))
    log_q = (teacher / temperature).log_softmax(-1)
    log_p = (student / temperature).log_softmax(-1)
    rows = (1 - hard_weight) * temperature**2 * divergence_of(log_q, log_p, divergence, beta)
    if target is not None:  # also if hard_weight is 0, since a class index out of range is an error
        hard = F.cross_entropy(
            student.reshape(-1, student.shape[-1]),
            target.reshape(-1).long(),
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        ).view(target.shape)
        rows = rows + hard_weight * hard if hard_weight else rows
    if row_weight is not None:
        rows = rows * row_weight.to(dtype)
    return rows if absent is None else rows.masked_fill(absent, 0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def divergence_of(log_q: Tensor, log_p: Tensor, name: str, beta: float) -> Tensor:
    """Return the divergence of each row; the teacher's distribution is q, the student's p."""
    if name == "forward_kl":
        return _kl(log_q, log_p)
    if name == "reverse_kl":
        return _kl(log_p, log_q)
    if name == "tv":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    both_zero = (log_q == -torch.inf) & (log_p == -torch.inf)
    parts = log_q + math.log(beta), log_p + math.log1p(-beta)
    log_m = torch.stack([part.masked_fill(both_zero, 0) for part in parts]).logsumexp(0)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return sum a * (log a - log b). Where a is 0, the term and its derivative are 0."""
    zero = log_a.exp() == 0
    log_a = log_a.masked_fill(zero, 0)
    return (log_a.exp() * (log_a - log_b.masked_fill(zero, 0))).masked_fill(zero, 0).sum(-1)
