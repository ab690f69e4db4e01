"""Arguments of top-k distillation and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import INTEGER
from tlkernels.losses.distillation.call import Options as DistillationOptions
from tlkernels.losses.distillation.call import check_device, check_floating, check_options
from tlkernels.losses.distillation.call import plain_options as plain_distillation_options
from tlkernels.losses.selective_log_softmax.call import in_range
from tlkernels.losses.selective_log_softmax.call import plain_options as plain_student_options

TAILS = ("bucket", "renormalize", "ignore")


class Options(NamedTuple):
    """The options of a call."""

    distillation: DistillationOptions
    tail: str
    softcap: float | None


class Arguments(NamedTuple):
    """The arguments of a call that do not depend on whether the student gives logits or a linear layer."""

    indices: Tensor
    """(N, K), int64, contiguous; -1 means no class."""
    log_probs: Tensor
    """(N, K)"""
    target: Tensor | None
    """(N,), int64"""
    row_weight: Tensor | None
    """(N,)"""
    classes: int
    options: Options
    rows: torch.Size
    """The shape of the rows before they were flattened."""
    reduction: str

    def ignored(self) -> Tensor | None:
        """Return which rows are ignored."""
        return None if self.target is None else self.target == self.options.distillation.ignore_index

    def skipped(self) -> Tensor | None:
        """Return the rows that the loss and its gradients do not depend on: ignored ones and those of weight 0."""
        ignored, weight = self.ignored(), self.row_weight
        if weight is None or weight.requires_grad:
            return ignored
        return weight == 0 if ignored is None else ignored | (weight == 0)

    def denominator(self) -> Tensor | int:
        """Return the divisor of "mean": the number of rows that are not ignored."""
        ignored = self.ignored()
        return self.indices.shape[0] if ignored is None else (~ignored).sum()


def plain_options(
    target: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    tail: str,
    hard_weight: float,
    ignore_index: int,
    softcap: float | None,
) -> Options:
    """Return the options as Python numbers.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """
    shared = plain_distillation_options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing=0.0, softcap=None
    )
    if tail not in TAILS:
        raise ValueError(f"tail: expected one of {TAILS}, got {tail!r}")
    return Options(shared, tail, plain_student_options(shared.temperature, softcap).softcap)


def check(
    index: Tensor, log_probs: Tensor, options: Options, reduction: str, student: Tensor, classes: int
) -> Arguments:
    """Return the arguments of a call if they are valid; `student` holds logits or features, of shape (..., any).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not match, or an option is out of range.
        IndexError: a class index is out of range; only on CPU, outside of torch.compile.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"teacher_index: expected a Tensor, got {type(index).__name__}")
    if index.dtype not in INTEGER:
        raise TypeError(f"teacher_index: expected class indices of an integer dtype, got {index.dtype}")
    check_floating("teacher_log_probs", log_probs)
    rows = student.shape[:-1]
    if index.dim() != student.dim() or index.shape[:-1] != rows or index.shape[-1] == 0:
        raise ValueError(f"teacher_index: expected shape {(*rows, 'K')} with K above 0, got {tuple(index.shape)}")
    if log_probs.shape != index.shape:
        raise ValueError(
            f"teacher_log_probs: expected the shape of teacher_index {tuple(index.shape)}, got {tuple(log_probs.shape)}"
        )
    check_device("teacher_index", index, student)
    check_device("teacher_log_probs", log_probs, student)
    check_options(options.distillation, student, reduction)
    target, row_weight = options.distillation.target, options.distillation.row_weight
    if target is not None:
        target = target.reshape(-1).long()
        ignored = target == options.distillation.ignore_index
        in_class_range = in_range("target", target.masked_fill(ignored, 0), classes)
        target = in_class_range.masked_fill(ignored, options.distillation.ignore_index)
    if row_weight is not None:
        row_weight = row_weight.reshape(-1)
    k = index.shape[-1]
    index = in_range("teacher_index", index.reshape(-1, k).long(), classes, least=-1).contiguous()
    return Arguments(index, log_probs.reshape(-1, k), target, row_weight, classes, options, rows, reduction)
