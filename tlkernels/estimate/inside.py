"""What our ops allocate while they run, in addition to their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tlkernels._core.dtypes import compute_dtype
from tlkernels.bench.cost import COSTS
from tlkernels.estimate import layers, similarity
from tlkernels.estimate.layers import KEPT, MB, WORKSPACE, kept_in_distillation
from tlkernels.estimate.live import Parts


def on_cpu(op: str, args: Mapping[str, Any]) -> Parts:
    """Return what an op of the extension allocates on a CPU."""
    if op.startswith("linear_"):
        return joined(layers.on_cpu(layers.layers_of(op, args)))
    if op.startswith(("info_nce", "sigmoid_contrastive")):
        return joined(similarity.on_cpu(args))
    if op.startswith(("distillation", "selective_log_softmax")):
        return joined(_rows_on_cpu(op, args))
    return {}


def on_cuda(op: str, args: Mapping[str, Any]) -> Parts:
    """Return what an op of the extension allocates on a GPU."""
    if op.startswith("linear_"):
        return joined(layers.on_cuda(layers.layers_of(op, args)))
    return joined(similarity.on_gpu(args, triton=False)) if op.startswith("info_nce") else {}


def in_triton(op: str, args: Mapping[str, Any]) -> Parts:
    """Return what an op of Triton allocates."""
    if op.startswith("linear_"):
        return joined(layers.in_triton(layers.layers_of(op, args)))
    if op.startswith(("info_nce", "sigmoid_contrastive")):
        return joined(similarity.on_gpu(args, triton=True))
    return {}


def workspace(loss: str, contestant: str, dtype: torch.dtype) -> Parts:
    """Return what the library of the matrix products keeps on a CPU from its first large products on.

    Measured with 2 threads on an EPYC with AVX512-BF16, torch 2.13: for float32 MKL keeps 5 MB a thread for each number
    of features, for float64 12 MB a thread; for bfloat16 oneDNN keeps 10 MB; products of small tiles leave 2.5 MB.
    """
    if not COSTS[loss].products([1] * len(COSTS[loss].dims)):
        return {}
    if contestant == "compile":
        return {}  # its first call, which compiles, is not the one that is estimated
    if contestant == "native" and "linear" not in loss:
        return {WORKSPACE: 5 * MB // 2}
    if dtype.itemsize == 2:
        return {WORKSPACE: 10 * MB}
    each = 12 * MB if dtype is torch.float64 else 5 * MB * (2 if loss == "linear_distillation" else 1)
    return {WORKSPACE: each * torch.get_num_threads()}


def joined(parts: Iterable[tuple[str, int]]) -> Parts:
    """Return parts of equal labels as one, without those of no bytes."""
    found: Parts = {}
    for label, size in parts:
        found[label] = found.get(label, 0) + size
    return {label: size for label, size in found.items() if size}


# csrc/distillation/cpu_call.cpp, csrc/selective_log_softmax/{cpu,call}.cpp


def _rows_on_cpu(op: str, args: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    if op.startswith("distillation"):
        yield KEPT, kept_in_distillation(args["student"].shape[-1], args["student"])
    elif op.endswith("bwd"):
        wide = compute_dtype(args["logits"]).itemsize
        yield KEPT, torch.get_num_threads() * args["logits"].shape[1] * wide
        yield "numbers of the selected classes", 2 * args["index"].numel() * wide
