"""The PyTorch lines that a loss of tlkernels replaces, as one writes them. They are what its speed is compared with.

The losses' own references are slower: they also define what happens in ignored rows whose logits are not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class _Lines(NamedTuple):
    run: Callable[[Any], Any]
    plain: Callable[[Any], bool]
    """Whether `run` has all options of the call."""


def lines_of(loss: str, call: Any) -> Callable[[Any], Any] | None:
    """Return what computes a call's arguments; None if other lines are needed, which are in the loss's reference."""
    lines = _LINES.get(loss)
    return lines.run if lines is not None and lines.plain(call) else None


def _cross_entropy(call: Any) -> Tensor:
    return _of_logits(call.input, call.target, call)


def _linear_cross_entropy(call: Any) -> Tensor:
    logits = F.linear(call.input, call.linear_weight, call.linear_bias)
    rows, classes = logits.shape[:-1], logits.shape[-1]
    target = call.target.reshape(-1, classes) if call.target.is_floating_point() else call.target.reshape(-1)
    loss = _of_logits(logits.reshape(-1, classes), target, call)
    return loss.view(rows) if call.reduction == "none" else loss


def _of_logits(logits: Tensor, target: Tensor, call: Any) -> Tensor:
    options = call.options
    return F.cross_entropy(
        logits,
        target if target.is_floating_point() else target.long(),
        options.weight,
        ignore_index=options.ignore_index,
        reduction=call.reduction,
        label_smoothing=options.label_smoothing,
    )


def _plain_cross_entropy(call: Any) -> bool:
    options = call.options
    return (
        (options.temperature, options.softcap, options.z_loss) == (1, None, 0)
        and call.row_weight is None
        and call.vocab_group is None
        and not call.stats
    )


def _mse(call: Any) -> Tensor:
    weight = {} if call.weight is None else {"weight": call.weight}
    return F.mse_loss(call.input, call.target, reduction=call.reduction, **weight)


def _distillation(call: Any) -> Tensor:
    temperature: float = call.options.temperature
    student, teacher = (F.log_softmax(logits / temperature, -1) for logits in (call.student, call.teacher))
    if call.reduction == "none":
        return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    loss = F.kl_div(student, teacher, log_target=True, reduction="sum")
    rows: Tensor | float = 1 if call.reduction == "sum" else call.denominator()
    return temperature**2 * loss / rows


def _plain_distillation(call: Any) -> bool:
    options = call.options
    return (
        (options.divergence, options.hard_weight) == ("forward_kl", 0)
        and options.target is None
        and options.row_weight is None
        and options.student_softcap is None
        and options.teacher_softcap is None
    )


_LINES = {
    "cross_entropy": _Lines(_cross_entropy, _plain_cross_entropy),
    "linear_cross_entropy": _Lines(_linear_cross_entropy, _plain_cross_entropy),
    "mse": _Lines(_mse, lambda call: True),
    "distillation": _Lines(_distillation, _plain_distillation),
}
