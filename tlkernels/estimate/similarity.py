"""What the ops on similarities of embeddings allocate while they run: the rules of their C++ and Triton code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.estimate.layers import OPERANDS, SUMS, ceil

# csrc/core/cpu/similarity.cpp, csrc/info_nce/cpu.cpp, csrc/sigmoid_contrastive/cpu.cpp


def _embeddings(args: Mapping[str, Any]) -> list[tuple[Tensor, bool]]:
    """Return the embeddings of a contrastive loss, and whether their gradients are needed."""
    tensors = args["query"], args.get("key")
    needs = args.get("needs", (False, False))
    return [(tensor, need) for tensor, need in zip(tensors, needs, strict=False) if tensor is not None]


def on_cpu(args: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield what `Similarity` and its callers allocate."""
    embeddings = _embeddings(args)
    (query, _), (columns, _) = embeddings[0], embeddings[-1]
    wide = compute_dtype(query)
    yield "tile of similarities", min(512, len(query)) * (min(512, len(columns)) + 16) * wide.itemsize
    for tensor, need in embeddings:
        copied = args.get("normalize") or tensor.dtype != wide
        yield OPERANDS, tensor.numel() * wide.itemsize if copied else 0
        yield SUMS, tensor.numel() * wide.itemsize if need and tensor.dtype != wide else 0
    yield "statistics", len(query) * (8 + 8 * wide.itemsize)  # norms, and the slopes of both directions


# csrc/info_nce/cuda.cu, tlkernels/losses/{info_nce,sigmoid_contrastive}/triton.py


def on_gpu(args: Mapping[str, Any], triton: bool) -> Iterator[tuple[str, int]]:
    """Yield what the extension allocates on a GPU, or what Triton does."""
    embeddings = _embeddings(args)
    (query, _), (columns, _) = embeddings[0], embeddings[-1]
    rows, features, size, wide = len(query), query.shape[1], query.itemsize, compute_dtype(query).itemsize
    step = min(rows, _panel_rows(rows, features, triton))
    unit, tile = (32 if triton else 8 if size == 2 else 1), 128 if size == 2 else 64
    differentiated = any(need for _, need in embeddings)
    if differentiated or size == 8 or (size == 4 and not triton):  # others compare tile by tile
        known = triton and size == 8  # similarities, and their gradient
        yield "panel of similarities", step * ceil(len(columns), 64) * 64 * size * (1 + known)
    for tensor, need in embeddings:
        copied = args.get("normalize") or features % unit
        yield OPERANDS, len(tensor) * ceil(features, unit) * unit * size if copied else 0
        if need:
            yield SUMS, (step if tensor is query else len(tensor)) * features * wide
    if not differentiated:
        tiles = ceil(len(columns), tile) * step + ceil(step, tile) * len(columns)
        yield "statistics of tiles", 2 * tiles * wide


def _panel_rows(rows: int, features: int, triton: bool) -> int:
    """Return how many rows a panel of similarities has."""
    if triton:
        return ceil(min(max(4 * features, 2048), 4096, max(rows, 1)), 128) * 128
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132
    return ceil(min(max(4 * features, 16 * multiprocessors), 32 * multiprocessors), 128) * 128
