"""Kernels that several losses use, and functions to call in kernels. Imports triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.triton.launch import Config, Table, launch

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's name of each dtype."""


@triton.jit
def number(x, T: tl.constexpr):
    """Return an option as a scalar of dtype T. Its parameter is annotated `tl.float64`, which passes it exactly."""
    return tl.full([], x, T)


@triton.jit
def tanh_and_slope(x):
    """Return tanh(x) and its derivative, both accurate to a few roundings; 1 - tanh(x)**2 would cancel."""
    e = tl.exp(-2 * tl.abs(x))
    t = 1 - 2 * e / (1 + e)  # near 1 rounded once, since 1 - t is the slope's
    if x.dtype == tl.float32:  # below 0.5 a series; the first omitted term is at most 1e-8 of the first term
        s = x * x
        series = 1382 / 155925 + s * (-21844 / 6081075 + s * (929569 / 638512875))
        series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * series))))
        t = tl.where(tl.abs(x) < 0.5, tl.abs(x) * series, t)
    return tl.where(x < 0, -t, t), 4 * e / ((1 + e) * (1 + e))


@triton.jit(do_not_specialize=["n"])
def _sum(
    values,  # (n,)
    divisor,  # 0-d, or None
    out,  # 0-d
    n,
    factor: tl.float64,
    BLOCK: tl.constexpr,  # values added at a time
):
    """Write factor * sum(values) / divisor, summed in float64 in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, i < n, other=0.0).to(tl.float64)
    result = tl.sum(total, 0) * number(factor, tl.float64)
    if divisor is not None:
        result /= tl.load(divisor).to(tl.float64)
    tl.store(out, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def _count(
    target,  # (n,) class indices
    weight,  # (C,), or None
    partial,  # (programs,) float64
    n,
    C,  # classes
    ignore_index,
    BLOCK: tl.constexpr,  # targets of a program
):
    """Write each program's number of targets that are not ignored, or the sum of their weights."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(target + i, i < n, other=0).to(tl.int64)
    counted = (i < n) & (y != ignore_index)
    if weight is None:
        counts = tl.where(counted, 1.0, 0.0).to(tl.float64)
    else:
        counts = tl.load(weight + y, counted & (y >= 0) & (y < C), other=0.0).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(counts, 0))


@triton.jit
def _scale(
    values,  # (n,)
    factor,  # 0-d
    n,
    BLOCK: tl.constexpr,  # values that a program multiplies at a time
    T: tl.constexpr,  # dtype of the product
):
    """Multiply in place by `factor`. If it is 1, nothing else is read or written; the host need not know it."""
    by = tl.load(factor).to(T)
    if by != 1:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = tl.load(values + i, i < n)
            tl.store(values + i, (x.to(T) * by).to(x.dtype), i < n)


# 2026-11-21, by reasoning: one program sums the partial sums of a loss, a few thousand numbers, so more lanes would
# idle. Scaling always has programs for 128 multiprocessors of 2048 threads, since mostly the factor is 1.
_SUM = Table("sum", Config("interpreter", 0, None, {"BLOCK": 64}, 1), Config("*", 0, None, {"BLOCK": 1024}, 4))
_COUNT = Config("*", 0, None, {"BLOCK": 1024}, 4)
_SCALE = Table("scale", Config("interpreter", 0, None, {"BLOCK": 1024}, 1), Config("*", 0, None, {"BLOCK": 8192}, 8))
_SCALE_PROGRAMS = 1024


def sum_of(values: Tensor, out: Tensor, factor: float = 1.0, divisor: Tensor | None = None) -> Tensor:
    """Write factor * sum of the contiguous `values`, divided by `divisor` if given, to the 0-d `out`; return `out`."""
    config = _SUM.find(values.device, 0, values.numel())
    launch(_sum, (1,), values, divisor, out, values.numel(), factor, config=config)
    return out


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply a dense tensor in place by the 0-d `factor`, which is read on the device; return the tensor."""
    n, config = values.numel(), _SCALE.find(values.device, 0, values.numel())
    programs = min(triton.cdiv(n, config.meta["BLOCK"]), _SCALE_PROGRAMS)
    wide = tl.float64 if values.dtype == torch.float64 else tl.float32
    launch(_scale, (programs,), values, factor, n, config=config, T=wide)
    return values


def count(target: Tensor, classes: int, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the number of targets that are not ignored, or the sum of their weights (NaN if it is 0), float64."""
    n = target.numel()
    counted = torch.empty((), dtype=torch.float64, device=target.device)
    partial = torch.empty(max(1, triton.cdiv(n, _COUNT.meta["BLOCK"])), dtype=torch.float64, device=target.device)
    if n == 0:
        return counted.zero_()
    launch(_count, (partial.numel(),), target.contiguous(), weight, partial, n, classes, ignore_index, config=_COUNT)
    result = partial.view(()) if partial.numel() == 1 else sum_of(partial, counted)
    return result if weight is None else result.masked_fill_(result == 0, torch.nan)  # as in PyTorch
