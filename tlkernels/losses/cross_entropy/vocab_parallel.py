"""Cross entropy over classes that the ranks of a process group share: each rank has the logits of its own classes.

Each rank computes its rows' loss and normaliser over its own classes. With r a rank, q the target's terms (see
`second_order.py`) and Q_r the sum of q over the rank's classes, the loss of the whole row is

    sum_r (loss_r + Q_r * (lse - lse_r)) + z_loss * lse^2,      lse = logsumexp_r lse_r

so a few numbers of each row are gathered, and all ranks add them up in one order: they get the same bits. The backward
of each rank is that of its own classes for the normaliser of the whole row. There a = g * (Q + 2 * z_loss * lse) + h,
where the kernel knows only Q_r: g * (Q - Q_r) is added to h.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tlkernels._core.autograd import Needs, Tensors
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.reduction import reduce, sum_in_order
from tlkernels.losses.cross_entropy.call import Arguments, CrossEntropyOutput, Options, class_axis

Forward = Callable[..., Any]
"""(target, options, stats) -> loss, peak, log_sum; and with `stats` entropy and correct."""
Backward = Callable[..., Tensors]
"""(grad_loss, grad_lse, grad_entropy, target, peak, log_sum, entropy, options, needs) -> gradients of the inputs."""

_IGNORED, _ELSEWHERE, _OUT_OF_RANGE = -2, -1, -3  # class indices; the ops know the first two


class _Part(NamedTuple):
    """This rank's part of the classes, and each position's target in it."""

    target: Tensor
    """Class indices in this part or one of the constants above; or probabilities."""
    counted: Tensor
    here: Tensor
    """Whether the target's class is in this part; for probabilities, their maximum."""
    weight: Tensor
    """Weight of the target's class if it is here, or else 0; for probabilities, 1 on the first rank."""
    mass: Tensor
    """Q_r."""
    options: Options


def cross_entropy(call: Arguments, forward: Forward, backward: Backward, inputs: Tensors) -> Any:
    """Return the loss; with `stats`, a CrossEntropyOutput.

    Args:
        call: the call; of `input` only shape, dtype and device are used.
        forward, backward: compute this rank's part.
        inputs: the tensors that `backward` returns gradients for.
    """
    part = _part(call)
    losses, weights, *stats = _Rows.apply(call, part, forward, backward, *inputs)  # type: ignore[no-untyped-call]
    denominator = _denominator(call, part, weights) if call.reduction == "mean" else 1
    weightless = call.weightless()
    if weightless is not None:
        losses, *stats = (values.masked_fill(weightless, 0) for values in (losses, *stats))
    loss = reduce(call.weighted(losses), denominator, call.reduction).to(call.dtype)
    return CrossEntropyOutput(loss, *stats) if call.stats else loss


def _denominator(call: Arguments, part: _Part, weights: Tensor) -> Tensor | float:
    if part.target.is_floating_point():
        return part.counted.numel()
    if call.options.weight is None:
        return part.counted.sum()
    total = sum_in_order(weights)
    return torch.where(total == 0, torch.nan, total)


def _part(call: Arguments) -> _Part:
    input, target, options = call.input, call.target, call.options
    axis, dtype, group = class_axis(input), compute_dtype(input), call.vocab_group
    classes = input.shape[axis]
    sizes = _gathered(torch.tensor([classes], device=input.device), group)
    first, all_classes = sizes[: dist.get_rank(group)].sum(), sizes.sum()
    # The total is needed on the host only for smoothing.
    num_classes = int(all_classes) if options.label_smoothing else classes
    weight = None if options.weight is None else options.weight.to(dtype)
    keep = 1 - options.label_smoothing
    spread = options.label_smoothing / num_classes * (classes if weight is None else sum_in_order(weight))
    changed = options._replace(ignore_index=_IGNORED, num_classes=num_classes)
    if target.is_floating_point():
        shape = [-1 if k == axis else 1 for k in range(input.dim())]
        of_class = target if weight is None else target.to(dtype) * weight.view(shape)
        mass = keep * of_class.sum(axis, dtype=dtype) + spread
        first_rank = torch.full_like(mass, dist.get_rank(group) == 0)
        largest = target.amax(axis).to(dtype) if classes else torch.full_like(mass, -torch.inf)
        return _Part(target, torch.ones_like(mass, dtype=torch.bool), largest, first_rank, mass, changed)
    target = target.long()
    counted = target != options.ignore_index
    valid = (target >= 0) & (target < all_classes)
    _check_range(target, valid | ~counted, all_classes)
    at = target - first
    here = counted & (at >= 0) & (at < classes)
    local = torch.where(here, at, torch.where(valid, _ELSEWHERE, _OUT_OF_RANGE)).masked_fill(~counted, _IGNORED)
    of_target = here.to(dtype)
    if weight is not None and classes:
        of_target = of_target * weight[at.clamp(0, classes - 1)]
    mass = (keep * of_target + spread) * counted
    return _Part(local, counted, here.to(dtype), of_target, mass, changed)


def _check_range(target: Tensor, valid: Tensor, classes: Tensor) -> None:
    """Raise IndexError for a class index out of range. On a GPU the row is NaN instead."""
    if target.device.type == "cpu" and not valid.all():
        position = int((~valid).flatten().nonzero()[0])
        raise IndexError(
            f"target: expected class indices in [0, {int(classes)}) or ignore_index, got "
            f"{int(target.flatten()[position])} at position {position}"
        )


