"""The matrix of similarities of embeddings for Triton kernels, computed tile by tile and never stored whole.

This imports triton. With N rows, K columns and D features a sweep over the matrix is one product of 2·N·K·D operations.
The gradients by rows and by columns are two more, of the matrix of gradients by the similarities. A program can hold a
tile of that matrix, but not the D features of a tile of both gradients: 128 rows of 1024 features in float32 are twice
a multiprocessor's registers. So a loss's gradient kernel recomputes a *panel* of the matrix, `panel_rows` rows of all
columns, and writes it in the operands' dtype. The library then multiplies it by both operands. No product is computed
twice: 1 + 2 products, 4 with a sweep of statistics before. (Gradients from tiles would recompute the matrix for each:
5.) No two programs add to the same place.

Bytes that this adds, for 16-bit operands: a panel is written once and read twice, 6·N·K bytes in all for 2·D operations
an element and product. That is 1 / 11 of the time of its products at D = 1024 on an H200, and overlaps with them. The
columns' float32 gradient is read and written once a panel, 8·K·D bytes for 6·P·K·D operations: at P = 4096 rows 1 / 22
of the products' time. Memory: P·K elements with P = 4·D within bounds, so a multiple of N·D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import INTERPRETED, tf32
from tlkernels._core.triton.launch import Config, Table, launch

_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter's tl.dot treats bfloat16 as integers


@triton.jit
def similarities(
    rows, columns,  # (N, D) and (K, D), contiguous features
    i, j,  # rows and columns of the tile, all in range
    D,  # features, a multiple of BK
    row_stride, column_stride,  # between rows and between columns
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # rows, columns and features of a tile
    PRECISION: tl.constexpr,  # of float32: "ieee" or "tf32"
):  # fmt: skip
    """Return the products of rows i and columns j in float32."""
    d = tl.arange(0, BK)
    row_at = rows + i.to(tl.int64)[:, None] * row_stride + d[None, :]
    column_at = columns + j.to(tl.int64)[None, :] * column_stride + d[:, None]
    products = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, D, BK):
        x, y = tl.load(row_at), tl.load(column_at)
        if _WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        products = tl.dot(x, y, products, input_precision=PRECISION)
        row_at += BK
        column_at += BK
    return products


@triton.jit
def similarity_tile(
    rows, columns,  # (N, D) and (K, D), or None with `known`
    known,  # (rows from known_from on, K) products, or None: compute them
    row_norms, column_norms,  # inverse norms, (N,) and (K,), for cosines; or None
    i, j,  # rows and columns of the tile, all in range
    D, known_from,  # features; first row of `known`
    row_stride, column_stride, known_stride,  # between rows of each
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,  # as in `similarities`
):  # fmt: skip
    """Return the similarities of rows i and columns j."""
    if known is None:
        s = similarities(rows, columns, i, j, D, row_stride, column_stride, BM, BN, BK, PRECISION)
    else:
        s = tl.load(known + (i - known_from).to(tl.int64)[:, None] * known_stride + j[None, :])
    if row_norms is not None:  # the product of norms first, so that a symmetric matrix is rounded symmetrically
        s = s * (tl.load(row_norms + i)[:, None] * tl.load(column_norms + j)[None, :])
    return s


@triton.jit
def _power_below(x):
    """Return the power of two in (x / 2, x], for a positive, normal and finite x."""
    if x.dtype == tl.float64:
        power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return power


@triton.jit(do_not_specialize=["rows"])
def scale_rows(
    x,  # (rows, features)
    out,  # result, (rows, out_stride), padded with zeros
    norms,  # result, (3, rows)
    rows, features,
    row_stride, feature_stride,  # strides of x
    out_stride,
    BR: tl.constexpr, BD: tl.constexpr,  # rows of a program; features that it reads at a time
):  # fmt: skip
    """Write rows divided by the power of two below their 2-norm, which is exact.

    `norms` are the inverse norm of the written row (a norm below 1e-12 counts as 1e-12); its square, or 0 for a norm
    below 1e-12, which is then constant; and the inverse of the power of two.
    """
    C: tl.constexpr = norms.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    x_at = x + i[:, None] * row_stride
    squares = tl.zeros([BR, BD], C)
    for start in range(0, features, BD):
        d = start + tl.arange(0, BD).to(tl.int64)[None, :]
        value = tl.load(x_at + d * feature_stride, (i[:, None] < rows) & (d < features), other=0.0).to(C)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1))
    divisor = tl.where(norm < 1e-12, 1e-12, norm)
    power = _power_below(tl.where(divisor < 1e30, divisor, 1e30))
    shrink = 1 / power
    inverse = power / divisor
    tl.store(norms + i, inverse, i < rows)
    tl.store(norms + rows + i, tl.where(norm < 1e-12, 0.0, inverse * inverse), i < rows)
    tl.store(norms + 2 * rows + i, shrink, i < rows)
    for start in range(0, out_stride, BD):
        d = start + tl.arange(0, BD).to(tl.int64)[None, :]
        value = tl.load(x_at + d * feature_stride, (i[:, None] < rows) & (d < features), other=0.0).to(C)
        value = (value * shrink[:, None]).to(out.dtype.element_ty)
        tl.store(out + i[:, None] * out_stride + d, value, (i[:, None] < rows) & (d < out_stride))


@triton.jit(do_not_specialize=["rows", "all_rows"])
def finish(
    total,  # (rows, features): the gradient by the rows of x, times grad_scale / scale
    x,  # (all_rows, features), as they were multiplied
    norms,  # (3, all_rows), of `scale_rows`; or None if x has the given values
    scale,  # 0-d
    grad_scale,  # 0-d, of `range_of_float16`; or None for 1
    grad,  # result, (all_rows, features): the gradient by the given embeddings
    first,  # row of x and grad that is the first of total
    rows, features, all_rows,
    total_stride, x_stride,  # between rows
    BR: tl.constexpr, BD: tl.constexpr,  # rows of a program; features that it reads at a time
):  # fmt: skip
    """Write the gradient by the given embeddings, of some rows."""
    C: tl.constexpr = total.dtype.element_ty
    factor = tl.load(scale).to(C)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(C)
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = first + r
    mask = (r < rows)[:, None]
    along_row = tl.zeros([BR], C)
    shrink = tl.full([BR], 1.0, C)
    if norms is not None:  # less the part along the row, since its norm has no effect
        for start in range(0, features, BD):
            d = start + tl.arange(0, BD).to(tl.int64)[None, :]
            valid = mask & (d < features)
            value = tl.load(x + i[:, None] * x_stride + d, valid, other=0.0).to(C)
            along_row += tl.sum(value * tl.load(total + r[:, None] * total_stride + d, valid, other=0.0), 1)
        along_row *= tl.load(norms + all_rows + i, r < rows, other=0.0)
        shrink = tl.load(norms + 2 * all_rows + i, r < rows, other=0.0)
    for start in range(0, features, BD):
        d = start + tl.arange(0, BD).to(tl.int64)[None, :]
        valid = mask & (d < features)
        g = tl.load(total + r[:, None] * total_stride + d, valid, other=0.0)
        if norms is not None:
            value = tl.load(x + i[:, None] * x_stride + d, valid, other=0.0).to(C)
            g = (g - along_row[:, None] * value) * shrink[:, None]
        tl.store(grad + i[:, None] * features + d, (g * factor).to(grad.dtype.element_ty), valid)


# Tiles of similarities, by reasoning on 2026-11-21, without a GPU. 16-bit: 128 x 128 accumulators are 64 registers of a
# thread at 8 warps. With at most 128 in all, two programs share a multiprocessor, so that one computes exponentials
# while the other multiplies; the values that are then spilled cost once a tile, not in the loop over features. (Kernels
# with options need many more registers and have smaller tiles: `for_options`.) 64 features are a 128-byte line of
# shared memory; 32 where three such stages would leave no space for a second program. float32: a tile for products
# without tensor cores. float64 is read, not multiplied. A few hundred rows have smaller tiles, so that there are
# programs for all multiprocessors.
_TWO = {"maxnreg": 128}
TILES = Table(
    "similarity",
    Config("interpreter", 0, 80 * 80, {"BM": 16, "BN": 16, "BK": 16}, 1),
    Config("interpreter", 0, None, {"BM": 128, "BN": 128, "BK": 32}, 1),
    Config("gfx*", 2, 1 << 20, {"BM": 64, "BN": 64, "BK": 64}, 4, 2),
    Config("gfx*", 2, None, {"BM": 128, "BN": 128, "BK": 64}, 8, 2),
    Config("gfx*", 4, None, {"BM": 64, "BN": 64, "BK": 32}, 4, 2),
    Config("sm_*", 2, 1 << 20, {"BM": 64, "BN": 64, "BK": 64}, 4, 3),
    Config("sm_9*", 2, None, {"BM": 128, "BN": 128, "BK": 64, **_TWO}, 8, 3),
    Config("sm_10*", 2, None, {"BM": 128, "BN": 128, "BK": 64, **_TWO}, 8, 3),
    Config("sm_*", 2, None, {"BM": 128, "BN": 128, "BK": 32, **_TWO}, 8, 3),
    Config("*", 4, None, {"BM": 64, "BN": 64, "BK": 32}, 4, 3),
    Config("*", 8, None, {"BM": 32, "BN": 64, "BK": 32}, 4, 1),
)
# Passes over rows of features, bound by memory: 16 bytes a lane.
_ROWS = Table(
    "embedding rows",
    Config("interpreter", 0, None, {"BR": 16, "BD": 32}, 1),
    Config("*", 0, None, {"BR": 4, "BD": 512}, 4),
)


def for_options(config: Config, square: bool) -> Config:
    """Return the configuration for kernels whose options need many registers.

    The tile has half the columns, and no bound on registers. A `square` tile has half the rows and threads, too.
    """
    meta = {name: value for name, value in config.meta.items() if name != "maxnreg"}
    if INTERPRETED or meta["BM"] * meta["BN"] < 128 * 128:
        return config._replace(meta=meta)
    meta["BN"] //= 2
    if not square:
        return config._replace(meta=meta)
    meta["BM"] //= 2
    return config._replace(meta=meta, num_warps=config.num_warps // 2)


def tiles_of(size: int, tile: int) -> int:
    """Return how many tiles cover the size."""
    return -(-size // tile)


class Embeddings(NamedTuple):
    """Embeddings as the tiles read them: contiguous, aligned, the features padded with zeros."""

    given: Tensor
    x: Tensor
    norms: Tensor | None
    """(3, rows), of `scale_rows`; None: `x` has the given values."""

    @property
    def rows(self) -> int:
        return int(self.x.shape[0])


def prepare(given: Tensor, dtype: torch.dtype, normalize: bool, config: Config) -> Embeddings:
    """Return the embeddings in the dtype of the operands; copied only if needed."""
    rows, features = given.shape
    step = config.meta["BK"]
    padded = tiles_of(features, step) * step
    if normalize:
        x = given.new_empty((rows, padded), dtype=dtype)
        norms = given.new_empty((3, rows), dtype=compute_dtype(given))
        row = _ROWS.find(given.device, 0, rows)
        grid = (tiles_of(rows, row.meta["BR"]),)
        launch(scale_rows, grid, given, x, norms, rows, features, *given.stride(), padded, config=row)
        return Embeddings(given, x, norms)
    if padded == features and given.dtype == dtype and given.is_contiguous() and given.data_ptr() % 16 == 0:
        return Embeddings(given, given, None)
    x = given.new_zeros((rows, padded), dtype=dtype)
    x[:, :features] = given
    return Embeddings(given, x, None)


def precision(dtype: torch.dtype) -> str:
    """Return how operands are multiplied: float32 in TF32 if PyTorch's setting allows it."""
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


