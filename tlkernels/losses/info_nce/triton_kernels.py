"""The kernels of InfoNCE; `triton.py` launches them and explains them together."""

import math

import triton
import triton.language as tl

from tlkernels._core.triton.similarity import similarity_tile

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
INF = tl.constexpr(math.inf)
# Entries whose similarities are summed: for label smoothing all but the positive; for sup_con those of the label.
NO_SET, ALL, LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def positive_column(target, i, classes):
    """Return the column of each row's positive, -1 where the target is none; without targets the row's own number."""
    column = i
    if target is not None:
        at = tl.load(target + i)
        column = tl.where((at >= 0) & (at < classes), at, -1).to(tl.int32)
    return column


@triton.jit
def taking_part(
    counts, i, j, mask, row_ids, column_ids, own, mask_row, mask_column, SET: tl.constexpr, OWN: tl.constexpr
):
    """Return which of the entries that count are not taken out, and which of those are in the set; i and j exist."""
    if OWN:
        counts = counts & ((i + own)[:, None] != j[None, :])
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
    """Return what to subtract from logits of which none is above `peak`."""
    return tl.where(peak == -INF, 0.0, peak)


# Not specialised is what another size of the batch changes: numbers of rows and columns, and where their statistics lie
# in a tensor of several.
@triton.jit(do_not_specialize=[
    "row_end", "column_count", "first_column", "classes", "own", "known_stride", "mask_row", "row_part", "row_items",
    "column_part", "column_items", "skipped", "row_tiles", "tile_offset",
])  # fmt: skip
def statistics(
    rows, columns, known, row_norms, column_norms, scale, target, mask, row_ids, column_ids, by_row, by_column,
    first_row, row_end, column_count, first_column, classes, own, D, row_stride, column_stride, known_stride,
    mask_row, mask_column, row_part, row_items, column_part, column_items, skipped, row_tiles, tile_offset,
    SET: tl.constexpr, OWN: tl.constexpr, PAIRED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of one tile: peak and sum of exponentials, sum and number of the set, of its rows and where wanted its columns.

    With PAIRED, tiles below the diagonal are left out, and those beyond it give their columns as rows.
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
        counts, row, column, mask, row_ids, column_ids, own, mask_row, mask_column, SET, OWN
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
    parts, state, first, items, tiles, first_tile, part_stride, part_items, state_stride,
    SET: tl.constexpr, FRESH: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Join the parts of `tiles` tiles into the state of items `first` ..., tile after tile in their order.

    With FRESH there is nothing in the state yet. SIDE is 0, or 1 where only tiles from the item's own on were written,
    or -1 where only those before it.
    """
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
    rows, keys, negatives, own_negatives, row_norms, key_norms, negative_norms, target, out, row_count, key_count,
    classes, D, row_stride, key_stride, negative_stride, BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the similarity of each row to its positive, NaN where that is no column; such a column is not read."""
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
    if own_negatives is not None:
        s += tl.load(own_negatives + i * (classes - key_count) + n, further, other=0.0)
    tl.store(out + i, tl.where(among_keys | further, s, float("nan")), i < row_count)


@triton.jit
def softmax(peak, total, positive):
    """Return top, and relative to it the sum of the others and the positive's exponential, of a logit in base 2."""
    top = tl.maximum(peak, positive)
    return top, total * tl.exp2(peak - top), tl.exp2(positive - top)


@triton.jit
def row_loss(state, positive, i, here, stride, scale, smoothing, SET: tl.constexpr):
    """Return the loss of rows or columns by their statistics."""
    peak, total = tl.load(state + i, here, other=0.0), tl.load(state + stride + i, here, other=1.0)
    if SET != NO_SET:
        in_set, count = (
            tl.load(state + 3 * stride + i, here, other=0.0),
            tl.load(state + 4 * stride + i, here, other=1.0),
        )
    if SET == LABEL:
        # Rounded as the logits were, so that of a row's only other entry nothing is left.
        mean = in_set * (scale * LOG2E) / tl.where(count > 0, count, 1.0)
        loss = tl.where(count > 0, tl.log(total) + (peak - mean) * LN2, 0.0)
    else:
        s = tl.load(positive + i, here, other=0.0)
        logit = s * (scale * LOG2E)
        top, others, own = softmax(peak, total, logit)
        near = others <= own
        ratio = others / tl.where(near, own, 1.0)
        one_more = 1 + ratio  # log(1 + ratio), with what rounding took from the sum
        of_ratio = tl.log(one_more) + (ratio - (one_more - 1)) / one_more
        loss = tl.where(near, of_ratio, tl.log(others + own) + (top - logit) * LN2)
        if SET == ALL:
            loss += smoothing * (scale * s - scale * (in_set + s) / (count + 1))
    return loss


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["by_row", "by_column", "positive"])
def losses(by_row, by_column, positive, scale, loss, rows, smoothing: tl.float64, SET: tl.constexpr, BI: tl.constexpr):
    """Write the loss of each row, with `by_column` the mean of both directions."""
    C: tl.constexpr = loss.dtype.element_ty
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    factor, share = tl.load(scale).to(C), tl.full([], smoothing, C)
    result = row_loss(by_row, positive, i, i < rows, rows, factor, share, SET)
    if by_column is not None:
        result = (result + row_loss(by_column, positive, i, i < rows, rows, factor, share, SET)) * 0.5
    tl.store(loss + i, result, i < rows)


