"""What a call of mse or rmse is: its tensors and options, checked."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import FLOATING, autocasts
from tlkernels._core.reduction import REDUCTIONS, sum_in_order

_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Call(NamedTuple):
    """One checked call."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    reduction: str
    eps: float | None
    """Of rmse; None for mse."""

    @property
    def common(self) -> torch.dtype:
        """The dtype that the tensors are promoted to."""
        dtype = self.input.dtype
        for tensor in (self.target, self.weight):
            if tensor is not None and tensor.dtype != dtype:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss: the common one; under autocast float32, which torch gives to losses there."""
        if autocasts(self.input.device):
            return torch.promote_types(self.common, torch.float32)
        return self.common

    @property
    def compute(self) -> torch.dtype:
        """The dtype that the loss is computed in."""
        return torch.float64 if self.common == torch.float64 else torch.float32

    def expanded(self, dtype: torch.dtype) -> list[Tensor]:
        """Return input, target and weight (if any) of `dtype` in the shape of the errors."""
        tensors = [self.input, self.target] if self.weight is None else [self.input, self.target, self.weight]
        tensors = [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]
        return tensors if self.input.shape == self.target.shape else list(torch.broadcast_tensors(*tensors))

    def denominator(self) -> Tensor | int:
        """Return what `mean` divides by: the number of errors, or the sum of the weights."""
        if self.weight is None:
            input, target = self.input, self.target
            return (input if input.shape == target.shape else self.expanded(self.common)[0]).numel()
        return sum_in_order(self.weight.to(self.compute))

    def finished(self, loss: Tensor) -> Tensor:
        """Return the loss from the (reduced) squared errors."""
        if self.eps is not None:
            loss = (loss + self.eps if self.eps else loss).sqrt()
        dtype = self.dtype
        return loss if loss.dtype == dtype else loss.to(dtype)


def check(call: Call) -> Call:
    """Return `call` if it makes sense; warn as PyTorch does if the input and the target are of different shapes.

    Raises:
        TypeError: an argument of a wrong kind or dtype.
        ValueError: a shape, device or option value that does not fit.
    """
    input, target, weight, reduction, eps = call
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if name == "weight" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            expected = "a Tensor or None" if name == "weight" else "a Tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING + _INTEGER:
            raise TypeError(f"{name}: expected float64, float32, bfloat16, float16 or integers, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: expected it on the input's device {input.device}, got {tensor.device}")
    if call.common not in FLOATING:
        raise TypeError(f"input: expected a floating-point dtype beside a target of {target.dtype}, got {input.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    if eps is not None and not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"weight: expected the input's shape {tuple(input.shape)}, got {tuple(weight.shape)}")
    if target.shape != input.shape:
        _check_broadcast(input, target)
    return call


def _check_broadcast(input: Tensor, target: Tensor) -> None:
    try:
        torch.broadcast_shapes(input.shape, target.shape)
    except RuntimeError:
        raise ValueError(
            f"target: expected the input's shape {tuple(input.shape)}, or one that broadcasts with it, "
            f"got {tuple(target.shape)}"
        ) from None
    warnings.warn(
        f"target: its shape {tuple(target.shape)} is not the input's {tuple(input.shape)}; they are broadcast, which "
        "is rarely meant",
        stacklevel=4,
    )
