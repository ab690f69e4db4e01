"""Dtypes of inputs, of the computation and of results."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of the computation for these tensors: float64 if one of them is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is enabled for the device; torch raises for "meta", where it is not."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class _Wide(threading.local):
    losses = False


_wide = _Wide()


@contextmanager
def wide_losses() -> Iterator[None]:
    """Make losses at least float32 within the context, as under autocast: they are parts of a loss."""
    before, _wide.losses = _wide.losses, True
    try:
        yield
    finally:
        _wide.losses = before


def loss_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """Return the dtype of a loss of these tensors: the promoted one; under autocast at least float32, as in PyTorch."""
    dtype = first.dtype
    for tensor in others:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return at_least_float32(dtype, first.device)


def at_least_float32(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a loss of `dtype`: at least float32 under autocast and within `wide_losses`."""
    if autocasts(device) or (not torch.compiler.is_compiling() and _wide.losses):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in `dtype`. Where it has that dtype this is faster than `Tensor.to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
