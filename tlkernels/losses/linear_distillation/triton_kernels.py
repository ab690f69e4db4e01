"""The kernels of linear distillation; `triton.py` launches them and has the formulas."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number, tanh_and_slope
from tlkernels._core.triton.linear_kernels import finite, logits_tile
from tlkernels.losses.distillation.call import DIVERGENCES

# JS and TV need both normalisers before the divergence.
FORWARD_KL, REVERSE_KL, JS, TV = (tl.constexpr(k) for k in range(len(DIVERGENCES)))


@triton.jit
def classes_of_tile(first, DEEP: tl.constexpr, LANES: tl.constexpr):
    """Return the classes of a tile, of shape [DEEP, LANES, 1]."""
    return (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):
    """Return the logits after the softcap, and their derivative."""
    slope = number(1.0, x.dtype)
    if CAPPED:
        f, slope = tanh_and_slope(x / softcap)
        x = softcap * f
    return x, slope


@triton.jit
def _rebased(distance, total, factor, shift, other_shift):
    """Return the sum of e * (gap of the other - gap) relative to peaks that are larger by the shifts."""
    return tl.where(factor == 0, 0.0, factor * (distance + total * (other_shift - shift)))


# `rows` is specialised, as in linear cross entropy: the width of loads and stores depends on what divides it.
@triton.jit(do_not_specialize=["tiles"])
def normalise(
    s_logits, s_stride,  # student's logits, (classes, rows), and stride between classes; or None: compute them from the
    s_input, s_row, s_k,  # layer: input, (rows, features), and strides
    s_weight, s_weight_row, s_weight_k,  # weight, (classes, features), and strides
    s_bias,  # bias, (classes,), or None
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,  # the teacher's, as above
    target,  # (rows,) int64 class indices, or None
    partial,  # result, (statistic, split, row)
    rows, classes, s_features, t_features,  # sizes
    tiles,  # of a split
    inv_temperature: tl.float64,
    s_softcap: tl.float64, t_softcap: tl.float64,  # of both sides
    DIVERGENCE: tl.constexpr,  # FORWARD_KL, REVERSE_KL, JS or TV
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,  # whether these are used
    HARD: tl.constexpr,  # hard_weight is not 0
    T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,  # dtype of the arithmetic; of each side's logits
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,  # rows of a tile; features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Sweep a split of the classes of some rows, and write each side's peak, sum of exponentials, and further sums.

    `distance` gives the divergence: the sum of e * (gap of the other - gap), with gap = (peak - x) / temperature, and e
    and gap of the side whose softmax weights the divergence. `s_distance` is the sum of the student's peak - x.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    inv_t, s_cap, t_cap = number(inv_temperature, T), number(s_softcap, T), number(t_softcap, T)
    s_peak = tl.full([LANES, BLOCK], float("-inf"), T)
    t_peak = tl.full([LANES, BLOCK], float("-inf"), T)
    s_total = tl.zeros([LANES, BLOCK], T)
    t_total = tl.zeros([LANES, BLOCK], T)
    distance = tl.zeros([LANES, BLOCK], T)
    hard_total = tl.zeros([LANES, BLOCK], T)
    target_logit = tl.zeros([LANES, BLOCK], T)
    s_distance = tl.zeros([LANES, BLOCK], T)
    class_count = tl.zeros([LANES, BLOCK], T)
    y = r
    if HARD:
        y = tl.load(target + r, r < rows, other=-1)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        s = logits_tile(
            s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows,
            classes, s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        t = logits_tile(
            t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows,
            classes, t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        s, _ = capped(s, s_cap, S_CAPPED)
        t, _ = capped(t, t_cap, T_CAPPED)
        c = classes_of_tile(first, DEEP, LANES)
        valid = c < classes
        s = tl.where(valid, s, float("-inf"))
        t = tl.where(valid, t, float("-inf"))
        s_top = tl.maximum(s_peak, tl.max(s, 0))
        t_top = tl.maximum(t_peak, tl.max(t, 0))
        s_shift = finite(s_top) - finite(s_peak)
        t_shift = finite(t_top) - finite(t_peak)
        s_factor = tl.exp((s_peak - finite(s_top)) * inv_t)
        t_factor = tl.exp((t_peak - finite(t_top)) * inv_t)
        s_gap = finite(s_top)[None, :, :] - s
        t_gap = finite(t_top)[None, :, :] - t
        s_e = tl.exp(-s_gap * inv_t)
        t_e = tl.exp(-t_gap * inv_t)
        if DIVERGENCE == FORWARD_KL:
            distance = _rebased(distance, t_total, t_factor, t_shift * inv_t, s_shift * inv_t)
            distance += tl.sum(tl.where(t_e == 0, 0.0, t_e * ((s_gap - t_gap) * inv_t)), 0)
        if DIVERGENCE == REVERSE_KL:
            distance = _rebased(distance, s_total, s_factor, s_shift * inv_t, t_shift * inv_t)
            distance += tl.sum(tl.where(s_e == 0, 0.0, s_e * ((t_gap - s_gap) * inv_t)), 0)
        s_total = s_total * s_factor + tl.sum(s_e, 0)
        t_total = t_total * t_factor + tl.sum(t_e, 0)
        if HARD:
            hard_total = hard_total * tl.exp(s_peak - finite(s_top)) + tl.sum(tl.exp(-s_gap), 0)
            target_logit += tl.sum(tl.where(c == y[None, None, :], s, 0.0), 0)
            s_distance += class_count * s_shift + tl.sum(tl.where(valid, s_gap, 0.0), 0)
            class_count += tl.sum(tl.where(valid, 1.0, 0.0).to(T), 0)
        s_peak = s_top
        t_peak = t_top
    out = partial + split.to(tl.int64) * rows + r
    field = tl.num_programs(1).to(tl.int64) * rows
    mask = r < rows
    s_peak, t_peak, s_total, t_total, distance, hard_total, s_distance, class_count = _join(
        s_peak, t_peak, s_total, t_total, distance, hard_total, s_distance, class_count, inv_t, DIVERGENCE
    )
    tl.store(out, s_peak, mask)
    tl.store(out + field, t_peak, mask)
    tl.store(out + 2 * field, s_total, mask)
    tl.store(out + 3 * field, t_total, mask)
    tl.store(out + 4 * field, distance, mask)
    if HARD:
        tl.store(out + 5 * field, hard_total, mask)
        tl.store(out + 6 * field, s_distance, mask)
        tl.store(out + 7 * field, class_count, mask)
        tl.store(out + 8 * field, tl.sum(target_logit, 0), mask)


@triton.jit
def _join(
    s_peak, t_peak, s_total, t_total, distance, hard_total, s_distance, class_count, inv_t, DIVERGENCE: tl.constexpr
):
    """Join statistics along the first axis, each relative to its own peaks."""
    s_top = tl.max(s_peak, 0)
    t_top = tl.max(t_peak, 0)
    s_shift = finite(s_top)[None, :] - finite(s_peak)
    t_shift = finite(t_top)[None, :] - finite(t_peak)
    s_factor = tl.exp((s_peak - finite(s_top)[None, :]) * inv_t)
    t_factor = tl.exp((t_peak - finite(t_top)[None, :]) * inv_t)
    if DIVERGENCE == FORWARD_KL:
        distance = _rebased(distance, t_total, t_factor, t_shift * inv_t, s_shift * inv_t)
    if DIVERGENCE == REVERSE_KL:
        distance = _rebased(distance, s_total, s_factor, s_shift * inv_t, t_shift * inv_t)
    hard_total = tl.sum(hard_total * tl.exp(s_peak - finite(s_top)[None, :]), 0)
    s_distance = tl.sum(s_distance + class_count * s_shift, 0)
    s_total = tl.sum(s_total * s_factor, 0)
    t_total = tl.sum(t_total * t_factor, 0)
    return s_top, t_top, s_total, t_total, tl.sum(distance, 0), hard_total, s_distance, tl.sum(class_count, 0)


@triton.jit
def slopes(ratio, ps, pt, beta, DIVERGENCE: tl.constexpr):
    """Return p_k * slope_k of student and teacher for js and tv; `ratio` is log(pt / ps), NaN where both are 0."""
    if DIVERGENCE == JS:
        s_slope = -(1 - beta) * tl.log((1 - beta) + beta * tl.exp(ratio))
        t_slope = -beta * tl.log(beta + (1 - beta) * tl.exp(-ratio))
    else:
        t_slope = tl.where(pt > ps, 0.5, tl.where(pt < ps, -0.5, 0.0))
        s_slope = -t_slope
    return tl.where(ps == 0, 0.0, ps * s_slope), tl.where(pt == 0, 0.0, pt * t_slope)


@triton.jit(do_not_specialize=["kept_rows", "tiles"])
def average(
    s_logits, s_stride,  # student's logits, (classes, rows), and stride between classes; or None: compute them from the
    s_input, s_row, s_k,  # layer: input, (rows, features), and strides
    s_weight, s_weight_row, s_weight_k,  # weight, (classes, features), and strides
    s_bias,  # bias, (classes,), or None
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,  # the teacher's, as above
    kept,  # (result, row), of `finish`
    partial,  # result, (side, split, row)
    rows, classes, s_features, t_features,  # sizes
    kept_rows,  # stride of kept between results
    tiles,  # of a split
    inv_temperature: tl.float64, beta: tl.float64,  # of the divergence
    s_softcap: tl.float64, t_softcap: tl.float64,  # of both sides
    DIVERGENCE: tl.constexpr,  # JS or TV
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,  # whether these are used
    T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,  # dtype of the arithmetic; of each side's logits
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,  # rows of a tile; features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Add up p_k * slope_k over a split of the classes of some rows."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = r < rows
    split = tl.program_id(1)
    inv_t, beta = number(inv_temperature, T), number(beta, T)
    s_cap, t_cap = number(s_softcap, T), number(t_softcap, T)
    s_peak = tl.load(kept + r, mask, other=0.0)
    t_peak = tl.load(kept + kept_rows + r, mask, other=0.0)
    s_log_sum = tl.load(kept + 2 * kept_rows + r, mask, other=0.0)
    t_log_sum = tl.load(kept + 3 * kept_rows + r, mask, other=0.0)
    s_sum = tl.zeros([LANES, BLOCK], T)
    t_sum = tl.zeros([LANES, BLOCK], T)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        s = logits_tile(
            s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows,
            classes, s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        t = logits_tile(
            t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows,
            classes, t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        s, _ = capped(s, s_cap, S_CAPPED)
        t, _ = capped(t, t_cap, T_CAPPED)
        valid = classes_of_tile(first, DEEP, LANES) < classes
        s_gap = s - s_peak[None, None, :]
        t_gap = t - t_peak[None, None, :]
        ps = tl.where(valid, tl.exp(s_gap * inv_t - s_log_sum[None, None, :]), 0.0)
        pt = tl.where(valid, tl.exp(t_gap * inv_t - t_log_sum[None, None, :]), 0.0)
        ratio = (t_gap - s_gap) * inv_t - (t_log_sum - s_log_sum)[None, None, :]
        s_part, t_part = slopes(ratio, ps, pt, beta, DIVERGENCE)
        s_sum += tl.sum(s_part, 0)
        t_sum += tl.sum(t_part, 0)
    out = partial + split.to(tl.int64) * rows + r
    tl.store(out, tl.sum(s_sum, 0), mask)
    tl.store(out + tl.num_programs(1).to(tl.int64) * rows, tl.sum(t_sum, 0), mask)


@triton.jit(do_not_specialize=["rows", "kept_rows", "splits"])
def finish(
    partial,  # of `normalise`, or None: they have been joined before
    averages,  # of `average`, or None
    target,  # (rows,) int64 class indices, or None
    row_weight,  # (rows,), or None for 1
    loss,  # result, (rows,)
    kept,  # result, (result, row): peaks of student and teacher, their log-sums, averages of slopes, hard log-sum
    rows, classes,  # sizes
    kept_rows,  # stride of kept between results
    splits, ignore_index,
    inv_temperature: tl.float64, beta: tl.float64,  # of the divergence
    soft_weight: tl.float64, hard_weight: tl.float64,  # of the divergence and of the cross entropy
    smoothing: tl.float64,  # of the cross entropy's target
    DIVERGENCE: tl.constexpr,  # FORWARD_KL, REVERSE_KL, JS or TV
    HARD: tl.constexpr,  # hard_weight is not 0
    T: tl.constexpr,  # dtype of the arithmetic
    SPLITS: tl.constexpr,  # power of two, at least `splits`
    BLOCK: tl.constexpr,  # rows of a program
):  # fmt: skip
    """Join the splits of some rows; write the loss if the divergence is known. A class index out of range gives NaN."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = r < rows
    split = tl.arange(0, SPLITS)
    valid = (split < splits)[:, None] & mask[None, :]
    at = split.to(tl.int64)[:, None] * rows + r[None, :]
    field = tl.cast(splits, tl.int64) * rows
    hard = tl.zeros([BLOCK], T)
    if partial is not None:
        zeros = tl.zeros([SPLITS, BLOCK], T)
        s_peaks = tl.load(partial + at, valid, other=float("-inf"))
        t_peaks = tl.load(partial + at + field, valid, other=float("-inf"))
        s_totals = tl.load(partial + at + 2 * field, valid, other=0.0)
        t_totals = tl.load(partial + at + 3 * field, valid, other=0.0)
        distances = tl.load(partial + at + 4 * field, valid, other=0.0)
        hard_totals = zeros
        s_distances = zeros
        class_counts = zeros
        if HARD:
            hard_totals = tl.load(partial + at + 5 * field, valid, other=0.0)
            s_distances = tl.load(partial + at + 6 * field, valid, other=0.0)
            class_counts = tl.load(partial + at + 7 * field, valid, other=0.0)
        s_peak, t_peak, s_total, t_total, distance, hard_total, s_distance, _ = _join(
            s_peaks, t_peaks, s_totals, t_totals, distances, hard_totals, s_distances, class_counts,
            number(inv_temperature, T), DIVERGENCE,
        )  # fmt: skip
        s_peak = finite(s_peak)
        s_log_sum = tl.log(tl.where(mask, s_total, 1.0))
        t_log_sum = tl.log(tl.where(mask, t_total, 1.0))
        tl.store(kept + r, s_peak, mask)
        tl.store(kept + kept_rows + r, finite(t_peak), mask)
        tl.store(kept + 2 * kept_rows + r, s_log_sum, mask)
        tl.store(kept + 3 * kept_rows + r, t_log_sum, mask)
        if HARD:
            hard_log_sum = tl.log(tl.where(mask, hard_total, 1.0))
            target_logit = tl.sum(tl.load(partial + at + 8 * field, valid, other=0.0), 0)
            smooth = number(smoothing, T)
            hard = (1 - smooth) * (s_peak - target_logit + hard_log_sum)
            if smoothing != 0:
                hard += smooth * (s_distance / classes + hard_log_sum)
            tl.store(kept + 6 * kept_rows + r, hard_log_sum, mask)
            hard *= number(hard_weight, T)
            if DIVERGENCE >= JS:
                tl.store(loss + r, hard, mask)  # until `average` has run
        if DIVERGENCE == FORWARD_KL:
            divergence = distance / t_total + (s_log_sum - t_log_sum)
        if DIVERGENCE == REVERSE_KL:
            divergence = distance / s_total + (t_log_sum - s_log_sum)
        if DIVERGENCE < JS:
            tl.store(kept + 4 * kept_rows + r, divergence, mask)
            tl.store(kept + 5 * kept_rows + r, divergence, mask)
    if averages is not None:
        s_part = tl.sum(tl.load(averages + at, valid, other=0.0), 0)
        t_part = tl.sum(tl.load(averages + at + field, valid, other=0.0), 0)
        divergence = s_part + t_part
        tl.store(kept + 4 * kept_rows + r, s_part, mask)
        tl.store(kept + 5 * kept_rows + r, t_part, mask)
        if HARD:
            hard = tl.load(loss + r, mask, other=0.0)
    if averages is not None or DIVERGENCE < JS:
        result = number(soft_weight, T) * divergence
        if HARD:
            result += hard
        if row_weight is not None:
            weight = tl.load(row_weight + r, mask, other=0.0).to(T)
            result *= weight
        if target is not None:
            y = tl.load(target + r, mask, other=-1)
            result = tl.where((y >= 0) & (y < classes), result, float("nan"))
            result = tl.where(y == ignore_index, 0.0, result)
        if row_weight is not None:
            result = tl.where(weight == 0, 0.0, result)
        tl.store(loss + r, result, mask)
