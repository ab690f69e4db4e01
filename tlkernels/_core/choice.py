"""Which implementation "auto" tries first on a GPU: the one that is faster, as measured or as expected by a model."""

import functools
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import triton

MEASURED, BY_MODEL = "measured", "by model"


class Row(NamedTuple):
    """`faster` is the faster implementation for calls of these losses that meet every condition."""

    losses: tuple[str, ...]
    faster: str
    """"native" or "triton"."""
    basis: str
    """MEASURED or BY_MODEL."""
    figures: str
    """The date and the figures, with their case and GPU."""
    architecture: str = "sm_*"
    """A pattern, such as "sm_9*"."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes of the call's first tensor, to which the limits below apply too; empty for any."""
    rows: int | None = None
    """The maximum product of all its sizes except the columns; None for any number."""
    columns: int | None = None
    """The maximum number of classes or features; None for any number."""
    nbytes: int | None = None
    """The maximum size of the tensor in bytes; None for any size."""
    row_bytes_over: int = 0
    """The columns of a row are contiguous and take more bytes than this; 0 for any row."""
    unaligned: bool = False
    """The columns of a row are contiguous, and some rows do not start at a multiple of 16 bytes."""


_CE = ("cross_entropy", "cross_entropy_stats")
_SELECTED = ("selective_log_softmax", "topk_distillation")
_LINEAR_CE = ("linear_cross_entropy", "linear_cross_entropy_stats")
_LINEAR_SELECTED = ("linear_selective_log_softmax", "linear_topk_distillation")
_LINEAR = (*_LINEAR_CE, *_LINEAR_SELECTED, "linear_distillation")
_EMBEDDINGS = ("info_nce", "nt_xent", "sup_con")
_BF16 = (torch.bfloat16,)
_H200 = "2026-11-27, H200, ms of native and Triton: "
_HOST = "2026-11-27, H200: the host takes 0.3 to 0.7 ms to launch native, Triton 0.6 to 2.7; the kernels take "

TABLE: tuple[Row, ...] = (
    Row(_EMBEDDINGS, "native", MEASURED, _HOST + "0.07 and 0.05 for 64 x 128", rows=64),
    Row(("distillation",), "native", MEASURED, _HOST + "0.43 for 65536 x 45", nbytes=6 << 20),
    # Small calls: kernels at half of 4.3 TB/s, of 790 TFLOP/s, or in float32 of 53 TFLOP/s.
    Row((*_CE, *_SELECTED, "distillation"), "native", BY_MODEL, _HOST + "0.13 for 128 MiB", nbytes=128 << 20),
    Row(_LINEAR, "native", BY_MODEL, _HOST + "0.13 for 1024 x 256 x 32000", nbytes=512 << 10),
    Row(_EMBEDDINGS, "native", BY_MODEL, _HOST + "0.1 for 512 x 1024 in float32", rows=512),
    Row(_LINEAR_CE, "triton", BY_MODEL, "2026-11-26, H200: up to 265 features Triton makes the logits in its kernels, "
        "twice, in less time than it takes to store and read them", architecture="sm_9*", dtypes=_BF16, columns=256),
    Row((*_CE, *_SELECTED), "native", MEASURED, _H200 + "32768 x 4096 0.20, 0.22; 32768 x 32768 1.41, 1.79; 16384 x "
        "131072 3.37, 3.71; 8192 x 262144 3.32, 3.71; 8192 x 50257 1.01, 1.12; 256 x 1000, host 0.44, 0.85; top-64 of "
        "8192 x 151936 2.41, 2.78", architecture="sm_9*", dtypes=_BF16),
    Row(("distillation",), "triton", MEASURED, _H200 + "16384 x 32000 2.72, 2.11; 8192 x 128256 6.24, 3.81; in float32 "
        "(js) 4096 x 128256 10.2, 4.15", architecture="sm_9*"),
    Row((*_LINEAR_CE, *_LINEAR_SELECTED), "native", MEASURED, _H200 + "linear_cross_entropy 4096 x 4096 x 128256 17.3, "
        "21.1; linear_selective_log_softmax 26.3, 27.7", architecture="sm_9*", dtypes=_BF16),
    Row(("linear_distillation",), "triton", MEASURED, _H200 + "4096 x 4096 x 128256 29.4, 25.7",
        architecture="sm_9*", dtypes=_BF16),
    Row(_EMBEDDINGS, "triton", MEASURED, _H200 + "info_nce 65536 x 1024 133, 63; 16384 x 1024 8.7, 4.0; 65536 x 512 "
        "89, 40; nt_xent 32768 x 768 21, 11; sup_con 23, 15", architecture="sm_9*", dtypes=_BF16),
    Row(_CE, "native", BY_MODEL, "2026-11-26, H200: 8192 x 50257 in bfloat16 reaches 0.45 of the bandwidth, Triton "
        "0.30: it reads such rows number by number", unaligned=True),
    Row(_CE, "native", BY_MODEL, "2026-11-26, H200: 16384 x 131072 in bfloat16 reaches 0.70 of the bandwidth, Triton "
        "0.45: it reads such rows twice", architecture="sm_9*", row_bytes_over=64 << 10),
)  # fmt: skip
"""The first matching row decides. Measured rows come from bench/gpu.py (bench/results); a row by model is before one
that was measured only if it is for smaller sizes."""


