"""The sigmoid contrastive loss in Triton: kernel and launches. `ops.py` defines the ops.

An entry's loss and gradient depend on its similarity alone, so one sweep computes both: one product of N·K·D for the
similarities, and two with each panel of their gradient, which `_core/triton/similarity.py` explains. Each program
writes its sums to places of its own, and they are added in a fixed order.

With z = scale * similarity + bias, a negative's loss is log(1 + exp(z)) and its gradient sigmoid(z). A positive's loss
is that of -z, and its gradient -sigmoid(-z).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton.launch import launch
from tlkernels._core.triton.similarity import (
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
    """Return log(1 + e) for e in [0, 1], accurate for small e too: 2 atanh(s) with s = e / (2 + e), at most 1 / 3."""
    s = e / (2 + e)
    square = s * s
    p = tl.full([], 1 / (2 * TERMS + 1), e.dtype)
    for k in tl.static_range(TERMS):
        p = p * square + 1 / (2 * (TERMS - 1 - k) + 1)
    return 2 * s * p


# Not specialised: what another number of rows changes. `column_count` is specialised: the width of the stores to the
# panel depends on what divides it.
@triton.jit(do_not_specialize=["row_end", "positive_offset", "known_stride", "row_tiles"])
def pairs(
    rows, columns,  # embeddings, (N, D) and (K, D), or None with `known`
    known,  # similarities of this panel, (rows, K), or None: compute them
    scale, bias,  # 0-d
    upstream,  # 0-d, with panel
    grad_scale,  # 0-d, multiplies upstream; or None for 1
    panel,  # result, (rows of the panel, K): gradients by the products / scale; or None
    losses, by_scale, by_bias,  # results: sums of each program; the gradients with panel
    first_row, row_end, column_count,  # rows of the panel; K
    positive_offset,  # row i's positive is column i + positive_offset
    D, row_stride, column_stride, known_stride, panel_stride,  # features; strides between rows of each
    row_tiles,  # tiles of rows in the panel
    PRECISION: tl.constexpr,  # of float32: "ieee" or "tf32"
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # rows, columns and features of a tile
):  # fmt: skip
    """Sum the losses of a tile's pairs. With a panel also write their gradients, and sum those by scale and bias."""
    C: tl.constexpr = losses.dtype.element_ty
    tile_row, tile_column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    i = first_row + tile_row * BM + tl.arange(0, BM)
    j = tile_column * BN + tl.arange(0, BN)
    row, column = tl.minimum(i, row_end - 1), tl.minimum(j, column_count - 1)
    s = similarity_tile(
        rows, columns, known, None, None, row, column, D, first_row, row_stride, column_stride, known_stride,
        BM, BN, BK, PRECISION,
    )  # fmt: skip
    mask = (i < row_end)[:, None] & (j < column_count)[None, :]
    positive = (i + positive_offset)[:, None] == j[None, :]
    z = s * tl.load(scale).to(C) + tl.load(bias).to(C)
    z = tl.where(positive, -z, z)
    e = tl.exp2(tl.where(z < 0, z, -z) * LOG2E)
    # The first omitted term is below 2^-26 of the sum, in float64 2^-56.
    loss = tl.where(z < 0, 0.0, z) + log_of_one_more(e, 16 if tl.float64 == C else 7)
    tl.store(losses + tl.program_id(0), tl.sum(tl.sum(tl.where(mask, loss, 0.0), 1), 0))
    if panel is not None:
        factor = tl.load(upstream).to(C)
        if grad_scale is not None:
            factor *= tl.load(grad_scale).to(C)
        g = tl.where(z < 0, e, 1.0) / (1 + e) * factor
        g = tl.where(positive, -g, g)
        g = tl.where(mask, g, 0.0)
        tl.store(by_scale + tl.program_id(0), tl.sum(tl.sum(g * s, 1), 0))
        tl.store(by_bias + tl.program_id(0), tl.sum(tl.sum(g, 1), 0))
        at = panel + (i - first_row).to(tl.int64)[:, None] * panel_stride + j[None, :]
        tl.store(at, g.to(panel.dtype.element_ty), mask)


