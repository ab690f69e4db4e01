"""The kernels of linear cross entropy; `triton.py` launches them and says how they work together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number, tanh_and_slope
from tlkernels._core.triton.linear_kernels import finite, logits_tile

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _scaled(x, inv_temperature, softcap, CAPPED: tl.constexpr):
    """Return the logits after softcap and temperature, and their derivative."""
    if CAPPED:
        t, t_slope = tanh_and_slope(x / softcap)
        z = t * (softcap * inv_temperature)
        slope = t_slope * inv_temperature
    else:
        z = x * inv_temperature
        slope = inv_temperature
    return z, slope


@triton.jit
def _weights(class_weight, c, valid, T: tl.constexpr):
    """Return the classes' weights, or 1 for each."""
    if class_weight is not None:
        w = tl.load(class_weight + c, valid, other=0.0).to(T)
    else:
        w = tl.where(valid, 1.0, 0.0).to(T)
    return w


@triton.jit
def _probabilities(target, target_row, target_class, class_weight, c, r, valid, smoothing, classes, T: tl.constexpr):
    """Return each class's probability after smoothing, times its weight; 0 out of range."""
    at = r.to(tl.int64)[None, None, :] * target_row + c.to(tl.int64) * target_class
    q = (1 - smoothing) * tl.load(target + at, valid, other=0.0).to(T) + smoothing / classes
    return tl.where(valid, q * _weights(class_weight, c, c < classes, T), 0.0)


@triton.jit
def _join(peak, total, q_distance, mass, p_distance):
    """Join statistics along the first axis, each relative to its own peak."""
    top = tl.max(peak, 0)
    shift = finite(top)[None, :] - finite(peak)
    factor = tl.exp(peak - finite(top)[None, :])
    p_distance = tl.sum(factor * (p_distance + total * shift), 0)
    return top, tl.sum(factor * total, 0), tl.sum(q_distance + mass * shift, 0), tl.sum(mass, 0), p_distance