@triton.jit(do_not_specialize=["rows", "classes"], do_not_specialize_on_alignment=["state", "positive"])
def slopes(
    state, positive, target, scale, upstream, extra, out, rows, classes, upstream_stride, smoothing: tl.float64,
    part: tl.float64, SET: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Write what the gradient by the logits is made of: factor * exp2(logit - top), less `share` in the set, and at the
    positive the number that is last; for an upstream gradient times `part`, and times `extra` if given.

    A row without a positive has zeros, and a top above all logits.
    """
    C: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    here = i < rows
    g = tl.load(upstream + i.to(tl.int64) * upstream_stride, here, other=0.0).to(C) * tl.full([], part, C)
    if extra is not None:
        g *= tl.load(extra).to(C)
    peak, total = tl.load(state + i, here, other=0.0), tl.load(state + rows + i, here, other=1.0)
    share, count = tl.zeros([BI], C), tl.zeros([BI], C)
    if SET != NO_SET:
        count = tl.load(state + 4 * rows + i, here, other=1.0)
    if SET == LABEL:
        valid = count > 0
        top, factor, own = peak, g / total, tl.zeros([BI], C)
        share = g / tl.where(valid, count, 1.0)
    else:
        valid = here
        if target is not None:
            at = tl.load(target + i, here, other=0)
            valid = (at >= 0) & (at < classes)
        top, others, e = softmax(peak, total, tl.load(positive + i, here, other=0.0) * (tl.load(scale).to(C) * LOG2E))
        factor, own = g / (others + e), -g * (others / (others + e))
        if SET == ALL:
            smooth = tl.full([], smoothing, C)
            share = g * (smooth / (count + 1))
            own += g * smooth - share
    tl.store(out + i, tl.where(valid, top, 1e30), here)
    tl.store(out + rows + i, tl.where(valid, factor, 0.0), here)
    tl.store(out + 2 * rows + i, tl.where(valid, share, 0.0), here)
    tl.store(out + 3 * rows + i, tl.where(valid, own, 0.0), here)


# But what divides `column_count`: how wide the stores to the panel are depends on it.
@triton.jit(do_not_specialize=[
    "row_end", "first_column", "classes", "own", "known_stride", "mask_row", "slopes_stride", "row_tiles",
], do_not_specialize_on_alignment=["by_scale"])  # fmt: skip
def gradient(
    rows, columns, known, row_norms, column_norms, scale, target, mask, row_ids, column_ids, row_slopes, column_slopes,
    panel, by_scale, first_row, row_end, column_count, first_column, classes, own, D, row_stride, column_stride,
    known_stride, mask_row, mask_column, slopes_stride, panel_stride, row_tiles,
    SET: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradient by the products of rows as they are, over `scale`, and its sum with similarities.

    Positives are written as if they were others, and then over by `gradient_at_positives`: to tell them apart here, in
    every tile, would take registers that a second program on the multiprocessor needs.
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
    of_row, of_column = row_slopes + row, column_slopes
    g = tl.load(of_row + slopes_stride)[:, None] * tl.exp2(x - tl.load(of_row)[:, None])
    if column_slopes is not None:
        of_column = column_slopes + column
        g += tl.load(of_column + slopes_stride)[None, :] * tl.exp2(x - tl.load(of_column)[None, :])
    if OWN or mask is not None or row_ids is not None or SET != NO_SET:
        counts, in_set = taking_part(
            (row >= 0)[:, None] & (column >= 0)[None, :], row, column, mask, row_ids, column_ids, own,
            mask_row, mask_column, SET, OWN,
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
    row_slopes, column_slopes, similarity, target, row_norms, column_norms, panel, by_scale, begin, end, first, columns,
    rows, panel_stride, BI: tl.constexpr,
):  # fmt: skip
    """Write what `gradient` leaves out where the positives are among columns `first` ... of the matrix."""
    i = begin + tl.program_id(0) * BI + tl.arange(0, BI)
    at = i.to(tl.int64)
    if target is not None:
        at = tl.load(target + i, i < end, other=-1)
    j = at - first
    here = (i < end) & (j >= 0) & (j < columns)
    g = tl.load(row_slopes + 3 * rows + i, here, other=0.0)
    if column_slopes is not None:
        g += tl.load(column_slopes + 3 * rows + j, here, other=0.0)
    if by_scale is not None:
        tl.store(by_scale + i, g * tl.load(similarity + i, here, other=0.0), here)
    if row_norms is not None:
        g = g * tl.load(row_norms + i, here, other=0.0) * tl.load(column_norms + j, here, other=0.0)
    tl.store(panel + (i - begin).to(tl.int64) * panel_stride + j, g.to(panel.dtype.element_ty), here)


@triton.jit
def own_similarities(
    rows, row_norms, negatives, out, inverse_norms, count, features, row_stride, by_row, by_negative, by_feature,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the similarities of a row to its own negatives, and with norms the inverse norm of each negative."""
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


@triton.jit
def own_gradients(
    rows, row_norms, negatives, similarities, inverse_norms, panel, scale, extra, total, grad, first, count, features,
    row_stride, by_row, by_negative, by_feature, panel_stride, total_stride, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add a row's own negatives to `total`, the gradient by the row over `scale`, and write the gradient by them."""
    C: tl.constexpr = panel.dtype.element_ty
    r, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD).to(tl.int64)
    i = first + r
    x = tl.load(rows + i * row_stride + d, d < features, other=0.0).to(C)
    factor = tl.load(scale).to(C)
    if extra is not None:
        factor = factor / tl.load(extra).to(C)
    by_x = tl.zeros([BD], C)
    for start in range(0, count, BN):
        m = start + tl.arange(0, BN).to(tl.int64)
        here = (m < count)[:, None] & (d < features)[None, :]
        y = tl.load(negatives + i * by_row + m[:, None] * by_negative + d[None, :] * by_feature, here, other=0.0).to(C)
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
            tl.store(at, (by_y * factor).to(grad.dtype.element_ty), here)
    if total is not None:
        at = total + r * total_stride + d
        tl.store(at, tl.load(at, d < features, other=0.0) + by_x, d < features)
