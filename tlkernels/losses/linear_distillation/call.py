"""Arguments of linear distillation and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import autocasts, loss_dtype
from tlkernels.losses.distillation.call import (
    Options,
    check_device,
    check_floating,
    check_options,
    counted_rows,
)


class Layers(NamedTuple):
    """The tensors of both layers, in the order of the ops' arguments."""

    student_input: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    @property
    def student(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors of the student's layer."""
        return self.student_input, self.student_weight, self.student_bias

    @property
    def teacher(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors of the teacher's layer."""
        return self.teacher_input, self.teacher_weight, self.teacher_bias


class Arguments(NamedTuple):
    """The arguments of a call."""

    layers: Layers
    options: Options
    reduction: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss: the promoted dtype of both inputs; under autocast at least float32."""
        return loss_dtype(self.layers.student_input, self.layers.teacher_input)

    def denominator(self) -> Tensor | float:
        """Return the divisor of "mean": the number of rows that are not ignored."""
        return counted_rows(self.layers.student_input, self.options)


def check(call: Arguments) -> Arguments:
    """Return `call` if its arguments are valid.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not match, or an option is out of range. (The implementation checks the
            range of class indices, since it reads them anyway.)
    """
    layers, options, reduction = call
    student = layers.student_input
    for name, tensor in layers._asdict().items():
        if tensor is not None or not name.endswith("bias"):
            check_floating(name, tensor)
            check_device(name, tensor, student)
    _check_layer("student", *layers.student)
    _check_layer("teacher", *layers.teacher)
    if layers.teacher_input.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_input: expected the rows of student_input {tuple(student.shape[:-1])}, "
            f"got {tuple(layers.teacher_input.shape[:-1])}"
        )
    classes = layers.student_weight.shape[0]
    if layers.teacher_weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight: expected {classes} classes as in student_weight, got {tuple(layers.teacher_weight.shape)}"
        )
    check_options(options, student, reduction)
    return call


def _check_layer(side: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dim() == 0:
        raise ValueError(f"{side}_input: expected shape (..., features), got ()")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{side}_weight: expected shape (classes, {input.shape[-1]}) with at least one class, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype and not autocasts(input.device):
            raise TypeError(f"{side}_{name}: expected the dtype of {side}_input, {input.dtype}, got {tensor.dtype}")
