"""The oracle: cross entropy in plain PyTorch, on any device, differentiable to any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.cross_entropy.call import Call, CrossEntropyOutput, class_axis


def scaled_logits(call: Call) -> Tensor:
    """Return the logits after softcap and temperature, in the dtype of the computation."""
    z = call.input.to(compute_dtype(call.input))
    if call.options.softcap is not None:
        z = call.options.softcap * torch.tanh(z / call.options.softcap)
    return z / call.options.temperature


def cross_entropy(call: Call) -> Tensor | CrossEntropyOutput:
    """Return the loss, or the loss and statistics."""
    z, options, target = scaled_logits(call), call.options, call.target
    axis = class_axis(z)
    indices = not target.is_floating_point()
    target = target.long() if indices else target.to(z.dtype)
    weight = None if options.weight is None else options.weight.to(z.dtype)
    rows = F.cross_entropy(
        z,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction="none",
        label_smoothing=options.label_smoothing,
    )
    lse = torch.logsumexp(z, axis) if options.z_loss or call.stats else None
    if options.z_loss and lse is not None:
        penalty = options.z_loss * lse.square()
        rows = rows + (penalty.masked_fill(target == options.ignore_index, 0) if indices else penalty)
    loss = rows
    if call.reduction != "none":
        loss = rows.sum()
    if call.reduction == "mean":
        loss = loss / call.denominator()
    loss = loss.to(call.dtype)
    if not call.stats or lse is None:
        return loss
    log_p = z.detach().log_softmax(axis)
    p = log_p.exp()
    entropy = -torch.where(p == 0, p, p * log_p).sum(axis)
    best = call.input.argmax(axis)
    correct = (best == target) & (target != options.ignore_index) if indices else best == target.argmax(axis)
    return CrossEntropyOutput(loss, lse, entropy, correct)