class _Sweep:
    """One pass over the pairs, panel by panel."""

    def __init__(self, query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, positive_offset: int):
        dtype = torch.promote_types(query.dtype, key.dtype)
        self.compute = compute_dtype(query, key)
        self.rows, self.columns, self.positive_offset = query.shape[0], key.shape[0], positive_offset
        self.config = TILES.find(query.device, dtype.itemsize, max(self.rows * self.columns, 1))
        self.precision = precision(dtype)
        self.scale, self.bias = (value.to(query.device) for value in (logit_scale, logit_bias))
        self.query, self.key = (prepare(x, dtype, False, self.config) for x in (query, key))
        self.step = panel_rows(self.rows, query.shape[1], self.config)
        tile = self.config.meta
        self.row_tiles = tiles_of(min(self.step, self.rows), tile["BM"])
        self.column_tiles = tiles_of(self.columns, tile["BN"])
        self.panels = [(begin, min(begin + self.step, self.rows)) for begin in range(0, self.rows, self.step)]
        # The loss of every tile, and its gradients by scale and bias.
        self.sums = query.new_zeros((3, len(self.panels), self.row_tiles * self.column_tiles), dtype=self.compute)

    def run(self, n: int, panel: Tensor | None, upstream: Tensor | None, grad_scale: Tensor | None) -> None:
        """Sweep over panel n."""
        begin, end = self.panels[n]
        x, y = self.query.x, self.key.x
        known = None
        sizes: tuple[int, ...] = x.shape[1], x.stride(0), y.stride(0), 0
        if self.compute == torch.float64:  # the library multiplies float64; tiles would not use tensor cores
            known = product(x[begin:end], y.T)
            sizes = 0, 0, 0, known.stride(0)
        row_tiles = tiles_of(end - begin, self.config.meta["BM"])
        launch(
            pairs, (row_tiles * self.column_tiles,), *((x, y) if known is None else (None, None)), known, self.scale,
            self.bias, upstream, grad_scale, panel, *self.sums[:, n], begin, end, self.columns, self.positive_offset,
            *sizes, 0 if panel is None else panel.stride(0), row_tiles, PRECISION=self.precision, config=self.config,
        )  # fmt: skip

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, NaN for no rows, and its gradients by scale and bias."""
        loss, by_scale, by_bias = self.sums.flatten(1).sum(1, dtype=torch.float64)
        return (loss / self.rows).to(self.compute), by_scale, by_bias


@torch.no_grad()
def forward(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, positive_offset: int) -> Tensor:
    """Return the loss."""
    sweep = _Sweep(query, key, logit_scale, logit_bias, positive_offset)
    for n in range(len(sweep.panels)):
        sweep.run(n, None, None, None)
    return sweep.totals()[0]


@torch.no_grad()
def step(
    upstream: Tensor, query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, positive_offset: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the loss, and its gradients times `upstream`."""
    sweep = _Sweep(query, key, logit_scale, logit_bias, positive_offset)
    want_query, want_key, *_ = wanted
    grads = [
        torch.empty_like(x.given, memory_format=torch.contiguous_format) if want else x.given.new_empty((0,))
        for x, want in ((sweep.query, want_query), (sweep.key, want_key))
    ]
    if not sweep.rows:
        return sweep.totals()[0], *grads, torch.zeros_like(logit_scale), torch.zeros_like(logit_bias)
    # The upstream may have another dtype and be on the CPU.
    factor = upstream.to(query.device, sweep.compute) / sweep.rows
    grad_scale = range_of_float16(factor) if sweep.query.x.dtype == torch.float16 else None
    memory = query.new_empty((min(sweep.step, sweep.rows), tiles_of(sweep.columns, 64) * 64), dtype=sweep.query.x.dtype)
    by_key: Tensor | None = None
    for n, (begin, end) in enumerate(sweep.panels):
        sweep.run(n, memory, factor, grad_scale)
        panel = memory[: end - begin, : sweep.columns]
        if want_query:
            write_gradient(sweep.query, product(panel, sweep.key.x), sweep.scale, grad_scale, grads[0], begin)
        if want_key:
            by_key = product(panel.T, sweep.query.x[begin:end], by_key)
    if by_key is not None:
        write_gradient(sweep.key, by_key, sweep.scale, grad_scale, grads[1])
    loss, by_scale, by_bias = sweep.totals()
    if grad_scale is not None:
        by_scale, by_bias = by_scale / grad_scale, by_bias / grad_scale
    # Copies: in float64 both would be views of one tensor, which an op must not return.
    return loss, *grads, by_scale.to(logit_scale, copy=True), by_bias.to(logit_bias, copy=True)
