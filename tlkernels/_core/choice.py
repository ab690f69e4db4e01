"""Which implementation "auto" tries first on a GPU: the one that was measured to be faster there."""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import triton


class Measured(NamedTuple):
    """A result: on GPUs of that architecture, for calls up to that size, `faster` is the faster implementation."""

    loss: str
    architecture: str
    """A pattern, such as "sm_9*"."""
    dtype: torch.dtype
    """Of the call's first tensor; of the same the numbers below."""
    rows: int | None
    """The product of all its sizes but the last, at the most; None for any number."""
    columns: int | None
    """Its last size, at the most; None for any."""
    faster: str
    """"native" or "triton"."""
    when: str
    """The date and the figures."""


MEASURED: tuple[Measured, ...] = ()
"""The first row that fits decides. Rows come from bench/gpu.py, which runs both; no GPU was at hand so far."""


def on_gpu(call: Any) -> Tensor | None:
    """Return the call's first tensor if it is on a GPU."""
    tensor: Tensor = call[0] if isinstance(call[0], Tensor) else call[0][0]
    return tensor if tensor.is_cuda else None


def faster(loss: str, tensor: Tensor) -> tuple[str, str]:
    """Return which implementation to try first for a loss of this tensor on a GPU, and why."""
    if MEASURED:
        where = triton.architecture(tensor.device)
        columns = tensor.shape[-1] if tensor.dim() else 1
        rows = tensor.numel() // max(1, columns)
        for row in MEASURED:
            if (
                (row.loss, row.dtype) == (loss, tensor.dtype)
                and fnmatchcase(where, row.architecture)
                and (row.rows is None or rows <= row.rows)
                and (row.columns is None or columns <= row.columns)
            ):
                return row.faster, f"measured to be faster on this device: {row.faster} ({row.when})"
    return "triton", "no measurement on this device: Triton"
