"""Dtypes of inputs, of the computation and of results."""

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


def loss_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """Return the dtype of a loss of these tensors: the promoted one; under autocast at least float32, as in PyTorch."""
    dtype = first.dtype
    for tensor in others:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32) if autocasts(first.device) else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in `dtype`. Where it has that dtype this is faster than `Tensor.to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