# `rows` is specialised: a tile's rows are contiguous, and the width of loads and stores depends on what divides `rows`.
@triton.jit(do_not_specialize=["tiles"])
def statistics(
    logits,  # (classes, rows), or None: compute them from the layer
    stride,  # of logits between classes
    input,  # (rows, features), or None with logits
    input_row, input_k,  # strides of input
    weight,  # (classes, features), or None with logits
    weight_row, weight_k,  # strides of weight
    bias,  # (classes,), or None
    target,  # (rows,) int64 class indices, or (rows, classes) probabilities
    target_row, target_class,  # strides of target
    class_weight,  # (classes,), or None for 1
    partial,  # result, (statistic, split, row)
    best_class,  # result, (split, row): the class of the largest logit; or None
    rows, classes, features,  # sizes
    tiles,  # of a split
    smoothing: tl.float64, inv_temperature: tl.float64, softcap: tl.float64,  # the loss's options
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTH: tl.constexpr,  # smoothing is used, with class indices
    CAPPED: tl.constexpr,  # softcap is used
    T: tl.constexpr,  # dtype of the arithmetic
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr,  # rows of a tile
    BLOCK_K: tl.constexpr,  # features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Sweep a split of the classes of some rows, and write its statistics.

    Each lane has its own statistics until the end, so that threads exchange nothing before. `q_distance` is the sum of
    q * (peak - z) over the classes, where q is the target's share, and `p_distance` that of exp(z - peak) * (peak - z).
    """
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, r < rows, other=-1)
    peak = tl.full([LANES, BLOCK], float("-inf"), T)
    total = tl.zeros([LANES, BLOCK], T)
    target_logit = tl.zeros([LANES, BLOCK], T)
    q_distance = tl.zeros([LANES, BLOCK], T)
    mass = tl.zeros([LANES, BLOCK], T)
    p_distance = tl.zeros([LANES, BLOCK], T)
    best = tl.full([LANES, BLOCK], float("-inf"), T)
    best_at = tl.full([LANES, BLOCK], _NOWHERE, tl.int32)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        x = logits_tile(
            logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
            features, T, DEEP, LANES, BLOCK_K, PRECISION,
        )  # fmt: skip
        c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
        valid = c < classes
        z, _ = _scaled(x, inv_t, cap, CAPPED)
        z = tl.where(valid, z, float("-inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = finite(top) - finite(peak)
        factor = tl.exp(peak - finite(top))
        gap = finite(top)[None, :, :] - z
        e = tl.exp(-gap)
        if best_class is not None:
            p_distance = factor * (p_distance + total * shift) + tl.sum(tl.where(e > 0, e * gap, 0.0), 0)
            x = tl.where(valid, x, float("-inf"))
            tile_best = tl.max(x, 0)
            at = tl.min(tl.where((x == tile_best[None, :, :]) & valid, c, _NOWHERE), 0)
            best_at = tl.where((tile_best > best) | (best_at == _NOWHERE), at, best_at)
            best = tl.maximum(best, tile_best)
        total = total * factor + tl.sum(e, 0)
        if PROBABILITIES:
            valid = valid & (r < rows)[None, None, :]
            q = _probabilities(target, target_row, target_class, class_weight, c, r, valid, smoothing, classes, T)
        else:
            target_logit += tl.sum(tl.where(c == y[None, None, :], z, 0.0), 0)
            if SMOOTH:
                q = _weights(class_weight, c, valid, T)
        if SPREAD:
            q_distance += mass * shift + tl.sum(tl.where(valid, q * gap, 0.0), 0)
            mass += tl.sum(q + tl.zeros_like(z), 0)
        peak = top
    peak, total, q_distance, mass, p_distance = _join(peak, total, q_distance, mass, p_distance)
    splits = tl.num_programs(1)
    out = partial + split.to(tl.int64) * rows + r
    next_field = tl.cast(splits, tl.int64) * rows
    tl.store(out, peak, r < rows)
    tl.store(out + next_field, total, r < rows)
    if not PROBABILITIES:
        tl.store(out + 2 * next_field, tl.sum(target_logit, 0), r < rows)
    if SPREAD:
        tl.store(out + 3 * next_field, q_distance, r < rows)
        tl.store(out + 4 * next_field, mass, r < rows)
    if best_class is not None:
        tl.store(out + 5 * next_field, p_distance, r < rows)
        value = tl.max(best, 0)
        at = tl.min(tl.where(best == value[None, :], best_at, _NOWHERE), 0)
        tl.store(out + 6 * next_field, value, r < rows)
        tl.store(best_class + split.to(tl.int64) * rows + r, at, r < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def finish(
    partial,  # (statistic, split, row), of `statistics`
    best_class,  # (split, row), of `statistics`; or None
    correct_class,  # (rows,) the target's class, with best_class
    target,  # (rows,) int64 class indices; not read for probabilities
    class_weight,  # (classes,), or None for 1
    loss,  # result, (rows,)
    peak_of, log_sum_of,  # results, (rows,), for `gradient`; or None
    mass_of,  # result, (rows,): the sum of the target's shares, of an index without smoothing's; or None
    spread_of,  # result, (rows,): the sum of the weights, with SMOOTH; or None
    lse_of, entropy, correct,  # results, (rows,), with best_class
    rows, classes, splits,  # sizes
    ignore_index,
    smoothing: tl.float64, z_loss: tl.float64,  # the loss's options
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTH: tl.constexpr,  # smoothing is used, with class indices
    T: tl.constexpr,  # dtype of the arithmetic
    SPLITS: tl.constexpr,  # power of two, at least `splits`
    BLOCK: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Join the splits of some rows, and write their losses. A class index out of range gives NaN."""
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    valid = (s < splits)[:, None] & (r < rows)[None, :]
    at = partial + s.to(tl.int64)[:, None] * rows + r[None, :]
    next_field = tl.cast(splits, tl.int64) * rows
    smoothing = number(smoothing, T)
    peaks = tl.load(at, valid, other=float("-inf"))
    totals = tl.load(at + next_field, valid, other=0.0)
    q_distances = tl.zeros([SPLITS, BLOCK], T)
    masses = tl.zeros([SPLITS, BLOCK], T)
    p_distances = tl.zeros([SPLITS, BLOCK], T)
    if SPREAD:
        q_distances = tl.load(at + 3 * next_field, valid, other=0.0)
        masses = tl.load(at + 4 * next_field, valid, other=0.0)
    if best_class is not None:
        p_distances = tl.load(at + 5 * next_field, valid, other=0.0)
    peak, total, q_distance, mass, p_distance = _join(peaks, totals, q_distances, masses, p_distances)
    peak = finite(peak)
    log_sum = tl.log(tl.where(r < rows, total, 1.0))
    counted = r < rows
    if PROBABILITIES:
        row_loss = q_distance + mass * log_sum
    else:
        y = tl.load(target + r, r < rows, other=-1)
        counted = y != ignore_index
        in_range = (y >= 0) & (y < classes)
        target_logit = tl.sum(tl.load(at + 2 * next_field, valid, other=0.0), 0)
        share = number(1.0, T) - smoothing
        if class_weight is not None:
            share *= tl.load(class_weight + y, in_range, other=0.0).to(T)
        row_loss = share * (peak - target_logit + log_sum)
        if SMOOTH:
            row_loss += smoothing / classes * (q_distance + mass * log_sum)
            if peak_of is not None:
                tl.store(spread_of + r, mass, r < rows)
        mass = share + tl.zeros_like(peak)
        row_loss = tl.where(in_range, row_loss, float("nan"))
    lse = peak + log_sum
    row_loss += number(z_loss, T) * lse * lse
    tl.store(loss + r, tl.where(counted, row_loss, 0.0), r < rows)
    if peak_of is not None:
        tl.store(peak_of + r, peak, r < rows)
        tl.store(log_sum_of + r, log_sum, r < rows)
        tl.store(mass_of + r, mass, r < rows)
    if best_class is not None:
        tl.store(lse_of + r, lse, r < rows)
        tl.store(entropy + r, log_sum + p_distance / total, r < rows)
        best = tl.load(at + 6 * next_field, valid, other=float("-inf"))
        best_classes = tl.load(best_class + s.to(tl.int64)[:, None] * rows + r[None, :], valid, other=_NOWHERE)
        first = tl.min(tl.where(best == tl.max(best, 0)[None, :], best_classes, _NOWHERE), 0)
        tl.store(correct + r, (first == tl.load(correct_class + r, r < rows, other=-1)) & counted, r < rows)


@triton.jit
def gradient(
    logits,  # (classes, rows), or None: compute them from the layer
    stride,  # of logits between classes
    input,  # (rows, features), or None with logits
    input_row, input_k,  # strides of input
    weight,  # (classes, features), or None with logits
    weight_row, weight_k,  # strides of weight
    bias,  # (classes,), or None
    target,  # (rows,) int64 class indices, or (rows, classes) probabilities
    target_row, target_class,  # strides of target
    class_weight,  # (classes,), or None for 1
    peak_of, log_sum_of, mass_of, spread_of,  # (rows,), of `finish`
    grad_loss, grad_loss_row,  # (rows,) upstream of the losses, and its stride, 0 for one number
    grad_lse, grad_lse_row,  # the same of the lse, or None for 0
    gradient,  # result, (end - begin, rows)
    gradient_stride,  # between classes
    rows, classes, features,  # sizes
    begin, end,  # the classes of gradient
    ignore_index,
    smoothing: tl.float64, inv_temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,  # the loss's options
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTH: tl.constexpr,  # smoothing is used, with class indices
    CAPPED: tl.constexpr,  # softcap is used
    T: tl.constexpr,  # dtype of the arithmetic
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr,  # rows of a tile
    BLOCK_K: tl.constexpr,  # features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Write the gradient by a tile of logits. `rest` is the part of the z-loss and of the lse."""
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    x = logits_tile(
        logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
        features, T, DEEP, LANES, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = r < rows
    peak = tl.load(peak_of + r, mask, other=0.0)
    log_sum = tl.load(log_sum_of + r, mask, other=0.0)
    mass = tl.load(mass_of + r, mask, other=0.0)
    g = tl.load(grad_loss + r * grad_loss_row, mask, other=0.0).to(T)
    counted = mask
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, mask, other=-1)
        counted = mask & (y != ignore_index)
        g = tl.where((y >= 0) & (y < classes), g, float("nan"))
    # Expanded before `tl.where`: Triton 3.6 does not compile float64 if rows and tiles share the condition.
    counted, g = counted[None, None, :], g[None, None, :]
    g = tl.where(counted, g, 0.0)  # it is infinite if no row counts
    rest = 2 * number(z_loss, T) * (peak + log_sum)[None, None, :] * g
    kept = counted
    if grad_lse is not None:
        rest = tl.where(counted, rest, 0.0)
        rest += tl.load(grad_lse + r * grad_lse_row, mask, other=0.0).to(T)[None, None, :]
        kept = mask[None, None, :]
    c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
    valid = (c < end) & mask[None, None, :]
    z, slope = _scaled(x, inv_t, cap, CAPPED)
    p = tl.exp(z - peak[None, None, :] - log_sum[None, None, :])
    # Subtracted class by class, so that p and the target cancel exactly where p is 1.
    if PROBABILITIES:
        d = mass[None, None, :] * p - _probabilities(
            target, target_row, target_class, class_weight, c, r, valid, smoothing, classes, T
        )
    else:
        d = mass[None, None, :] * (p - tl.where(c == y[None, None, :], 1.0, 0.0))
        if SMOOTH:
            spread = tl.load(spread_of + r, mask, other=0.0)
            d += smoothing / classes * (spread[None, None, :] * p - _weights(class_weight, c, c < classes, T))
    d = tl.where(counted, g * d, 0.0)
    d = (d + rest * p) * slope
    d = tl.where(kept, d, 0.0)
    at = gradient + (c - begin).to(tl.int64) * gradient_stride + r[None, None, :]
    tl.store(at, d.to(gradient.dtype.element_ty), valid)
