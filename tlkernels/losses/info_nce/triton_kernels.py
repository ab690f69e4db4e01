"""The kernels of InfoNCE's losses; `triton.py` launches them and says how they work together."""

import math

import triton
import triton.language as tl

from tlkernels._core.triton.similarity import similarity_tile

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INF = tl.constexpr(math.inf)
# The set of a row, whose similarities are summed: none, all entries but the positive for label smoothing, or those of
# the row's label for sup_con.
NO_SET, ALL, LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def positive_column(target, i, classes):
    """Return the column of each row's positive, -1 if the target is out of range; without targets the row's number."""
    column = i
    if target is not None:
        at = tl.load(target + i)
        column = tl.where((at >= 0) & (at < classes), at, -1).to(tl.int32)
    return column


@triton.jit
def taking_part(
    counts,  # entries of the tile, before masks
    i, j,  # rows and columns of the tile, all in range
    mask,  # uint8, not 0 where left out; or None
    row_ids, column_ids,  # int64, or None; equal ids are the label's (LABEL) or left out
    self_column,  # the column that is row 0 itself, and so on along the rows; left out with SELF
    mask_row, mask_column,  # strides of mask
    SET: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Return which of the entries count, and which of those are in the set."""
    if SELF:
        counts = counts & ((i + self_column)[:, None] != j[None, :])
    if mask is not None:
        counts = counts & (
            tl.load(mask + i.to(tl.int64)[:, None] * mask_row + j.to(tl.int64)[None, :] * mask_column) == 0
        )
    in_set = counts
    if row_ids is not None:
        same = tl.load(row_ids + i)[:, None] == tl.load(column_ids + j)[None, :]
        if SET == LABEL:
            in_set = counts & same
        else:
            counts = counts & (same == 0)
            in_set = counts
    return counts, in_set


@triton.jit
def finite_or_zero(peak):
    """Return the peak, or 0 where it is -inf, so that differences from it are not NaN."""
    return tl.where(peak == -INF, 0.0, peak)


# Not specialised: what another batch size changes, that is numbers of rows and columns and the strides and offsets of
# their statistics.
@triton.jit(do_not_specialize=[
    "row_end", "column_count", "first_column", "classes", "self_column", "known_stride", "mask_row", "row_part",
    "row_items", "column_part", "column_items", "skipped", "row_tiles", "tile_offset",
])  # fmt: skip
def statistics(
    rows, columns,  # embeddings, (N, D) and (K, D), or None with `known`
    known,  # similarities of this panel, (rows, K), or None: compute them
    row_norms, column_norms,  # inverse norms, (N,) and (K,), or None
    scale,  # 0-d
    target,  # (N,) columns of the positives, or None: the row's number
    mask,  # (N, K) uint8, not 0 where left out; or None
    row_ids, column_ids,  # (N,) and (K,) int64, or None
    by_row,  # result, (tile of columns, statistic, row of the panel)
    by_column,  # result, (tile of rows, statistic, column), or None
    first_row, row_end,  # rows of the panel
    column_count, first_column, classes,  # of this part; its first column among all `classes` columns
    self_column,  # the column that is row 0 itself; with SELF
    D, row_stride, column_stride, known_stride,  # features; strides between rows of each
    mask_row, mask_column,  # strides of mask
    row_part, row_items,  # strides of by_row between tiles, and between statistics
    column_part, column_items,  # of by_column
    skipped,  # tiles of columns that the grid leaves out, with PAIRED
    row_tiles,  # tiles of rows in the panel
    tile_offset,  # tiles of the parts before this one
    SET: tl.constexpr,  # NO_SET, ALL or LABEL
    SELF: tl.constexpr,  # each row has a column that is itself
    PAIRED: tl.constexpr,  # the matrix is symmetric
    PRECISION: tl.constexpr,  # of float32: "ieee" or "tf32"
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,  # rows, columns and features of a tile
):  # fmt: skip
    """Write a tile's peak, sum of exponentials, and sum and number of the set, of its rows and of its columns.

    With PAIRED, tiles below the diagonal are left out, and the columns of tiles above it are also rows.
    """
    C: tl.constexpr = by_row.dtype.element_ty
    tile_row, tile_column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles + skipped
    if PAIRED and tile_column < first_row // BM + tile_row:
        return
    i = first_row + tile_row * BM + tl.arange(0, BM)
    j = tile_column * BN + tl.arange(0, BN)
    row, column = tl.minimum(i, row_end - 1), tl.minimum(j, column_count - 1)
    s = similarity_tile(
        rows, columns, known, row_norms, column_norms, row, column, D, first_row,
        row_stride, column_stride, known_stride, BM, BN, BK, PRECISION,
    )  # fmt: skip
    counts = (i < row_end)[:, None] & (j < column_count)[None, :]
    if SET != LABEL:
        positive = positive_column(target, row, classes) - first_column
        counts = counts & (positive[:, None] != j[None, :])
    counts, in_set = taking_part(
        counts, row, column, mask, row_ids, column_ids, self_column, mask_row, mask_column, SET, SELF
    )  # fmt: skip
    x = tl.where(counts, s * (tl.load(scale).to(C) * LOG2E), -INF)
    peak = tl.max(x, 1)
    total = tl.sum(tl.exp2(x - finite_or_zero(peak)[:, None]), 1)
    to = by_row + (tile_offset + tile_column).to(tl.int64) * row_part + (i - first_row)
    tl.store(to, peak, i < row_end)
    tl.store(to + row_items, total, i < row_end)
    if SET != NO_SET:
        tl.store(to + 2 * row_items, tl.sum(tl.where(in_set, s, 0.0), 1), i < row_end)
        tl.store(to + 3 * row_items, tl.sum(in_set.to(C), 1), i < row_end)
    if by_column is not None:
        peak = tl.max(x, 0)
        total = tl.sum(tl.exp2(x - finite_or_zero(peak)[None, :]), 0)
        to = by_column + tile_row.to(tl.int64) * column_part + j
        tl.store(to, peak, j < column_count)
        tl.store(to + column_items, total, j < column_count)
        if SET != NO_SET:
            tl.store(to + 2 * column_items, tl.sum(tl.where(in_set, s, 0.0), 0), j < column_count)
            tl.store(to + 3 * column_items, tl.sum(in_set.to(C), 0), j < column_count)


@triton.jit(
    do_not_specialize=["items", "tiles", "first_tile", "part_stride", "part_items", "state_stride"],
    do_not_specialize_on_alignment=["state"],
)
def fold(
    parts,  # (tile, statistic, item), of `statistics`; an item is a row or a column
    state,  # result, (statistic, item)
    first, items,  # the items of parts are `first` ... of state
    tiles, first_tile,  # number of tiles; number of the first
    part_stride, part_items,  # strides of parts between tiles, and between statistics
    state_stride,  # of state between statistics
    SET: tl.constexpr,  # NO_SET, ALL or LABEL
    FRESH: tl.constexpr,  # state is uninitialised
    SIDE: tl.constexpr,  # 0, or 1: only tiles from the item's on were written, or -1: only tiles before it
    TILE: tl.constexpr,  # items of a tile, with SIDE
    BT: tl.constexpr, BI: tl.constexpr,  # tiles joined at a time; items of a program
):  # fmt: skip
    """Join the statistics of tiles into the state of the items, in the order of the tiles."""
    C: tl.constexpr = state.dtype.element_ty
    r = tl.program_id(0) * BI + tl.arange(0, BI)
    i = first + r
    at = state + i
    peak, total = tl.full([BI], -INF, C), tl.zeros([BI], C)
    in_set, count = tl.zeros([BI], C), tl.zeros([BI], C)
    if not FRESH:
        peak, total = tl.load(at, r < items, other=-INF), tl.load(at + state_stride, r < items, other=0.0)
        if SET != NO_SET:
            in_set = tl.load(at + 3 * state_stride, r < items, other=0.0)
            count = tl.load(at + 4 * state_stride, r < items, other=0.0)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        written = (t < tiles)[:, None] & (r < items)[None, :]
        if SIDE == 1:
            written = written & ((first_tile + t)[:, None] >= (i // TILE)[None, :])
        if SIDE == -1:
            written = written & ((first_tile + t)[:, None] < (i // TILE)[None, :])
        part = parts + t.to(tl.int64)[:, None] * part_stride + r[None, :]
        peaks = tl.load(part, written, other=-INF)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        base = finite_or_zero(higher)
        sums = tl.load(part + part_items, written, other=0.0) * tl.exp2(peaks - base[None, :])
        total = total * tl.exp2(peak - base) + tl.sum(sums, 0)
        peak = higher
        if SET != NO_SET:
            in_set += tl.sum(tl.load(part + 2 * part_items, written, other=0.0), 0)
            count += tl.sum(tl.load(part + 3 * part_items, written, other=0.0), 0)
    tl.store(at, peak, r < items)
    tl.store(at + state_stride, total, r < items)
    if SET != NO_SET:
        tl.store(at + 3 * state_stride, in_set, r < items)
        tl.store(at + 4 * state_stride, count, r < items)


@triton.jit(do_not_specialize=["row_count", "key_count", "classes"], do_not_specialize_on_alignment=["out"])
def positives(
    rows, keys, negatives,  # embeddings, (N, D), (K, D), and (M, D) or None
    per_query,  # similarities of each query's negatives, (N, M), or None
    row_norms, key_norms, negative_norms,  # inverse norms, or None
    target,  # (N,), or None: the row's number
    out,  # result, (N,)
    row_count, key_count, classes,  # N, K and K + M
    D, row_stride, key_stride, negative_stride,  # features; strides between rows of each
    BI: tl.constexpr, BD: tl.constexpr,  # rows of a program; features that it reads at a time
):  # fmt: skip
    """Write the similarity of each row to its positive, or NaN if the target is out of range, which is not read."""
    C: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BI + tl.arange(0, BI)
    at = i
    if target is not None:
        at = tl.load(target + i, i < row_count, other=-1)
    among_keys = (i < row_count) & (at >= 0) & (at < key_count)
    further = (i < row_count) & (at >= key_count) & (at < classes)
    n = at - key_count
    s = tl.zeros([BI], C)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)[None, :]
        x = tl.load(rows + i[:, None] * row_stride + d, (i[:, None] < row_count) & (d < D), other=0.0).to(C)
        y = tl.load(keys + at[:, None] * key_stride + d, among_keys[:, None] & (d < D), other=0.0).to(C)
        if negatives is not None:
            y += tl.load(negatives + n[:, None] * negative_stride + d, further[:, None] & (d < D), other=0.0).to(C)
        s += tl.sum(x * y, 1)
    if row_norms is not None:
        norm = tl.load(key_norms + at, among_keys, other=1.0)
        if negatives is not None:
            norm *= tl.load(negative_norms + n, further, other=1.0)
        s = s * tl.load(row_norms + i, i < row_count, other=0.0) * norm
    if per_query is not None:
        s += tl.load(per_query + i * (classes - key_count) + n, further, other=0.0)
    tl.store(out + i, tl.where(among_keys | further, s, float("nan")), i < row_count)


@triton.jit
def softmax(peak, total, positive):
    """Return the largest logit in base 2, and relative to it the others' sum and the positive's exponential."""
    top = tl.maximum(peak, positive)
    return top, total * tl.exp2(peak - top), tl.exp2(positive - top)


@triton.jit
def row_loss(state, positive, i, mask, stride, scale, smoothing, SET: tl.constexpr):
    """Return the loss of rows or columns from their statistics."""
    peak, total = tl.load(state + i, mask, other=0.0), tl.load(state + stride + i, mask, other=1.0)
    if SET != NO_SET:
        in_set, count = (
            tl.load(state + 3 * stride + i, mask, other=0.0),
            tl.load(state + 4 * stride + i, mask, other=1.0),
        )
    if SET == LABEL:
        # Rounded as the logits were, so that the loss of a row with one other entry is exactly 0.
        mean = in_set * (scale * LOG2E) / tl.where(count > 0, count, 1.0)
        loss = tl.where(count > 0, tl.log(total) + (peak - mean) * LN2, 0.0)
    else:
        s = tl.load(positive + i, mask, other=0.0)
        logit = s * (scale * LOG2E)
        top, others, positive_term = softmax(peak, total, logit)
        near = others <= positive_term
        ratio = others / tl.where(near, positive_term, 1.0)
        one_more = 1 + ratio  # log(1 + ratio), corrected for the rounding of the sum
        of_ratio = tl.log(one_more) + (ratio - (one_more - 1)) / one_more
        loss = tl.where(near, of_ratio, tl.log(others + positive_term) + (top - logit) * LN2)
        if SET == ALL:
            loss += smoothing * (scale * s - scale * (in_set + s) / (count + 1))
    return loss


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["by_row", "by_column", "positive"])
def losses(
    by_row, by_column,  # states, (statistic, N), of rows, and of columns or None
    positive,  # (N,) similarities to the positives
    scale,  # 0-d
    loss,  # result, (N,)
    rows,
    smoothing: tl.float64,
    SET: tl.constexpr,  # NO_SET, ALL or LABEL
    BI: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Write the loss of each row, with `by_column` the mean of both directions."""
    C: tl.constexpr = loss.dtype.element_ty
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    factor, share = tl.load(scale).to(C), tl.full([], smoothing, C)
    result = row_loss(by_row, positive, i, i < rows, rows, factor, share, SET)
    if by_column is not None:
        result = (result + row_loss(by_column, positive, i, i < rows, rows, factor, share, SET)) * 0.5
    tl.store(loss + i, result, i < rows)


@triton.jit
def per_query_similarities(
    rows, row_norms,  # (N, D), and inverse norms (N,) or None
    negatives,  # (N, M, D)
    out,  # result, (N, M)
    inverse_norms,  # result, (N, M), with row_norms
    count, features,  # M and D
    row_stride,
    by_row, by_negative, by_feature,  # strides of negatives
    BN: tl.constexpr, BD: tl.constexpr,  # negatives of a program; features that it reads at a time
):  # fmt: skip
    """Write the similarities of a row to its negatives, and with norms the inverse norm of each negative."""
    C: tl.constexpr = out.dtype.element_ty
    i, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN).to(tl.int64)
    at = negatives + i * by_row + m[:, None] * by_negative
    s, squares = tl.zeros([BN], C), tl.zeros([BN], C)
    for start in range(0, features, BD):
        d = start + tl.arange(0, BD).to(tl.int64)
        x = tl.load(rows + i * row_stride + d, d < features, other=0.0).to(C)
        y = tl.load(at + d[None, :] * by_feature, (m < count)[:, None] & (d < features)[None, :], other=0.0).to(C)
        s += tl.sum(x[None, :] * y, 1)
        squares += tl.sum(y * y, 1)
    if row_norms is not None:
        norm = tl.sqrt(squares)
        inverse = 1 / tl.where(norm < 1e-12, 1e-12, norm)
        s = s * tl.load(row_norms + i) * inverse
        tl.store(inverse_norms + i * count + m, inverse, m < count)
    tl.store(out + i * count + m, s, m < count)