def panel_rows(rows: int, features: int, config: Config) -> int:
    """Return a panel's number of rows: a multiple of the tile's, and 4 * features within bounds."""
    tile = config.meta["BM"]
    few, many = (3 * tile, 3 * tile) if INTERPRETED else (2048, 4096)
    wanted = min(max(4 * features, few), many, max(rows, 1))
    return tiles_of(wanted, tile) * tile


def product(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """Return a @ b, in float32 for 16-bit operands; or add it to `total`, in place."""
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    if a.device.type != "cuda":
        # In float64, so that the interpreter shows the kernels' error alone: a CPU library's float32 product has a
        # larger error than the GPU's, and it varies with the processor (docs/numerics.md).
        exact = a.double() @ b.double()
        return exact.to(torch.float32 if narrow else a.dtype) if total is None else total.add_(exact)
    # With `out=`: autocast does not change it.
    if total is None:
        total = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32 if narrow else None)
        return torch.mm(a, b, out_dtype=torch.float32, out=total) if narrow else torch.mm(a, b, out=total)
    if narrow:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return torch.addmm(total, a, b, out=total)


def range_of_float16(upstream: Tensor) -> Tensor:
    """Return a power of two that scales the sum of two gradients for this upstream to float16's range."""
    _, exponent = torch.frexp(upstream.abs().amax().float())
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (13 - exponent).clamp(-100, 100))


def write_gradient(
    embeddings: Embeddings, total: Tensor, scale: Tensor, grad_scale: Tensor | None, grad: Tensor, first: int = 0
) -> None:
    """Write the gradient of the rows from `first` on, from `total`, a product with a panel; see `finish`."""
    rows, features = total.shape[0], grad.shape[1]
    config = _ROWS.find(total.device, 0, rows)
    launch(
        finish, (tiles_of(rows, config.meta["BR"]),), total, embeddings.x, embeddings.norms, scale, grad_scale, grad,
        first, rows, features, embeddings.rows, total.stride(0), embeddings.x.stride(0), config=config,
    )  # fmt: skip
