"""What the ops on linear layers allocate while they run: the rules of their C++ and Triton code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import architecture, linear
from tlkernels._core.triton.launch import recorded

MB = 1 << 20
ARCHITECTURE = "sm_90"
"""That of the GPU that is assumed where there is none."""
OPERANDS = "operands of the products"
SUMS = "sums of the gradients"
WORKSPACE = "workspace of the products"
KEPT = "rows that the threads keep"
_CHUNK = "chunk of logits"


class Layer(NamedTuple):
    """Input and weight of a linear layer, whether rows can be ignored, and which of their gradients are needed."""

    input: Tensor
    weight: Tensor
    needs_input: bool
    needs_weight: bool
    ignores: bool


def layers_of(op: str, args: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of an op's arguments."""
    needs = args.get("needs", [False] * 6)
    if op.startswith("linear_distillation"):
        student = Layer(args["student_input"], args["student_weight"], needs[0], needs[1], ignores=False)
        return [student, Layer(args["teacher_input"], args["teacher_weight"], needs[3], needs[4], ignores=False)]
    return [Layer(args["input"], args["linear_weight"], needs[0], needs[1], ignores=True)]


# csrc/core/cpu/linear_sweep.cpp


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a CPU multiplies: bfloat16 only with instructions for it, float16 never."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    forced = os.environ.get("TLKERNELS_BF16_GEMM")
    fast = forced.startswith("1") if forced else torch.cpu._is_avx512_bf16_supported()
    return dtype if dtype is torch.bfloat16 and fast else torch.float32


def on_cpu(layers: list[Layer]) -> Iterator[tuple[str, int]]:
    """Yield what `CpuLinearSweep` allocates."""
    rows, classes = layers[0].input.shape[0], layers[0].weight.shape[0]
    row = sum(logits_dtype(layer.input.dtype).itemsize for layer in layers) * classes
    chunk = _even_chunk(rows, int(os.environ.get("TLKERNELS_CHUNK_BYTES", 112 * MB)) // row)
    if len(layers) == 2:
        yield KEPT, kept_in_distillation(classes, layers[0].input)
    for layer in layers:
        made, dtype = logits_dtype(layer.input.dtype), layer.input.dtype
        wide, features = compute_dtype(layer.input), layer.input.shape[1]
        yield _CHUNK, min(rows, chunk) * classes * made.itemsize
        if made != dtype:
            yield OPERANDS, min(rows, chunk) * features * made.itemsize * (1 + layer.needs_input) + 4 * MB
        if layer.needs_weight and chunk < rows and wide != dtype:
            yield SUMS, layer.weight.numel() * wide.itemsize
            yield WORKSPACE, 10 * MB * (made == dtype)  # of 16-bit products of tiles, for which oneDNN copies operands


def _even_chunk(rows: int, most: int, multiple: int = 1) -> int:
    """Return the rows of a chunk: chunks are as few as `most` allows, and of one size."""
    chunks = ceil(rows, max(1, most))
    if chunks <= 1:
        return max(1, rows)
    return ceil(ceil(rows, chunks), multiple) * multiple


def ceil(size: int, by: int) -> int:
    """Return how many parts of `by` cover the size."""
    return -(-size // by)


# csrc/core/cuda/linear_sweep.cu


def on_cuda(layers: list[Layer]) -> Iterator[tuple[str, int]]:
    """Yield what `CudaLinearSweep` allocates."""
    rows, classes = layers[0].input.shape[0], layers[0].weight.shape[0]

    def chunk_of(layer: Layer) -> int:
        usual = max(256 * MB, layer.weight.nbytes if layer.needs_weight else 0)
        most = int(os.environ.get("TLKERNELS_CHUNK_BYTES", usual)) // (classes * layer.weight.itemsize)
        return _even_chunk(rows, most, 128)

    chunk = min(map(chunk_of, layers))
    for layer in layers:
        wide, size = compute_dtype(layer.input), layer.input.itemsize
        yield _CHUNK, min(rows, chunk) * classes * size
        if layer.needs_weight and layer.ignores:
            yield OPERANDS, min(rows, chunk) * layer.input.shape[1] * size
        if layer.needs_weight and chunk < rows and wide != layer.input.dtype:
            yield SUMS, layer.weight.numel() * wide.itemsize


# tlkernels/_core/triton/linear.py


def in_triton(layers: list[Layer]) -> Iterator[tuple[str, int]]:
    """Yield what `linear.Sweep` allocates: its own plan, and its own buffers without memory."""
    needs = [linear.Needs(layer.needs_input, layer.needs_weight, False) for layer in layers]
    flat = [(layer.input.to("meta"), layer.weight.to("meta"), None) for layer in layers]
    with recorded(gpu_architecture(), lambda _: None):
        plan = linear.plan(flat, needs)
        for layer, tensors, need in zip(layers, flat, needs, strict=True):
            ignored = tensors[0].new_empty((tensors[0].shape[0], 1), dtype=torch.bool) if layer.ignores else None
            sweep = linear.Sweep(tensors, need, plan, ignored)
            yield OPERANDS, sweep.input.nbytes if sweep.input is not tensors[0] else 0
            logits = getattr(sweep, "logits", None)
            if logits is not None and sweep.whole:  # in the memory of the weight's gradient, and a little after it
                yield _CHUNK, logits.untyped_storage().nbytes() - layer.weight.nbytes
            elif logits is not None:
                yield _CHUNK, logits.nbytes
            for total in (sweep.by_input, sweep.by_weight):
                if total is not None and total.dtype != layer.input.dtype:
                    yield SUMS, total.nbytes


def gpu_architecture() -> str:
    """Return the architecture of the current GPU, or ARCHITECTURE without one."""
    if not torch.cuda.is_available():
        return ARCHITECTURE
    return architecture(torch.device("cuda", torch.cuda.current_device()))


def kept_in_distillation(classes: int, like: Tensor) -> int:
    """Return what the threads keep of a row from its first sweep to its second: two numbers for each class."""
    return torch.get_num_threads() * 2 * classes * compute_dtype(like).itemsize
