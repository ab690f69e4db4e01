"""Triton: whether it can run, ops whose kernels are imported by the first call, and checks.

This module does not import triton. `launch.py` launches kernels, `kernels.py` has the kernels that several losses use.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlkernels._core.ops import define_implemented

# Triton reads it when a kernel is defined, and `define` when an op is registered: it holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether TRITON_INTERPRET=1 is set: kernels are interpreted on CPU tensors, for tests."""

CHECK = os.environ.get("TLKERNELS_CHECK") == "1"
"""Whether TLKERNELS_CHECK=1 is set: class indices on a GPU are checked, for which the host waits."""

DEVICE = "cpu" if INTERPRETED else "cuda"
"""The type of device that kernels run on; "cuda" is also torch's name for AMD GPUs."""

_MISSING = "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def available() -> bool:
    """Return whether Triton kernels can run in this process."""
    return not _MISSING and (INTERPRETED or torch.cuda.is_available())


def refuse_triton(*tensors: Tensor | None) -> str | None:
    """Return why Triton does not support a call with these tensors, or None if it does."""
    if _MISSING:
        return _MISSING
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            kind = "CPU" if INTERPRETED else "GPU"
            return f"supports {kind} tensors only; got one on {tensor.device}"
        if not INTERPRETED and not torch.compiler.is_compiling() and _too_old(tensor.device.index):
            return "needs a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def _too_old(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)


def define(schema: str, fake: Callable[..., Any], module: str, function: str, differentiable: bool = False) -> Any:
    """Define `tlkernels::<schema>`, implemented by a function of `module`, which the first call imports."""

    def implementation(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return define_implemented(schema, fake, implementation, DEVICE.upper(), differentiable)


def tf32() -> bool:
    """Return whether PyTorch's setting allows TF32 in products of float32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def check_classes(
    target: Tensor, classes: int, ignore_index: int, elsewhere: bool = False, name: str = "target"
) -> None:
    """Raise IndexError if a class index is out of range; on a GPU only with TLKERNELS_CHECK=1 in the environment.

    With `elsewhere`, -1 is in range. `name` is the argument that the error names.
    """
    if recorded_architecture is not None:
        return  # a target that a kernel computes has no values
    if target.device.type == "cpu" or (CHECK and target.device.type == "cuda"):
        y = target.long()
        bad = (y != ignore_index) & ((y < (-1 if elsewhere else 0)) | (y >= classes))
        if bool(bad.any()):
            raise IndexError(f"{name}: expected class indices in [0, {classes}), got {int(y[bad][0])}")


def check_num_valid(valid: Tensor, num_valid: int) -> None:
    """Raise ValueError if `num_valid` is not the 0-d `valid`; on a GPU only with TLKERNELS_CHECK=1 in the environment.

    With the number wrong on a GPU and no check, the loss is NaN.
    """
    if valid.device.type == "cpu" or (CHECK and valid.device.type == "cuda"):
        count = int(valid)
        if count != num_valid:
            raise ValueError(f"num_valid: expected {count}, the number of rows that are not ignored, got {num_valid}")


recorded_architecture: str | None = None
"""What `architecture` returns while `launch.recorded` records launches; else None."""


def architecture(device: torch.device) -> str:
    """Return the device's name in the tables of configurations: "sm_90", "gfx942"; "interpreter" for the CPU."""
    if recorded_architecture is not None:
        return recorded_architecture
    return "interpreter" if device.type == "cpu" else _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))
