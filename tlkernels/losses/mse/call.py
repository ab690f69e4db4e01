"""Arguments of mse and rmse, and their validation."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import FLOATING, at_least_float32, cast
from tlkernels._core.reduction import REDUCTIONS, sum_in_order

_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Arguments(NamedTuple):
    """The arguments of a call."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    reduction: str
    eps: float | None
    """Added to the mean before the root of rmse; None for mse."""

    @property
    def common(self) -> torch.dtype:
        """The dtype that PyTorch promotes the tensors to."""
        dtype = self.input.dtype
        for tensor in (self.target, self.weight):
            if tensor is not None and tensor.dtype != dtype:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss: the common one; under autocast float32, as in PyTorch."""
        return at_least_float32(self.common, self.input.device)

    @property
    def compute(self) -> torch.dtype:
        """The dtype that the loss is computed in."""
        return torch.float64 if self.common == torch.float64 else torch.float32

    def expanded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, target and weight in `dtype` and in the shape of the errors."""
        input, target, weight = cast(self.input, dtype), cast(self.target, dtype), self.weight
        weight = None if weight is None else cast(weight, dtype)
        if input.shape != target.shape:
            shape = torch.broadcast_shapes(input.shape, target.shape)
            input, target = input.expand(shape), target.expand(shape)
            weight = None if weight is None else weight.expand(shape)
        return input, target, weight

    def denominator(self) -> Tensor | int:
        """Return what `mean` divides by: the number of errors, or the sum of the weights."""
        if self.weight is None:
            same = self.input.shape == self.target.shape
            return (self.input if same else self.expanded(self.common)[0]).numel()
        return sum_in_order(self.weight.to(self.compute))

    def finished(self, loss: Tensor) -> Tensor:
        """Return the loss from the (reduced) squared errors."""
        if self.eps is not None:
            loss = (loss + self.eps if self.eps else loss).sqrt()
        return cast(loss, self.dtype)


def check(call: Arguments) -> Arguments:
    """Return `call` if its arguments are valid; warn as PyTorch does if input and target have different shapes.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or device that does not match, or an option out of range.
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
        raise TypeError(f"input: expected a floating-point dtype with a target of {target.dtype}, got {input.dtype}")
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
        f"target: expected the input's shape {tuple(input.shape)}, got {tuple(target.shape)}; they are broadcast, "
        "which is likely a mistake",
        stacklevel=4,
    )
