"""Dtypes that losses take, and those that they compute in and return."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that a loss of these tensors is computed in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for the device; torch raises where it is asked of "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def loss_dtype(first: Tensor, *others: Tensor) -> torch.dtype:
    """Return the dtype of a loss of these tensors: the promoted one; under autocast float32, as torch has it."""
    dtype = first.dtype
    for tensor in others:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.promote_types(dtype, torch.float32) if autocasts(first.device) else dtype