def on_gpu(call: Any) -> Tensor | None:
    """Return the first tensor of the call if it is on a GPU."""
    tensor: Tensor = call[0] if isinstance(call[0], Tensor) else call[0][0]
    return tensor if tensor.is_cuda else None


def faster(loss: str, tensor: Tensor) -> tuple[str, str]:
    """Return the implementation to try first for a loss of this tensor on a GPU, and the reason."""
    axis = 1 if loss in ("cross_entropy", "cross_entropy_stats") and tensor.dim() > 1 else -1
    for row in _rows(loss, tensor.device, tensor.dtype):
        if _fits(row, tensor, axis):
            basis = "measured to be faster" if row.basis == MEASURED else "expected to be faster by model, not measured"
            return row.faster, f"{row.faster} is {basis} ({row.figures})"
    return "triton", "neither measured nor modelled for this call: Triton comes first"


def _rows(loss: str, device: torch.device, dtype: torch.dtype) -> tuple[Row, ...]:
    return _rows_at(loss, triton.architecture(device), dtype)


# torch.compile calls it instead of tracing it. torch.compiler.assume_constant_result does the same, but imports the
# compiler.
_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _rows_at(loss: str, where: str, dtype: torch.dtype) -> tuple[Row, ...]:
    return tuple(
        row
        for row in TABLE
        if loss in row.losses and (not row.dtypes or dtype in row.dtypes) and fnmatchcase(where, row.architecture)
    )


def _fits(row: Row, tensor: Tensor, axis: int) -> bool:
    columns, size = tensor.shape[axis] if tensor.dim() else 1, tensor.element_size()
    together = tensor.dim() > 0 and tensor.stride(axis) == 1
    return (
        (row.rows is None or tensor.numel() <= row.rows * columns)
        and (row.columns is None or columns <= row.columns)
        and (row.nbytes is None or tensor.numel() * size <= row.nbytes)
        and (not row.row_bytes_over or (together and columns * size > row.row_bytes_over))
        and (not row.unaligned or (together and _unaligned(tensor, axis)))
    )


def _unaligned(tensor: Tensor, axis: int) -> bool:
    """Return whether some rows along this axis do not start at a multiple of 16 bytes."""
    others = (k for k in range(tensor.dim()) if k != axis % tensor.dim() and tensor.shape[k] > 1)
    places: list[int | torch.SymInt] = [tensor.stride(k) for k in others]
    if not torch.compiler.is_compiling():  # Dynamo does not trace storage_offset
        places.append(tensor.storage_offset())
    return any(place * tensor.element_size() % 16 for place in places)
