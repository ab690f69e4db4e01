"""The kernels of linear cross entropy; `triton.py` launches them and says how they work together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number, tanh_and_slope
from tlkernels._core.triton.linear_kernels import finite, logits_tile

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _bounded(x, inv_temperature, softcap, CAPPED: tl.constexpr):
    """Return f, the logits or with a softcap tanh(logit / softcap), and the derivative of z = f * to_z by the logits.

    z are the logits after softcap and temperature. Peaks are kept as f, since z is rounded again.
    """
    if CAPPED:
        f, slope = tanh_and_slope(x / softcap)
        slope = slope * inv_temperature
    else:
        f = x
        slope = inv_temperature
    return f, slope


@triton.jit
def _weights(class_weight, c, valid, T: tl.constexpr):
    """Return the classes' weights, or 1 for each."""
    if class_weight is not None:
        w = tl.load(class_weight + c, valid, other=0.0).to(T)
    else:
        w = tl.where(valid, 1.0, 0.0).to(T)
    return w


@triton.jit
def _target_share(class_weight, y, in_range, smoothing, T: tl.constexpr):
    """Return the factor of the target's term, for class indices; 0 out of range."""
    share = tl.where(in_range, number(1.0, T) - smoothing, 0.0)
    if class_weight is not None:
        share *= tl.load(class_weight + y, in_range, other=0.0).to(T)
    return share


@triton.jit
def _probabilities(
    target, target_row, target_class, class_weight, c, r, valid, smoothing, spread, classes, T: tl.constexpr
):
    """Return each class's probability after smoothing, times its weight; 0 out of range."""
    at = r.to(tl.int64)[None, None, :] * target_row + c.to(tl.int64) * target_class
    q = (1 - smoothing) * tl.load(target + at, valid, other=0.0).to(T) + spread
    return tl.where(valid, q * _weights(class_weight, c, c < classes, T), 0.0)


