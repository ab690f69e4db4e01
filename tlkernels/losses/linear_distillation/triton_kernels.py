"""The kernels of linear distillation; `triton.py` launches them and explains them together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number
from tlkernels._core.triton.linear_kernels import finite, logits_tile
from tlkernels.losses.distillation.call import DIVERGENCES

# From js on, the loss waits for both normalisers.
FORWARD_KL, REVERSE_KL, JS, TV = (tl.constexpr(k) for k in range(len(DIVERGENCES)))


@triton.jit
def _classes(first, DEEP: tl.constexpr, LANES: tl.constexpr):
    """Return the classes of a tile, in the shape of the tile."""
    return (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]


@triton.jit
def _rebased(distance, total, factor, own_shift, other_shift):
    """Take sum of e * (gap of the other - gap) to peaks that are larger by the shifts."""
    return tl.where(factor == 0, 0.0, factor * (distance + total * (other_shift - own_shift)))


# As in linear cross entropy, loads and stores are as wide as what divides `rows` lets them be.
@triton.jit(do_not_specialize=["tiles"])
def normalise(
    s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias,
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,
    target,  # or None
    partial,  # (statistic, split, row)
    rows, classes, s_features, t_features,
    tiles,  # of a split
    inv_temperature: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,
    DEEP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sweep a split of the classes of some rows: each side's peak and sum of exponentials, lane by lane.

    `distance` is the divergence's, sum of e * (gap of the other - gap) with gap = (peak - x) / temperature of the side
    that is averaged over; `far` the sum of the student's peak - x.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    inv_t = number(inv_temperature, T)
    s_peak = tl.full([LANES, BLOCK], float("-inf"), T)
    t_peak = tl.full([LANES, BLOCK], float("-inf"), T)
    s_total = tl.zeros([LANES, BLOCK], T)
    t_total = tl.zeros([LANES, BLOCK], T)
    distance = tl.zeros([LANES, BLOCK], T)
    hard_total = tl.zeros([LANES, BLOCK], T)
    own = tl.zeros([LANES, BLOCK], T)
    far = tl.zeros([LANES, BLOCK], T)
    seen = tl.zeros([LANES, BLOCK], T)
    y = r
    if HARD:
        y = tl.load(target + r, r < rows, other=-1)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        xs = logits_tile(
            s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows,
            classes, s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        xt = logits_tile(
            t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows,
            classes, t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        c = _classes(first, DEEP, LANES)
        there = c < classes
        xs = tl.where(there, xs, float("-inf"))
        xt = tl.where(there, xt, float("-inf"))
        s_top = tl.maximum(s_peak, tl.max(xs, 0))
        t_top = tl.maximum(t_peak, tl.max(xt, 0))
        s_shift = finite(s_top) - finite(s_peak)
        t_shift = finite(t_top) - finite(t_peak)
        s_factor = tl.exp((s_peak - finite(s_top)) * inv_t)
        t_factor = tl.exp((t_peak - finite(t_top)) * inv_t)
        s_gap = finite(s_top)[None, :, :] - xs
        t_gap = finite(t_top)[None, :, :] - xt
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
            own += tl.sum(tl.where(c == y[None, None, :], xs, 0.0), 0)
            far += seen * s_shift + tl.sum(tl.where(there, s_gap, 0.0), 0)
            seen += tl.sum(tl.where(there, 1.0, 0.0).to(T), 0)
        s_peak = s_top
        t_peak = t_top
    out = partial + split.to(tl.int64) * rows + r
    field = tl.num_programs(1).to(tl.int64) * rows
    here = r < rows
    s_peak, t_peak, s_total, t_total, distance, hard_total, far, seen = _join(
        s_peak, t_peak, s_total, t_total, distance, hard_total, far, seen, inv_t, DIVERGENCE
    )
    tl.store(out, s_peak, here)
    tl.store(out + field, t_peak, here)
    tl.store(out + 2 * field, s_total, here)
    tl.store(out + 3 * field, t_total, here)
    tl.store(out + 4 * field, distance, here)
    if HARD:
        tl.store(out + 5 * field, hard_total, here)
        tl.store(out + 6 * field, far, here)
        tl.store(out + 7 * field, seen, here)
        tl.store(out + 8 * field, tl.sum(own, 0), here)


@triton.jit
def _join(s_peak, t_peak, s_total, t_total, distance, hard_total, far, seen, inv_t, DIVERGENCE: tl.constexpr):
    """Join statistics along the first axis, each from its own peaks."""
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
    far = tl.sum(far + seen * s_shift, 0)
    s_total = tl.sum(s_total * s_factor, 0)
    t_total = tl.sum(t_total * t_factor, 0)
    return s_top, t_top, s_total, t_total, tl.sum(distance, 0), hard_total, far, tl.sum(seen, 0)


@triton.jit
def _slopes(ratio, ps, pt, beta, DIVERGENCE: tl.constexpr):
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
    s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias,
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,
    kept,  # (result, row), of `finish`
    partial,  # (side, split, row)
    rows, classes, s_features, t_features,
    kept_rows,  # of all results
    tiles,  # of a split
    inv_temperature: tl.float64, beta: tl.float64,
    DIVERGENCE: tl.constexpr, T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,
    DEEP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up p_k * slope_k over a split of the classes of some rows."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < rows
    split = tl.program_id(1)
    inv_t, beta = number(inv_temperature, T), number(beta, T)
    s_peak = tl.load(kept + r, here, other=0.0)
    t_peak = tl.load(kept + kept_rows + r, here, other=0.0)
    s_log_sum = tl.load(kept + 2 * kept_rows + r, here, other=0.0)
    t_log_sum = tl.load(kept + 3 * kept_rows + r, here, other=0.0)
    s_sum = tl.zeros([LANES, BLOCK], T)
    t_sum = tl.zeros([LANES, BLOCK], T)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        xs = logits_tile(
            s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows,
            classes, s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        xt = logits_tile(
            t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows,
            classes, t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
        ).to(T)  # fmt: skip
        there = _classes(first, DEEP, LANES) < classes
        s_gap = xs - s_peak[None, None, :]
        t_gap = xt - t_peak[None, None, :]
        ps = tl.where(there, tl.exp(s_gap * inv_t - s_log_sum[None, None, :]), 0.0)
        pt = tl.where(there, tl.exp(t_gap * inv_t - t_log_sum[None, None, :]), 0.0)
        ratio = (t_gap - s_gap) * inv_t - (t_log_sum - s_log_sum)[None, None, :]
        of_s, of_t = _slopes(ratio, ps, pt, beta, DIVERGENCE)
        s_sum += tl.sum(of_s, 0)
        t_sum += tl.sum(of_t, 0)
    out = partial + split.to(tl.int64) * rows + r
    tl.store(out, tl.sum(s_sum, 0), here)
    tl.store(out + tl.num_programs(1).to(tl.int64) * rows, tl.sum(t_sum, 0), here)


@triton.jit(do_not_specialize=["rows", "kept_rows", "splits"])
def finish(
    partial,  # of `normalise`, or None when it has been here already
    averages,  # of `average`, or None
    target, row_weight,  # or None
    loss,
    kept,  # (result, row): peaks of student and teacher, logarithms of their sums, averages of slopes, hard log-sum
    rows, classes, kept_rows, splits, ignore_index,
    inv_temperature: tl.float64, beta: tl.float64, soft_weight: tl.float64, hard_weight: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of some rows; the loss once the divergence is known. A class index out of range gives NaN."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = r < rows
    s = tl.arange(0, SPLITS)
    there = (s < splits)[:, None] & here[None, :]
    at = s.to(tl.int64)[:, None] * rows + r[None, :]
    field = tl.cast(splits, tl.int64) * rows
    hard = tl.zeros([BLOCK], T)
    if partial is not None:
        nothing = tl.zeros([SPLITS, BLOCK], T)
        s_peaks = tl.load(partial + at, there, other=float("-inf"))
        t_peaks = tl.load(partial + at + field, there, other=float("-inf"))
        s_totals = tl.load(partial + at + 2 * field, there, other=0.0)
        t_totals = tl.load(partial + at + 3 * field, there, other=0.0)
        distances = tl.load(partial + at + 4 * field, there, other=0.0)
        hard_totals = nothing
        fars = nothing
        counts = nothing
        if HARD:
            hard_totals = tl.load(partial + at + 5 * field, there, other=0.0)
            fars = tl.load(partial + at + 6 * field, there, other=0.0)
            counts = tl.load(partial + at + 7 * field, there, other=0.0)
        s_peak, t_peak, s_total, t_total, distance, hard_total, far, _ = _join(
            s_peaks, t_peaks, s_totals, t_totals, distances, hard_totals, fars, counts, number(inv_temperature, T),
            DIVERGENCE,
        )  # fmt: skip
        s_peak = finite(s_peak)
        s_log_sum = tl.log(tl.where(here, s_total, 1.0))
        t_log_sum = tl.log(tl.where(here, t_total, 1.0))
        tl.store(kept + r, s_peak, here)
        tl.store(kept + kept_rows + r, finite(t_peak), here)
        tl.store(kept + 2 * kept_rows + r, s_log_sum, here)
        tl.store(kept + 3 * kept_rows + r, t_log_sum, here)
        if HARD:
            hard_log_sum = tl.log(tl.where(here, hard_total, 1.0))
            own = tl.sum(tl.load(partial + at + 8 * field, there, other=0.0), 0)
            smooth = number(smoothing, T)
            hard = (1 - smooth) * (s_peak - own + hard_log_sum)
            if smoothing != 0:
                hard += smooth * (far / classes + hard_log_sum)
            tl.store(kept + 6 * kept_rows + r, hard_log_sum, here)
            hard *= number(hard_weight, T)
            if DIVERGENCE >= JS:
                tl.store(loss + r, hard, here)  # until `average` has been there
        if DIVERGENCE == FORWARD_KL:
            divergence = distance / t_total + (s_log_sum - t_log_sum)
        if DIVERGENCE == REVERSE_KL:
            divergence = distance / s_total + (t_log_sum - s_log_sum)
        if DIVERGENCE < JS:
            tl.store(kept + 4 * kept_rows + r, divergence, here)
            tl.store(kept + 5 * kept_rows + r, divergence, here)
    if averages is not None:
        of_s = tl.sum(tl.load(averages + at, there, other=0.0), 0)
        of_t = tl.sum(tl.load(averages + at + field, there, other=0.0), 0)
        divergence = of_s + of_t
        tl.store(kept + 4 * kept_rows + r, of_s, here)
        tl.store(kept + 5 * kept_rows + r, of_t, here)
        if HARD:
            hard = tl.load(loss + r, here, other=0.0)
    if averages is not None or DIVERGENCE < JS:
        result = number(soft_weight, T) * divergence
        if HARD:
            result += hard
        if row_weight is not None:
            result *= tl.load(row_weight + r, here, other=0.0).to(T)
        if target is not None:
            y = tl.load(target + r, here, other=-1)
            result = tl.where((y >= 0) & (y < classes), result, float("nan"))
            result = tl.where(y == ignore_index, 0.0, result)
        tl.store(loss + r, result, here)


@triton.jit(do_not_specialize=["kept_rows"])
def gradient(
    s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias,
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,
    target, row_weight, kept, upstream, upstream_row,
    s_gradient, s_gradient_stride,  # transposed, from class `begin` on; or None
    t_gradient, t_gradient_stride,
    rows, classes, s_features, t_features, begin, end, kept_rows, ignore_index,
    inv_temperature: tl.float64, beta: tl.float64, soft_weight: tl.float64, hard_weight: tl.float64,
    smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,
    DEEP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients by a tile of logits of the sides that need one."""
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    here = r < rows
    xs = logits_tile(
        s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows, classes,
        s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
    ).to(T)  # fmt: skip
    xt = logits_tile(
        t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows, classes,
        t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
    ).to(T)  # fmt: skip
    inv_t = number(inv_temperature, T)
    s_gap = xs - tl.load(kept + r, here, other=0.0)[None, None, :]
    t_gap = xt - tl.load(kept + kept_rows + r, here, other=0.0)[None, None, :]
    s_log_sum = tl.load(kept + 2 * kept_rows + r, here, other=0.0)
    t_log_sum = tl.load(kept + 3 * kept_rows + r, here, other=0.0)
    s_average = tl.load(kept + 4 * kept_rows + r, here, other=0.0)
    t_average = tl.load(kept + 5 * kept_rows + r, here, other=0.0)
    g = tl.load(upstream + r * upstream_row, here, other=0.0).to(T)
    if row_weight is not None:
        g *= tl.load(row_weight + r, here, other=0.0).to(T)
    counted = here
    y = r
    if target is not None:
        y = tl.load(target + r, here, other=-1)
        counted = here & (y != ignore_index)
        g = tl.where((y >= 0) & (y < classes), g, float("nan"))
    g = tl.where(counted, g, 0.0)[None, None, :]  # it may be infinite where no row counts
    ps = tl.exp(s_gap * inv_t - s_log_sum[None, None, :])
    pt = tl.exp(t_gap * inv_t - t_log_sum[None, None, :])
    # Of the row first: a difference of large numbers feels each rounding.
    apart = (t_gap - s_gap) * inv_t
    shift = t_log_sum - s_log_sum
    if DIVERGENCE == FORWARD_KL:
        ds = ps - pt
        dt = tl.where(pt == 0, 0.0, pt * (apart - (shift + t_average)[None, None, :]))
    elif DIVERGENCE == REVERSE_KL:
        ds = tl.where(ps == 0, 0.0, ps * ((shift - s_average)[None, None, :] - apart))
        dt = pt - ps
    else:
        of_s, of_t = _slopes(apart - shift[None, None, :], ps, pt, number(beta, T), DIVERGENCE)
        ds = of_s - ps * s_average[None, None, :]
        dt = of_t - pt * t_average[None, None, :]
    soft = number(soft_weight, T) * inv_t * g
    c = _classes(first, DEEP, LANES)
    there = (c < end) & here[None, None, :]
    within = (c - begin).to(tl.int64)
    if s_gradient is not None:
        d = soft * ds
        if HARD:
            p = tl.exp(s_gap - tl.load(kept + 6 * kept_rows + r, here, other=0.0)[None, None, :])
            smooth = number(smoothing, T)
            hit = tl.where(c == y[None, None, :], 1.0, 0.0)
            # A part of the target cancels exactly against its part of the softmax, where that is 1.
            d += number(hard_weight, T) * g * ((1 - smooth) * (p - hit) + smooth * (p - number(1.0, T) / classes))
        d = tl.where(counted[None, None, :], d, 0.0)
        at = s_gradient + within * s_gradient_stride + r[None, None, :]
        tl.store(at, d.to(s_gradient.dtype.element_ty), there)
    if t_gradient is not None:
        d = tl.where(counted[None, None, :], soft * dt, 0.0)
        at = t_gradient + within * t_gradient_stride + r[None, None, :]
        tl.store(at, d.to(t_gradient.dtype.element_ty), there)
