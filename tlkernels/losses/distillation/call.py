"""Arguments of distillation and their validation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.autograd import is_differentiated
from tlkernels._core.dtypes import FLOATING, INTEGER, loss_dtype
from tlkernels._core.options import integer, number, smoothing

REDUCTIONS = ("none", "mean", "batchmean", "sum")
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv")
Softcap = float | tuple[float | None, float | None] | None
"""One for both sides, or (student's, teacher's)."""


class Options(NamedTuple):
    """The options of the loss of a row, in the order of the ops' arguments."""

    target: Tensor | None
    row_weight: Tensor | None
    temperature: float
    divergence: str
    beta: float
    hard_weight: float
    ignore_index: int
    label_smoothing: float
    student_softcap: float | None
    teacher_softcap: float | None


class Arguments(NamedTuple):
    """The arguments of a call."""

    student: Tensor
    teacher: Tensor
    options: Options
    reduction: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss: the promoted dtype of the logits; under autocast at least float32."""
        return loss_dtype(self.student, self.teacher)

    def denominator(self) -> Tensor | float:
        """Return the divisor of "mean": the number of rows that are not ignored."""
        return counted_rows(self.student, self.options)


def counted_rows(student: Tensor, options: Options) -> Tensor | float:
    """Return the number of rows of shape (..., C) whose target is not ignored."""
    if options.target is None:
        return math.prod(student.shape[:-1])  # unlike numel() / C, this keeps a symbolic size
    return (options.target != options.ignore_index).sum()


def absent_rows(options: Options) -> Tensor | None:
    """Return which rows do not take part: ignored ones, and those of weight 0 if `row_weight` needs no gradient."""
    target, row_weight = options.target, options.row_weight
    absent = None if target is None else target == options.ignore_index
    if row_weight is None or is_differentiated(row_weight):
        return absent
    return row_weight == 0 if absent is None else absent | (row_weight == 0)


def triton_softcaps(options: Options) -> tuple[tuple[float, float], dict[str, bool]]:
    """Return the softcaps of Triton's kernels, student's and teacher's, and whether they are used."""
    student, teacher = options.student_softcap, options.teacher_softcap
    return (student or 1.0, teacher or 1.0), {"S_CAPPED": student is not None, "T_CAPPED": teacher is not None}


def check(call: Arguments) -> Arguments:
    """Return `call` if its arguments are valid.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not match, or an option is out of range. (The implementation checks the
            range of class indices, since it reads them anyway.)
    """
    student, teacher, options, reduction = call
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        check_floating(name, tensor)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits: expected shape (..., C) with C above 0, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    check_device("teacher_logits", teacher, student)
    check_options(options, student, reduction)
    return call


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a Tensor of a supported floating-point dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    """Raise ValueError unless `tensor` is on the student's device."""
    if tensor.device != student.device:
        raise ValueError(f"{name}: expected it on the student's device {student.device}, got {tensor.device}")


def check_options(options: Options, student: Tensor, reduction: str) -> None:
    """Raise TypeError or ValueError unless the options match the student's logits or features, of shape (..., any)."""
    target, row_weight = options.target, options.row_weight
    rows = tuple(student.shape[:-1])
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if target is not None:
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a Tensor or None, got {type(target).__name__}")
        if target.dtype not in INTEGER:
            raise TypeError(f"target: expected class indices of an integer dtype, got {target.dtype}")
        if tuple(target.shape) != rows:
            raise ValueError(f"target: expected class indices of shape {rows}, got {tuple(target.shape)}")
        check_device("target", target, student)
    if row_weight is not None:
        check_floating("row_weight", row_weight)
        if tuple(row_weight.shape) != rows:
            raise ValueError(f"row_weight: expected shape {rows}, one number per row, got {tuple(row_weight.shape)}")
        check_device("row_weight", row_weight, student)


def plain_options(
    target: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: Softcap,
) -> Options:
    """Return the options as Python numbers.

    Raises:
        TypeError, ValueError: a number has the wrong type or is out of range.
    """
    temperature, beta = number("temperature", temperature), number("beta", beta)
    hard_weight = number("hard_weight", hard_weight)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, got {divergence!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1, at which the js divergence is 0, got {beta}")
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight: expected a number in [0, 1], got {hard_weight}")
    if hard_weight and target is None:
        raise ValueError(f"target: expected class indices, since hard_weight is {hard_weight}, got None")
    ignore_index, label_smoothing = integer("ignore_index", ignore_index), smoothing(label_smoothing)
    student, teacher = _softcaps(softcap)
    return Options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing, student, teacher
    )


def _softcaps(softcap: Softcap) -> tuple[float | None, float | None]:
    """Return the softcaps of student and teacher."""
    if not isinstance(softcap, (tuple, list)):
        cap = _softcap("softcap", softcap)
        return cap, cap
    if len(softcap) != 2:
        raise ValueError(f"softcap: expected one number or a pair (student's, teacher's), got {len(softcap)} values")
    student, teacher = softcap
    return _softcap("softcap[0]", student), _softcap("softcap[1]", teacher)


def _softcap(name: str, value: float | None) -> float | None:
    cap = None if value is None else number(name, value)
    if cap is not None and not 0 < cap < float("inf"):
        raise ValueError(f"{name}: expected None or a finite number above 0, got {cap}")
    return cap