@triton.jit
def _join(peak, total, q_distance, mass, p_distance, to_z):
    """Join statistics along the first axis, each relative to its own peak."""
    top = tl.max(peak, 0)
    shift = (finite(top)[None, :] - finite(peak)) * to_z
    factor = tl.exp((peak - finite(top)[None, :]) * to_z)
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
    count,  # how many rows count, (1,), if they come first: tiles after them compute no product; or None
    partial,  # result, (statistic, split, row)
    best_class,  # result, (split, row): the class of the largest logit; or None
    rows, classes, features,  # sizes
    tiles,  # of a split
    smoothing: tl.float64, inv_temperature: tl.float64, softcap: tl.float64,  # the loss's options
    spread: tl.float64,  # smoothing / number of classes of the whole vocabulary
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
    q * (peak - z) over the classes, where q is the target's share, and `p_distance` that of exp(z - peak) * (peak - z),
    with the peak of z. `peak` and `target_logit` are f of `_bounded`.
    """
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    to_z, spread = inv_t * cap, number(spread, T)
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
    last = tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))
    if count is not None:
        last = tl.where(tl.program_id(0) * BLOCK < tl.load(count), last, 0)
    for tile in range(split * tiles, last):
        first = tile * size
        x = logits_tile(
            logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
            features, T, DEEP, LANES, BLOCK_K, PRECISION,
        )  # fmt: skip
        c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
        valid = c < classes
        f, _ = _bounded(x, inv_t, cap, CAPPED)
        f = tl.where(valid, f, float("-inf"))
        top = tl.maximum(peak, tl.max(f, 0))
        shift = (finite(top) - finite(peak)) * to_z
        factor = tl.exp((peak - finite(top)) * to_z)
        gap = (finite(top)[None, :, :] - f) * to_z
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
            q = _probabilities(
                target, target_row, target_class, class_weight, c, r, valid, smoothing, spread, classes, T
            )
        else:
            target_logit += tl.sum(tl.where(c == y[None, None, :], f, 0.0), 0)
            if SMOOTH:
                q = _weights(class_weight, c, valid, T)
        if SPREAD:
            q_distance += mass * shift + tl.sum(tl.where(valid, q * gap, 0.0), 0)
            mass += tl.sum(q + tl.zeros_like(f), 0)
        peak = top
    peak, total, q_distance, mass, p_distance = _join(peak, total, q_distance, mass, p_distance, to_z)
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
    row_weight,  # (rows,), or None for 1
    loss,  # result, (rows,)
    peak_of, log_sum_of,  # results, (rows,)
    mass_of,  # result, (rows,): the sum of the target's probabilities as the loss has them; or None
    entropy, correct,  # results, (rows,), with best_class
    rows, classes, splits,  # sizes
    ignore_index,
    smoothing: tl.float64, inv_temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,  # the loss's options
    spread: tl.float64,  # smoothing / number of classes of the whole vocabulary
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTH: tl.constexpr,  # smoothing is used, with class indices
    ELSEWHERE: tl.constexpr,  # class index -1: the target is in another part of the vocabulary
    T: tl.constexpr,  # dtype of the arithmetic
    SPLITS: tl.constexpr,  # power of two, at least `splits`
    BLOCK: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Join the splits of some rows, and write their losses. A class index out of range gives NaN.

    Rows that are ignored or of weight 0 have results of 0.
    """
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    counted = r < rows
    if row_weight is not None:
        factor = tl.load(row_weight + r, r < rows, other=0.0).to(T)
        counted = factor != 0
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, r < rows, other=-1)
        counted = counted & (y != ignore_index)
    valid = (s < splits)[:, None] & (r < rows)[None, :]
    at = partial + s.to(tl.int64)[:, None] * rows + r[None, :]
    next_field = tl.cast(splits, tl.int64) * rows
    smoothing, spread = number(smoothing, T), number(spread, T)
    to_z = number(inv_temperature, T) * number(softcap, T)
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
    peak, total, q_distance, mass, p_distance = _join(peaks, totals, q_distances, masses, p_distances, to_z)
    peak = tl.where(counted, finite(peak), 0.0)
    total = tl.where(counted, total, 1.0)
    log_sum = tl.log(total)
    if PROBABILITIES:
        row_loss = q_distance + mass * log_sum
        if mass_of is not None:
            tl.store(mass_of + r, mass, r < rows)
    else:
        in_range = (y >= 0) & (y < classes)
        target_logit = tl.sum(tl.load(at + 2 * next_field, valid, other=0.0), 0)
        share = _target_share(class_weight, y, in_range, smoothing, T)
        row_loss = tl.where(in_range, share * ((peak - target_logit) * to_z + log_sum), 0.0)
        if SMOOTH:
            row_loss += spread * (q_distance + mass * log_sum)
        if ELSEWHERE:
            in_range = in_range | (y == -1)
        row_loss = tl.where(in_range, row_loss, float("nan"))
    lse = peak * to_z + log_sum
    row_loss += number(z_loss, T) * lse * lse
    if row_weight is not None:
        row_loss *= factor
    tl.store(loss + r, tl.where(counted, row_loss, 0.0), r < rows)
    tl.store(peak_of + r, peak, r < rows)
    tl.store(log_sum_of + r, log_sum, r < rows)
    if best_class is not None:
        tl.store(entropy + r, tl.where(counted, log_sum + p_distance / total, 0.0), r < rows)
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
    class_weight_sum,  # (1,), with SMOOTH; or None for the number of classes
    row_weight,  # (rows,), or None for 1
    peak_of, log_sum_of,  # (rows,), of `finish`
    mass_of,  # (rows,): the sum of the target's probabilities as the loss has them; None for class indices
    entropy,  # (rows,), with grad_entropy
    grad_loss, grad_loss_row,  # (rows,) upstream of the losses, and its stride, 0 for one number
    grad_lse, grad_lse_row,  # the same of the lse, or None for 0
    grad_entropy, grad_entropy_row,  # the same of the entropy, or None for 0
    count,  # how many rows count, (1,), if they come first: tiles after them compute no product; or None
    gradient,  # result, (end - begin, rows)
    gradient_stride,  # between classes
    rows, classes, features,  # sizes
    begin, end,  # the classes of gradient
    ignore_index,
    smoothing: tl.float64, inv_temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,  # the loss's options
    spread: tl.float64,  # smoothing / number of classes of the whole vocabulary
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTH: tl.constexpr,  # smoothing is used, with class indices
    ELSEWHERE: tl.constexpr,  # class index -1: the target is in another part of the vocabulary
    CAPPED: tl.constexpr,  # softcap is used
    T: tl.constexpr,  # dtype of the arithmetic
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr,  # rows of a tile
    BLOCK_K: tl.constexpr,  # features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Write the gradient by a tile of logits. `rest` is the part of the z-loss, the lse and the entropy.

    It is 0 in rows that are ignored or of weight 0.
    """
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    to_z, spread = inv_t * cap, number(spread, T)
    if count is not None:
        features = tl.where(program % blocks * BLOCK < tl.load(count), features, 0)
    x = logits_tile(
        logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
        features, T, DEEP, LANES, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = r < rows
    peak = tl.load(peak_of + r, mask, other=0.0)
    log_sum = tl.load(log_sum_of + r, mask, other=0.0)
    g = tl.load(grad_loss + r * grad_loss_row, mask, other=0.0).to(T)
    counted = mask
    if row_weight is not None:
        factor = tl.load(row_weight + r, mask, other=0.0).to(T)
        counted = factor != 0
        g *= factor
    y = r
    if PROBABILITIES:
        mass = tl.load(mass_of + r, mask, other=0.0)
    else:
        y = tl.load(target + r, mask, other=-1)
        counted = counted & (y != ignore_index)
        in_range = (y >= 0) & (y < classes)
        mass = _target_share(class_weight, y, in_range, smoothing, T)
        if ELSEWHERE:
            in_range = in_range | (y == -1)
        g = tl.where(in_range, g, float("nan"))
    # Expanded before `tl.where`: Triton 3.6 does not compile float64 if rows and tiles share the condition.
    counted, g = counted[None, None, :], g[None, None, :]
    g = tl.where(counted, g, 0.0)  # it is infinite if no row counts
    rest = 2 * number(z_loss, T) * (peak * to_z + log_sum)[None, None, :] * g
    if grad_lse is not None:
        rest += tl.load(grad_lse + r * grad_lse_row, mask, other=0.0).to(T)[None, None, :]
    c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
    valid = (c < end) & mask[None, None, :]
    f, slope = _bounded(x, inv_t, cap, CAPPED)
    distance = (f - peak[None, None, :]) * to_z
    p = tl.exp(distance - log_sum[None, None, :])
    if grad_entropy is not None:
        h = tl.load(grad_entropy + r * grad_entropy_row, mask, other=0.0).to(T)
        mean = log_sum - tl.load(entropy + r, mask, other=0.0)
        by_entropy = h[None, None, :] * (distance - mean[None, None, :])
        rest = tl.where(p > 0, rest - by_entropy, 0.0)
    # Subtracted class by class, so that p and the target cancel exactly where p is 1.
    if PROBABILITIES:
        d = mass[None, None, :] * p - _probabilities(
            target, target_row, target_class, class_weight, c, r, valid, smoothing, spread, classes, T
        )
    else:
        d = mass[None, None, :] * (p - tl.where(c == y[None, None, :], 1.0, 0.0))
        if SMOOTH:
            total = number(classes, T)
            if class_weight_sum is not None:
                total = tl.load(class_weight_sum).to(T)
            d += spread * (total * p - _weights(class_weight, c, c < classes, T))
    d = tl.where(counted, (g * d + rest * p) * slope, 0.0)
    at = gradient + (c - begin).to(tl.int64) * gradient_stride + r[None, None, :]
    tl.store(at, d.to(gradient.dtype.element_ty), valid)
