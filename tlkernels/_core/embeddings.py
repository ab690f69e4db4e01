"""Losses on pairs of embeddings: validation of the tensors, and the scale of the logits."""

import math
from typing import Any

import torch
from torch import Tensor

from tlkernels._core.dtypes import FLOATING, autocasts, compute_dtype
from tlkernels._core.options import number


def check_embeddings(name: str, tensor: Tensor, first: tuple[str, Tensor] | None = None, shape: str = "(N, D)") -> None:
    """Raise TypeError or ValueError unless `tensor` is a floating-point matrix that matches the `first` one of a call.

    `shape` is the expected shape for the message; its commas tell the number of axes. Dtypes may differ under autocast.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    axes = [text.count(",") + 1 for text in shape.split(" or ")]
    if tensor.dim() not in axes:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if first is None:
        return
    other, like = first
    if tensor.dtype != like.dtype and not autocasts(like.device):
        raise TypeError(f"{name}: expected the dtype of {other}, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected it on {other}'s device {like.device}, got {tensor.device}")
    if tensor.shape[-1] != like.shape[-1]:
        raise ValueError(f"{name}: expected {like.shape[-1]} features as in {other}, got shape {tuple(tensor.shape)}")


def scalar(name: str, value: Any, device: torch.device) -> float | Tensor:
    """Return a finite number as a float, or a floating-point tensor of shape () or (1,) as a 0-d tensor.

    The reshape is differentiable, so the gradient has the shape of `value`.

    Raises:
        TypeError, ValueError: `value` has another type or shape.
    """
    if not isinstance(value, Tensor):
        try:
            plain = number(name, value)
        except TypeError:
            raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}") from None
        if not math.isfinite(plain):
            raise ValueError(f"{name}: expected a finite number, got {plain}")
        return plain
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a floating-point 0-d tensor, got {value.dtype}")
    if value.shape not in ((), (1,)):
        raise ValueError(
            f"{name}: expected a number or a 0-d tensor, or one of shape (1,), got shape {tuple(value.shape)}"
        )
    if value.device.type not in ("cpu", device.type):
        raise ValueError(f"{name}: expected it on {device} or the CPU, got {value.device}")
    return value.reshape(()) if value.dim() else value


def resolve_scale(
    temperature: float | Tensor | None, logit_scale: float | Tensor | None, device: torch.device
) -> float | Tensor:
    """Return the factor of the similarities, differentiable by the given argument; 1 if both are None."""
    if temperature is not None and logit_scale is not None:
        raise ValueError("temperature, logit_scale: expected at most one of them, since one is 1 / the other")
    if logit_scale is not None:
        return scalar("logit_scale", logit_scale, device)
    if temperature is None:
        return 1.0
    temperature = scalar("temperature", temperature, device)
    if isinstance(temperature, Tensor):
        return temperature.to(compute_dtype(temperature)).reciprocal()
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return 1 / temperature


def numbers(count: int, like: Tensor) -> Tensor:
    """Return 0, 1, ..., count - 1 on the device of `like`; a DTensor if `like` is one, since operators mix no types."""
    if type(like) in (Tensor, torch.nn.Parameter):
        return torch.arange(count, device=like.device)
    return like.new_ones((count,), dtype=torch.int64).cumsum(0) - 1


def as_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a 0-d tensor, for ops."""
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
