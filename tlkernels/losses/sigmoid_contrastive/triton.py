"""The sigmoid contrastive loss in Triton. What the ops mean is in `ops.py`.

Each entry's loss and gradient are known from its similarity alone, so one sweep gives all: one product of N·K·D for the
similarities, and two with each panel of their gradient, which `_core/similarity.py` explains. A program's sums go to
places of their own and are added in a fixed order.

With z = scale * similarity + bias a negative's loss is log(1 + exp(z)), its gradient sigmoid(z); a positive's are those
of -z, with the sign turned.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.similarity import (
    CLAIMS,
    SPILLS,
    TILES,
    panel_rows,
    precision,
    prepare,
    product,
    range_of_float16,
    similarity_tile,
    write_gradient,
)
from tlkernels._core.triton import Example, launch
from tlkernels._core.triton_kernels import sum_of

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def log_of_one_more(e, TERMS: tl.constexpr):
    """Return log(1 + e) for e in [0, 1], of any size accurate: 2 atanh(s) with s = e / (2 + e), at most 1 / 3."""
    s = e / (2 + e)
    square = s * s
    p = tl.full([], 1 / (2 * TERMS + 1), e.dtype)
    for k in tl.static_range(TERMS):
        p = p * square + 1 / (2 * (TERMS - 1 - k) + 1)
    return 2 * s * p


@triton.jit
def pairs(
    rows, columns, known, scale, bias, upstream, extra, panel, losses, slopes, first_row, row_end, column_count, own, D,
    row_stride, column_stride, known_stride, panel_stride, row_tiles,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum the losses of a tile's pairs; with a panel also write their gradients, times `upstream`, and sum those.

    The gradients written are further times `extra`, if given.
    """
    C: tl.constexpr = losses.dtype.element_ty
    tile_row, tile_column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    i = first_row + tile_row * BM + tl.arange(0, BM)
    j = tile_column * BN + tl.arange(0, BN)
    row, column = tl.minimum(i, row_end - 1), tl.minimum(j, column_count - 1)
    s = similarity_tile(
        rows, columns, known, None, None, row, column, D, first_row, row_stride, column_stride, known_stride,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    here = (i < row_end)[:, None] & (j < column_count)[None, :]
    positive = (i + own)[:, None] == j[None, :]
    z = s * tl.load(scale).to(C) + tl.load(bias).to(C)
    z = tl.where(positive, -z, z)
    e = tl.exp2(tl.where(z < 0, z, -z) * LOG2E)
    # The first term left out is below 2^-26 of the sum, in float64 2^-56.
    loss = tl.where(z < 0, 0.0, z) + log_of_one_more(e, 16 if tl.float64 == C else 7)
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(tl.where(here, loss, 0.0), 1), 0))
    if panel is not None:
        factor = tl.load(upstream).to(C)
        if extra is not None:
            factor *= tl.load(extra).to(C)
        g = tl.where(z < 0, e, 1.0) / (1 + e) * factor
        g = tl.where(positive, -g, g)
        tl.store(slopes + tl.program_id(0), tl.sum(tl.sum(tl.where(here, g, 0.0), 1), 0))
        at = panel + (i - first_row).to(tl.int64)[:, None] * panel_stride + j[None, :]
        tl.store(at, g.to(panel.dtype.element_ty), here)


