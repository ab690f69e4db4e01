"""The sigmoid contrastive loss in Triton. What the ops mean is in `ops.py`.

Each entry's loss and gradient are known from its similarity alone, so one sweep gives all: one product of N·K·D for the
similarities, and two with each panel of their gradient, which `_core/triton_similarity.py` explains. A program's sums
go to places of their own and are added in a fixed order.

With z = scale * similarity + bias a negative's loss is log(1 + exp(z)), its gradient sigmoid(z); a positive's are those
of -z, with the sign turned.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Example, launch
from tlkernels._core.triton.similarity import (
    CLAIMS,
    SPILLS,
    TILES,
    panel_rows,
    precision,
    prepare,
    product,
    range_of_float16,
    similarity_tile,
    tiles_of,
    write_gradient,
)

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


# What another number of rows changes, but for `column_count`: how wide the stores to the panel are depends on it.
@triton.jit(do_not_specialize=["row_end", "own", "known_stride", "row_tiles"])
def pairs(
    rows, columns, known, scale, bias, upstream, extra, panel, losses, by_scale, by_bias,
    first_row, row_end, column_count, own, D, row_stride, column_stride, known_stride, panel_stride, row_tiles,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sum the losses of a tile's pairs; with a panel also write their gradients, and sum those by scale and bias.

    Gradients are times `upstream`, and times `extra` if given.
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
        g = tl.where(here, g, 0.0)
        tl.store(by_scale + tl.program_id(0), tl.sum(tl.sum(g * s, 1), 0))
        tl.store(by_bias + tl.program_id(0), tl.sum(tl.sum(g, 1), 0))
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
        self.row_tiles = tiles_of(min(self.step, self.rows), tile["BM"])
        self.column_tiles = tiles_of(self.columns, tile["BN"])
        self.panels = [(begin, min(begin + self.step, self.rows)) for begin in range(0, self.rows, self.step)]
        # Of every tile: the loss, and its gradient by scale and bias.
        self.sums = query.new_zeros((3, len(self.panels), self.row_tiles * self.column_tiles), dtype=self.compute)

    def run(self, n: int, panel: Tensor | None, upstream: Tensor | None, extra: Tensor | None) -> None:
        """Sweep over panel n."""
        begin, end = self.panels[n]
        x, y = self.query.x, self.key.x
        known = None
        numbers: tuple[int, ...] = x.shape[1], x.stride(0), y.stride(0), 0
        if self.compute == torch.float64:  # no tensor core multiplies them as float64; the library does what there is
            known = product(x[begin:end], y.T)
            numbers = 0, 0, 0, known.stride(0)
        row_tiles = tiles_of(end - begin, self.config.meta["BM"])
        tensors = *((x, y) if known is None else (None, None)), known, self.scale, self.bias, upstream, extra, panel
        sums = self.sums[:, n]
        numbers = begin, end, self.columns, self.own, *numbers, 0 if panel is None else panel.stride(0), row_tiles
        launch(
            pairs,
            (row_tiles * self.column_tiles,),
            *tensors,
            *sums,
            *numbers,
            PRECISION=self.precision,
            config=self.config,
        )

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, for no rows NaN, and its gradients by scale and bias."""
        loss, by_scale, by_bias = self.sums.flatten(1).sum(1, dtype=torch.float64)
        return (loss / self.rows).to(self.compute), by_scale, by_bias


@torch.no_grad()
def forward(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, own: int) -> Tensor:
    """Return the loss."""
    sweep = _Sweep(query, key, logit_scale, logit_bias, own)
    for n in range(len(sweep.panels)):
        sweep.run(n, None, None, None)
    return sweep.totals()[0]


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
        return sweep.totals()[0], *grads, torch.zeros_like(logit_scale), torch.zeros_like(logit_bias)
    # The gradient of the mean, which is of the dtype of the computation on the device whatever the upstream is.
    factor = upstream.to(query.device, sweep.compute) / sweep.rows
    extra = range_of_float16(factor) if sweep.query.x.dtype == torch.float16 else None
    memory = query.new_empty((min(sweep.step, sweep.rows), tiles_of(sweep.columns, 64) * 64), dtype=sweep.query.x.dtype)
    by_key: Tensor | None = None
    for n, (begin, end) in enumerate(sweep.panels):
        sweep.run(n, memory, factor, extra)
        panel = memory[: end - begin, : sweep.columns]
        if wanted[0]:
            write_gradient(sweep.query, product(panel, sweep.key.x), sweep.scale, extra, grads[0], begin)
        if wanted[1]:
            by_key = product(panel.T, sweep.query.x[begin:end], by_key)
    if by_key is not None:
        write_gradient(sweep.key, by_key, sweep.scale, extra, grads[1])
    loss, by_scale, by_bias = sweep.totals()
    if extra is not None:
        by_scale, by_bias = by_scale / extra, by_bias / extra
    # An op returns no views: of one tensor both would be, in float64.
    return loss, *grads, by_scale.to(logit_scale, copy=True), by_bias.to(logit_bias, copy=True)


def _example(n: int, dtype: torch.dtype, function: Any) -> Any:
    x, number = torch.empty(n, 768, dtype=dtype, device="meta"), torch.empty((), device="meta")
    if function is forward:
        return partial(forward, x, x, number, number, 0)
    return partial(step, number, x, x, number, number, 0, [True] * 4)


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the table."""
    for function, n, dtype in (
        (step, 512, torch.bfloat16),
        (step, 32768, torch.bfloat16),
        (forward, 32768, torch.bfloat16),
        (step, 32768, torch.float16),
        (step, 32768, torch.float32),
        (step, 32768, torch.float64),
    ):
        claims = CLAIMS if dtype.itemsize == 2 else {}
        name = f"{function.__name__}-{n}-{str(dtype).removeprefix('torch.')}"
        yield Example(name, _example(n, dtype, function), claims, SPILLS)