def _gathered(values: Tensor, group: Any) -> Tensor:
    """Return the tensors of all ranks, which have one shape, along a new first axis."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.stack(parts)


class _Whole(NamedTuple):
    """What all ranks know of each position."""

    loss: Tensor
    weight: Tensor
    peak: Tensor
    log_sum: Tensor
    mass: Tensor
    """Q."""
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor | None


def _join(of_ranks: Tensor, part: _Part, stats: bool) -> _Whole:
    """Join the numbers of all ranks, (rank, number, position)."""
    peaks, log_sums, losses, masses, here, weights, *more = of_ranks.unbind(1)
    options = part.options
    factor = (options.softcap or 1) / options.temperature
    empty = peaks == -torch.inf  # a part whose logits are all -inf has no share
    peak = peaks.amax(0)
    logs = ((peaks - peak) * factor + log_sums).masked_fill(empty, -torch.inf)
    log_sum = logs.logsumexp(0).masked_fill(empty.all(0), torch.nan)
    beyond = log_sum - logs  # lse - lse_r
    no_share = torch.where(masses == 0, 0.0, masses * torch.inf)
    loss = torch.where(empty, no_share, losses + masses * beyond.masked_fill(empty, 0)).sum(0)
    loss = loss.masked_fill(empty.all(0), torch.nan)
    lse = peak * factor + log_sum
    if options.z_loss:
        loss = loss + options.z_loss * lse * lse
    loss, lse = loss.masked_fill(~part.counted, 0), lse.masked_fill(~part.counted, 0)
    entropy = correct = None
    if stats:
        entropies, corrects = more
        shares = (-beyond).exp()
        parts = torch.where(shares == 0, 0.0, shares * (entropies + beyond.masked_fill(shares == 0, 0)))
        entropy = parts.sum(0).masked_fill(~part.counted, 0)
        # The first largest logit is the target's: both are on one rank, and there the first largest is the target's.
        nan = log_sums.isnan() & ~empty
        best = torch.where(nan.any(0), nan.to(torch.uint8).argmax(0), peaks.argmax(0))
        owner = here.argmax(0)
        correct = (corrects.gather(0, owner[None])[0] != 0) & (best == owner) & part.counted
    return _Whole(loss, weights.sum(0), peak, log_sum, masses.sum(0), lse, entropy, correct)


class _Rows(Function):
    """Loss and target's weight of each position; and with `stats` lse, entropy and correct."""

    @staticmethod
    def forward(ctx: Any, call: Arguments, part: _Part, forward: Forward, backward: Backward, *inputs: Any) -> Any:
        local = forward(part.target, part.options._replace(z_loss=0.0), call.stats)
        loss, peak, log_sum, *stats = local
        numbers = [peak, log_sum, loss, part.mass, part.here, part.weight, *(value.to(peak.dtype) for value in stats)]
        whole = _join(_gathered(torch.stack(numbers), call.vocab_group), part, call.stats)
        ctx.save_for_backward(
            *inputs, part.target, part.options.weight, whole.peak, whole.log_sum, whole.entropy, whole.mass - part.mass
        )
        ctx.options, ctx.backward = part.options._replace(weight=None), backward
        ctx.set_materialize_grads(False)
        if not call.stats:
            ctx.mark_non_differentiable(whole.weight)
            return whole.loss, whole.weight
        ctx.mark_non_differentiable(whole.weight, whole.correct)
        return whole.loss, whole.weight, whole.lse, whole.entropy, whole.correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any, *grads: Any) -> Any:
        *inputs, target, weight, peak, log_sum, entropy, mass_elsewhere = ctx.saved_tensors
        grad_lse, grad_entropy, _ = grads or (None, None, None)
        grad_loss = torch.zeros_like(peak) if grad_loss is None else grad_loss
        by_lse = grad_loss * mass_elsewhere
        by_lse = by_lse if grad_lse is None else by_lse + grad_lse
        normaliser = peak, log_sum, None if grad_entropy is None else entropy
        if torch.is_grad_enabled():
            raise RuntimeError("vocab_group: expected one derivative, got create_graph=True")
        needs: Needs = ctx.needs_input_grad[4:]
        options = ctx.options._replace(weight=weight)
        upstreams = grad_loss, by_lse, grad_entropy
        return None, None, None, None, *ctx.backward(*upstreams, inputs, target, *normaliser, options, needs)


def gathered_classes(local: Tensor, axis: int, group: Any) -> Tensor:
    """Return the tensors of all ranks, concatenated along the class axis; differentiable once."""
    whole: Tensor = _GatherClasses.apply(local, axis, group)  # type: ignore[no-untyped-call]
    return whole


class _GatherClasses(Function):
    """Every rank computes the loss from what it gathered, so its own part of the gradient is complete."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, axis: int, group: Any) -> Tensor:
        classes = local.shape[axis]
        sizes = _gathered(torch.tensor([classes], device=local.device), group).flatten().tolist()
        ctx.axis, ctx.first, ctx.classes = axis, sum(sizes[: dist.get_rank(group)]), classes
        padded = local.new_zeros([max(sizes) if k == axis else size for k, size in enumerate(local.shape)])
        padded.narrow(axis, 0, classes).copy_(local)
        parts = _gathered(padded, group).unbind(0)
        return torch.cat([part.narrow(axis, 0, size) for part, size in zip(parts, sizes, strict=True)], axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.narrow(ctx.axis, ctx.first, ctx.classes), None, None


def summed_gradient(tensor: Tensor, group: Any) -> Tensor:
    """Return `tensor`; its gradient is summed over the ranks, each of which has the part of its own classes."""
    result: Tensor = _SummedGradient.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


class _SummedGradient(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_over(grad, ctx.group), None


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Return the sum over the ranks, added up in the dtype of the computation."""
    total = values.to(compute_dtype(values), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)