class _Sweep:
    """One pass over the pairs, panel by panel."""

    def __init__(self, query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: int):
        dtype = torch.promote_types(query.dtype, key.dtype)
        self.compute = compute_dtype(query, key)
        self.rows, self.columns, self.own = query.shape[0], key.shape[0], own
        self.config = TILES.find(query.device, dtype.itemsize, max(self.rows * self.columns, 1))
        self.precision = precision(dtype)
        self.scale, self.bias = (value.to(query.device) for value in (logit_scale, logit_bias))
        self.query, self.key = (prepare(x, dtype, False, self.config) for x in (query, key))
        self.step = panel_rows(self.rows, query.shape[1], self.config)
        tile = self.config.meta
        self.row_tiles = triton.cdiv(min(self.step, self.rows), tile["BM"])
        self.column_tiles = triton.cdiv(self.columns, tile["BN"])
        self.panels = [(begin, min(begin + self.step, self.rows)) for begin in range(0, self.rows, self.step)]
        self.losses, self.slopes = query.new_zeros(
            (2, len(self.panels), self.row_tiles * self.column_tiles), dtype=self.compute
        )

    def run(self, n: int, panel: Tensor | None, upstream: Tensor | None, extra: Tensor | None) -> None:
        """Sweep over panel n."""
        begin, end = self.panels[n]
        x, y = self.query.x, self.key.x
        known, rows, columns = None, x, y
        numbers: tuple[int, ...] = x.shape[1], x.stride(0), y.stride(0), 0
        if self.compute == torch.float64:  # no tensor core multiplies them as float64; the library does what there is
            known, rows, columns = product(x[begin:end], y.T), None, None
            numbers = 0, 0, 0, known.stride(0)
        row_tiles = triton.cdiv(end - begin, self.config.meta["BM"])
        tensors = rows, columns, known, self.scale, self.bias, upstream, extra, panel, self.losses[n], self.slopes[n]
        numbers = begin, end, self.columns, self.own, *numbers, 0 if panel is None else panel.stride(0), row_tiles
        launch(
            pairs, (row_tiles * self.column_tiles,), *tensors, *numbers, PRECISION=self.precision, config=self.config
        )

    def loss(self) -> Tensor:
        """Return the mean over rows of the sums found, for no rows NaN."""
        loss = self.losses.new_empty(())
        return sum_of(self.losses, loss, 1 / self.rows if self.rows else float("nan"))


@torch.no_grad()
def forward(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: int) -> Tensor:
    """Return the loss."""
    sweep = _Sweep(query, key, logit_scale, logit_bias, own)
    for n in range(len(sweep.panels)):
        sweep.run(n, None, None, None)
    return sweep.loss()


@torch.no_grad()
def step(
    upstream: Tensor, query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the loss, and its gradients times `upstream`."""
    sweep = _Sweep(query, key, logit_scale, logit_bias, own)
    of = sweep.query, sweep.key
    grads = [
        torch.empty_like(x.given, memory_format=torch.contiguous_format) if want else x.given.new_empty((0,))
        for x, want in zip(of, wanted, strict=False)
    ]
    if not sweep.rows:
        return sweep.loss(), *grads, torch.zeros_like(logit_scale), torch.zeros_like(logit_bias)
    # The gradient of the mean, which is of the dtype of the computation on the device whatever the upstream is.
    factor = upstream.to(query.device, sweep.compute) / sweep.rows
    extra = range_of_float16(factor) if sweep.query.x.dtype == torch.float16 else None
    memory = query.new_empty(
        (min(sweep.step, sweep.rows), triton.cdiv(sweep.columns, 64) * 64), dtype=sweep.query.x.dtype
    )
    moments = sweep.losses.new_empty((sweep.rows,)) if wanted[2] else None
    by_key: Tensor | None = None
    for n, (begin, end) in enumerate(sweep.panels):
        sweep.run(n, memory, factor, extra)
        panel = memory[: end - begin, : sweep.columns]
        if wanted[0] or wanted[2]:
            grad = grads[0] if wanted[0] else None
            write_gradient(sweep.query, product(panel, sweep.key.x), sweep.scale, extra, grad, moments, begin)
        if wanted[1]:
            by_key = product(panel.T, sweep.query.x[begin:end], by_key)
    if by_key is not None:
        write_gradient(sweep.key, by_key, sweep.scale, extra, grads[1])
    by_scale, by_bias = (
        torch.zeros_like(value) if sums is None else sum_of(sums, sums.new_empty(()), 1.0, extra).to(value)
        for sums, value in ((moments, logit_scale), (sweep.slopes, logit_bias))
    )
    return sweep.loss(), *grads, by_scale, by_bias


def _meta(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, number = torch.empty(n, d, dtype=dtype, device="meta"), torch.empty((), device="meta")
    return x, x, number, number


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the table."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for n in (512, 32768):
            x = _meta(n, 768, dtype)
            claims = CLAIMS if dtype == torch.bfloat16 else {}
            name = f"{n}-{str(dtype).removeprefix('torch.')}"
            yield Example(f"step-{name}", partial(step, x[2], *x, 0, [True] * 4), claims, SPILLS)
    yield Example("forward", partial(forward, *_meta(32768, 768, torch.bfloat16), 0), CLAIMS, SPILLS)
    half = _meta(32768, 768, torch.float16)
    yield Example("step-float16", partial(step, half[2], *half, 0, [True] * 4), CLAIMS, SPILLS)
