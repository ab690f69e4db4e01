"""Reference and test oracle: cross entropy in plain PyTorch, on any device, differentiable to any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.cross_entropy.call import Arguments, CrossEntropyOutput, class_axis


def scaled_logits(call: Arguments) -> Tensor:
    """Return the logits after softcap and temperature, in the dtype of the computation."""
    z = call.input.to(compute_dtype(call.input))
    if call.options.softcap is not None:
        z = call.options.softcap * torch.tanh(z / call.options.softcap)
    return z / call.options.temperature


def cross_entropy(call: Arguments) -> Tensor | CrossEntropyOutput:
    """Return the loss; with `stats`, a CrossEntropyOutput."""
    absent = call.absent()
    # Zeros in place of logits that do not count: one that is not finite would make its gradient 0 * NaN.
    if absent is not None:
        call = call._replace(input=call.input.masked_fill(absent.unsqueeze(class_axis(call.input)), 0))
    loss = _loss(call)
    return CrossEntropyOutput(loss, *_statistics(call, absent)) if call.stats else loss


def _loss(call: Arguments) -> Tensor:
    z, options, target = scaled_logits(call), call.options, call.target
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
    if options.z_loss:
        penalty = options.z_loss * torch.logsumexp(z, class_axis(z)).square()
        rows = rows + (penalty.masked_fill(target == options.ignore_index, 0) if indices else penalty)
    loss = rows = call.weighted(rows)
    if call.reduction != "none":
        loss = rows.sum()
    if call.reduction == "mean":
        loss = loss / call.denominator()
    return loss.to(call.dtype)


def _statistics(call: Arguments, absent: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse, entropy and correct."""
    z, axis = scaled_logits(call), class_axis(call.input)
    lse = torch.logsumexp(z, axis)
    log_p = z.log_softmax(axis)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(axis)
    target = call.target.argmax(axis) if call.target.is_floating_point() else call.target
    correct = call.input.argmax(axis) == target
    if absent is None:
        return lse, entropy, correct
    return lse.masked_fill(absent, 0), entropy.masked_fill(absent, 0), correct & ~absent
