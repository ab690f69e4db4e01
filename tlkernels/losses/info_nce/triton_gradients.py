"""The kernels of InfoNCE's gradients; `triton.py` launches them and says how they work together."""

import triton
import triton.language as tl

from tlkernels._core.triton.similarity import similarity_tile
from tlkernels.losses.info_nce.triton_kernels import (
    ALL,
    INF,
    LABEL,
    LOG2E,
    NO_SET,
    positive_column,
    softmax,
    taking_part,
)


@triton.jit(do_not_specialize=["rows", "classes"], do_not_specialize_on_alignment=["state", "positive"])
def slopes(
    state,  # (statistic, N)
    positive,  # (N,) similarities to the positives
    target,  # (N,) columns of the positives, or None: the row's number
    scale,  # 0-d
    upstream,  # (N,)
    grad_scale,  # 0-d, multiplies upstream; or None for 1
    out,  # result, (4, N): top, factor, share, at_positive
    rows, classes,
    upstream_stride,
    smoothing: tl.float64,
    part: tl.float64,  # multiplies upstream: 0.5 if the loss is the mean of two directions
    SET: tl.constexpr,  # NO_SET, ALL or LABEL
    BI: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Write four numbers of each row, which give the gradient by its logits.

    It is factor * exp2(logit - top), minus `share` in the set, and `at_positive` at the positive. A row without a
    positive has zeros, and a top above all logits.
    """
    C: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    mask = i < rows
    g = tl.load(upstream + i.to(tl.int64) * upstream_stride, mask, other=0.0).to(C) * tl.full([], part, C)
    if grad_scale is not None:
        g *= tl.load(grad_scale).to(C)
    peak, total = tl.load(state + i, mask, other=0.0), tl.load(state + rows + i, mask, other=1.0)
    share, count = tl.zeros([BI], C), tl.zeros([BI], C)
    if SET != NO_SET:
        count = tl.load(state + 4 * rows + i, mask, other=1.0)
    if SET == LABEL:
        valid = count > 0
        top, factor, at_positive = peak, g / total, tl.zeros([BI], C)
        share = g / tl.where(valid, count, 1.0)
    else:
        valid = mask
        if target is not None:
            at = tl.load(target + i, mask, other=0)
            valid = (at >= 0) & (at < classes)
        top, others, e = softmax(peak, total, tl.load(positive + i, mask, other=0.0) * (tl.load(scale).to(C) * LOG2E))
        factor, at_positive = g / (others + e), -g * (others / (others + e))
        if SET == ALL:
            smooth = tl.full([], smoothing, C)
            share = g * (smooth / (count + 1))
            at_positive += g * smooth - share
    tl.store(out + i, tl.where(valid, top, 1e30), mask)
    tl.store(out + rows + i, tl.where(valid, factor, 0.0), mask)
    tl.store(out + 2 * rows + i, tl.where(valid, share, 0.0), mask)
    tl.store(out + 3 * rows + i, tl.where(valid, at_positive, 0.0), mask)


# `column_count` is specialised: the width of the stores to the panel depends on what divides it.
@triton.jit(do_not_specialize=[
    "row_end", "first_column", "classes", "self_column", "known_stride", "mask_row", "slopes_stride", "row_tiles",
], do_not_specialize_on_alignment=["by_scale"])  # fmt: skip
def gradient(
    rows, columns,  # embeddings, (N, D) and (K, D), or None with `known`
    known,  # similarities of this panel, (rows, K), or None: compute them
    row_norms, column_norms,  # inverse norms, (N,) and (K,), or None
    scale,  # 0-d
    target,  # (N,) columns of the positives, or None: the row's number
    mask,  # (N, K) uint8, not 0 where left out; or None
    row_ids, column_ids,  # (N,) and (K,) int64, or None
    row_slopes, column_slopes,  # of `slopes`, (4, N), of rows, and of columns or None
    panel,  # result, (rows of the panel, K)
    by_scale,  # result: the sum of gradient * similarity of each program; or None
    first_row, row_end,  # rows of the panel
    column_count, first_column, classes,  # of this part; its first column among all `classes` columns
    self_column,  # the column that is row 0 itself; with SELF
    D, row_stride, column_stride, known_stride,  # features; strides between rows of each
    mask_row, mask_column,  # strides of mask
    slopes_stride, panel_stride,  # strides of the slopes and of panel
    row_tiles,  # tiles of rows in the panel
    SET: tl.constexpr,  # NO_SET, ALL or LABEL
    SELF: tl.constexpr,  # each row has a column that is itself
    PRECISION: tl.constexpr,  # of float32: "ieee" or "tf32"
    ROUNDED: tl.constexpr,  # logits are rounded, as those of `statistics` are
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # rows, columns and features of a tile
):  # fmt: skip
    """Write a tile of the gradient by the products of the embeddings, divided by `scale`.

    Positives are written like other entries, and `gradient_at_positives` overwrites them: distinguishing them in every
    tile would take registers that a second program on the multiprocessor needs.
    """
    C: tl.constexpr = row_slopes.dtype.element_ty
    tile_row, tile_column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    i = first_row + tile_row * BM + tl.arange(0, BM)
    j = tile_column * BN + tl.arange(0, BN)
    row, column = tl.minimum(i, row_end - 1), tl.minimum(j, column_count - 1)
    s = similarity_tile(
        rows, columns, known, row_norms, column_norms, row, column, D, first_row,
        row_stride, column_stride, known_stride, BM, BN, BK, PRECISION,
    )  # fmt: skip
    x = s * (tl.load(scale).to(C) * LOG2E)
    if ROUNDED:  # the compiler does not fuse a product with a difference through a select
        x = tl.where((row >= 0)[:, None], x, -INF)
    of_row, of_column = row_slopes + row, column_slopes
    g = tl.load(of_row + slopes_stride)[:, None] * tl.exp2(x - tl.load(of_row)[:, None])
    if column_slopes is not None:
        of_column = column_slopes + column
        g += tl.load(of_column + slopes_stride)[None, :] * tl.exp2(x - tl.load(of_column)[None, :])
    if SELF or mask is not None or row_ids is not None or SET != NO_SET:
        counts, in_set = taking_part(
            (row >= 0)[:, None] & (column >= 0)[None, :], row, column, mask, row_ids, column_ids, self_column,
            mask_row, mask_column, SET, SELF,
        )  # fmt: skip
        g = tl.where(counts, g, 0.0)
        if SET != NO_SET:
            share = tl.load(of_row + 2 * slopes_stride)[:, None]
            if column_slopes is not None:
                share = share + tl.load(of_column + 2 * slopes_stride)[None, :]
            g -= tl.where(in_set, share, 0.0)
    if by_scale is not None:
        moments = tl.where((i < row_end)[:, None] & (j < column_count)[None, :], g * s, 0.0)
        if SET != LABEL:
            positive = positive_column(target, row, classes) - first_column
            moments = tl.where(positive[:, None] == j[None, :], 0.0, moments)
        tl.store(by_scale + tl.program_id(0), tl.sum(tl.sum(moments, 1), 0))
    if row_norms is not None:
        g = g * tl.load(row_norms + row)[:, None] * tl.load(column_norms + column)[None, :]
    at = panel + (i - first_row).to(tl.int64)[:, None] * panel_stride + j[None, :]
    tl.store(at, g.to(panel.dtype.element_ty), (i < row_end)[:, None] & (j < column_count)[None, :])


@triton.jit(
    do_not_specialize=["end", "first", "columns", "rows"], do_not_specialize_on_alignment=["similarity", "by_scale"]
)
def gradient_at_positives(
    row_slopes, column_slopes,  # of `slopes`, (4, N), of rows, and of columns or None
    similarity,  # (N,) similarities to the positives
    target,  # (N,) columns of the positives, or None: the row's number
    row_norms, column_norms,  # inverse norms, (N,) and (columns,), or None
    panel,  # result, (rows of the panel, columns)
    by_scale,  # result, (N,): gradient * similarity; or None
    begin, end,  # rows of the panel
    first, columns,  # the panel's columns are `first` ... of the matrix
    rows,  # N, the stride of the slopes
    panel_stride,
    BI: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Write the gradient at the positives that are among the panel's columns."""
    i = begin + tl.program_id(0) * BI + tl.arange(0, BI)
    at = i.to(tl.int64)
    if target is not None:
        at = tl.load(target + i, i < end, other=-1)
    j = at - first
    mask = (i < end) & (j >= 0) & (j < columns)
    g = tl.load(row_slopes + 3 * rows + i, mask, other=0.0)
    if column_slopes is not None:
        g += tl.load(column_slopes + 3 * rows + j, mask, other=0.0)
    if by_scale is not None:
        tl.store(by_scale + i, g * tl.load(similarity + i, mask, other=0.0), mask)
    if row_norms is not None:
        g = g * tl.load(row_norms + i, mask, other=0.0) * tl.load(column_norms + j, mask, other=0.0)
    tl.store(panel + (i - begin).to(tl.int64) * panel_stride + j, g.to(panel.dtype.element_ty), mask)


@triton.jit
def per_query_gradients(
    rows, row_norms,  # (N, D), and inverse norms (N,) or None
    negatives,  # (N, M, D)
    similarities, inverse_norms,  # (N, M), of `per_query_similarities`
    panel,  # (rows of the panel, M), of `gradient`
    scale,  # 0-d
    grad_scale,  # 0-d, divides the gradient by negatives; or None for 1
    total,  # result, (rows of the panel, D): the gradient by the rows / scale is added; or None
    grad,  # result, (N, M, D): the gradient by negatives; or None
    first,  # first row of the panel
    count, features,  # M and D
    row_stride,
    by_row, by_negative, by_feature,  # strides of negatives
    panel_stride, total_stride,  # between rows
    BN: tl.constexpr, BD: tl.constexpr,  # negatives read at a time; features of a program
):  # fmt: skip
    """Add the gradient by a row that its negatives give, and write the gradient by these negatives."""
    C: tl.constexpr = panel.dtype.element_ty
    r, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD).to(tl.int64)
    i = first + r
    x = tl.load(rows + i * row_stride + d, d < features, other=0.0).to(C)
    factor = tl.load(scale).to(C)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(C)
    by_x = tl.zeros([BD], C)
    for start in range(0, count, BN):
        m = start + tl.arange(0, BN).to(tl.int64)
        mask = (m < count)[:, None] & (d < features)[None, :]
        y = tl.load(negatives + i * by_row + m[:, None] * by_negative + d[None, :] * by_feature, mask, other=0.0).to(C)
        g = tl.load(panel + r * panel_stride + m, m < count, other=0.0)
        by_product = g
        if row_norms is not None:
            inverse = tl.load(inverse_norms + i * count + m, m < count, other=0.0)
            by_product = g * tl.load(row_norms + i) * inverse
        by_x += tl.sum(by_product[:, None] * y, 0)
        if grad is not None:
            by_y = by_product[:, None] * x[None, :]
            if row_norms is not None:  # a norm below 1e-12 does not vary
                s = tl.load(similarities + i * count + m, m < count, other=0.0)
                along = tl.where(inverse < 1e12, g * s * inverse * inverse, 0.0)
                by_y -= along[:, None] * y
            at = grad + (i * count + m[:, None]) * features + d[None, :]
            tl.store(at, (by_y * factor).to(grad.dtype.element_ty), mask)
    if total is not None:
        at = total + r * total_stride + d
        tl.store(at, tl.load(at, d < features, other=0.0) + by_x, d < features)
