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
    ignored = call.ignored()
    # Zeros in place of ignored logits: a logit that is not finite would make its gradient 0 * NaN.
    loss = _loss(call if ignored is None else call._replace(input=call.input.masked_fill(ignored, 0)))
    return CrossEntropyOutput(loss, *_statistics(call, ignored)) if call.stats else loss


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
    loss = rows
    if call.reduction != "none":
        loss = rows.sum()
    if call.reduction == "mean":
        loss = loss / call.denominator()
    return loss.to(call.dtype)


def _statistics(call: Arguments, ignored: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse, entropy and correct."""
    z, target, axis = scaled_logits(call), call.target, class_axis(call.input)
    lse = torch.logsumexp(z, axis)
    best = call.input.argmax(axis)
    if ignored is None:
        correct = best == target.argmax(axis)
    else:
        ignored = ignored.squeeze(axis)
        correct = (best == target) & ~ignored
        # An lse that is not finite has no gradient: even an upstream of 0 would make the row's gradient NaN.
        undefined = ignored & ~lse.detach().isfinite()
        finite = scaled_logits(call._replace(input=call.input.masked_fill(undefined.unsqueeze(axis), 0)))
        lse = torch.where(undefined, lse.detach(), torch.logsumexp(finite, axis))
    log_p = z.detach().log_softmax(axis)
    p = log_p.exp()
    return lse, -torch.where(p == 0, p, p * log_p).sum(axis), correct
