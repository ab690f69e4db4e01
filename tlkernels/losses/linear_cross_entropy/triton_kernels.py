"""The kernels of linear cross entropy; `triton.py` launches them and explains them together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number, tanh_and_slope
from tlkernels._core.triton.linear_kernels import finite, logits_tile

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _scaled(x, inv_temperature, softcap, CAPPED: tl.constexpr):
    """Return the logits after softcap and temperature, and their slope."""
    if CAPPED:
        t, bend = tanh_and_slope(x / softcap)
        z = t * (softcap * inv_temperature)
        slope = bend * inv_temperature
    else:
        z = x * inv_temperature
        slope = inv_temperature
    return z, slope


@triton.jit
def _weights(class_weight, c, there, T: tl.constexpr):
    """Return the classes' weights, 1 each where there are none."""
    if class_weight is not None:
        w = tl.load(class_weight + c, there, other=0.0).to(T)
    else:
        w = tl.where(there, 1.0, 0.0).to(T)
    return w


@triton.jit
def _probabilities(target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T: tl.constexpr):
    """Return each class's share of the target distribution, times its weight; 0 where it is not there."""
    at = r.to(tl.int64)[None, None, :] * target_row + c.to(tl.int64) * target_class
    q = (1 - smoothing) * tl.load(target + at, there, other=0.0).to(T) + smoothing / classes
    return tl.where(there, q * _weights(class_weight, c, c < classes, T), 0.0)


@triton.jit
def _join(peak, total, far, mass, heat):
    """Join statistics along the first axis, each from its own peak."""
    top = tl.max(peak, 0)
    shift = finite(top)[None, :] - finite(peak)
    factor = tl.exp(peak - finite(top)[None, :])
    heat = tl.sum(factor * (heat + total * shift), 0)
    return top, tl.sum(factor * total, 0), tl.sum(far + mass * shift, 0), tl.sum(mass, 0), heat


# The rows of a tile lie together: how wide its loads and stores are depends on what divides their number.
@triton.jit(do_not_specialize=["tiles"])
def statistics(
    logits,
    stride,
    input,
    input_row,
    input_k,
    weight,
    weight_row,
    weight_k,
    bias,
    target,  # class indices, or probabilities
    target_row,
    target_class,
    class_weight,
    partial,  # (statistic, split, row)
    best_class,  # (split, row), or None
    rows,
    classes,
    features,
    tiles,  # of a split
    smoothing: tl.float64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    T: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sweep a split of the classes of some rows.

    Statistics are kept for each lane apart, so that nothing crosses threads before the end. `far` is the sum of
    q * (peak - z) over the classes, q being the target's share; `heat` that of exp(z - peak) * (peak - z).
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
    own = tl.zeros([LANES, BLOCK], T)
    far = tl.zeros([LANES, BLOCK], T)
    mass = tl.zeros([LANES, BLOCK], T)
    heat = tl.zeros([LANES, BLOCK], T)
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
        there = c < classes
        z, _ = _scaled(x, inv_t, cap, CAPPED)
        z = tl.where(there, z, float("-inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = finite(top) - finite(peak)
        factor = tl.exp(peak - finite(top))
        gap = finite(top)[None, :, :] - z
        e = tl.exp(-gap)
        if best_class is not None:
            heat = factor * (heat + total * shift) + tl.sum(tl.where(e > 0, e * gap, 0.0), 0)
            x = tl.where(there, x, float("-inf"))
            tile_best = tl.max(x, 0)
            at = tl.min(tl.where((x == tile_best[None, :, :]) & there, c, _NOWHERE), 0)
            best_at = tl.where((tile_best > best) | (best_at == _NOWHERE), at, best_at)
            best = tl.maximum(best, tile_best)
        total = total * factor + tl.sum(e, 0)
        if PROBABILITIES:
            there = there & (r < rows)[None, None, :]
            q = _probabilities(target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T)
        else:
            own += tl.sum(tl.where(c == y[None, None, :], z, 0.0), 0)
            if SMOOTH:
                q = _weights(class_weight, c, there, T)
        if SPREAD:
            far += mass * shift + tl.sum(tl.where(there, q * gap, 0.0), 0)
            mass += tl.sum(q + tl.zeros_like(z), 0)
        peak = top
    peak, total, far, mass, heat = _join(peak, total, far, mass, heat)
    splits = tl.num_programs(1)
    out = partial + split.to(tl.int64) * rows + r
    next_field = tl.cast(splits, tl.int64) * rows
    tl.store(out, peak, r < rows)
    tl.store(out + next_field, total, r < rows)
    if not PROBABILITIES:
        tl.store(out + 2 * next_field, tl.sum(own, 0), r < rows)
    if SPREAD:
        tl.store(out + 3 * next_field, far, r < rows)
        tl.store(out + 4 * next_field, mass, r < rows)
    if best_class is not None:
        tl.store(out + 5 * next_field, heat, r < rows)
        value = tl.max(best, 0)
        at = tl.min(tl.where(best == value[None, :], best_at, _NOWHERE), 0)
        tl.store(out + 6 * next_field, value, r < rows)
        tl.store(best_class + split.to(tl.int64) * rows + r, at, r < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def finish(
    partial,
    best_class,  # or None
    wanted,  # the target's class, or None
    target,
    class_weight,
    loss,  # results by row from here on
    peak_of,
    log_sum_of,
    mass_of,  # the sum of the target's shares, for an index without what smoothing spreads
    spread_of,  # the sum of the weights, with smoothing
    lse_of,
    entropy,
    correct,
    rows,
    classes,
    splits,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    T: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the splits of some rows. A class index out of range gives NaN."""
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    there = (s < splits)[:, None] & (r < rows)[None, :]
    at = partial + s.to(tl.int64)[:, None] * rows + r[None, :]
    next_field = tl.cast(splits, tl.int64) * rows
    smoothing = number(smoothing, T)
    peaks = tl.load(at, there, other=float("-inf"))
    totals = tl.load(at + next_field, there, other=0.0)
    fars = tl.zeros([SPLITS, BLOCK], T)
    masses = tl.zeros([SPLITS, BLOCK], T)
    heats = tl.zeros([SPLITS, BLOCK], T)
    if SPREAD:
        fars = tl.load(at + 3 * next_field, there, other=0.0)
        masses = tl.load(at + 4 * next_field, there, other=0.0)
    if best_class is not None:
        heats = tl.load(at + 5 * next_field, there, other=0.0)
    peak, total, far, mass, heat = _join(peaks, totals, fars, masses, heats)
    peak = finite(peak)
    log_sum = tl.log(tl.where(r < rows, total, 1.0))
    counted = r < rows
    if PROBABILITIES:
        row_loss = far + mass * log_sum
    else:
        y = tl.load(target + r, r < rows, other=-1)
        counted = y != ignore_index
        valid = (y >= 0) & (y < classes)
        own = tl.sum(tl.load(at + 2 * next_field, there, other=0.0), 0)
        share = number(1.0, T) - smoothing
        if class_weight is not None:
            share *= tl.load(class_weight + y, valid, other=0.0).to(T)
        row_loss = share * (peak - own + log_sum)
        if SMOOTH:
            row_loss += smoothing / classes * (far + mass * log_sum)
            if peak_of is not None:
                tl.store(spread_of + r, mass, r < rows)
        mass = share + tl.zeros_like(peak)
        row_loss = tl.where(valid, row_loss, float("nan"))
    lse = peak + log_sum
    row_loss += number(z_loss, T) * lse * lse
    tl.store(loss + r, tl.where(counted, row_loss, 0.0), r < rows)
    if peak_of is not None:
        tl.store(peak_of + r, peak, r < rows)
        tl.store(log_sum_of + r, log_sum, r < rows)
        tl.store(mass_of + r, mass, r < rows)
    if best_class is not None:
        tl.store(lse_of + r, lse, r < rows)
        tl.store(entropy + r, log_sum + heat / total, r < rows)
        best = tl.load(at + 6 * next_field, there, other=float("-inf"))
        classes_of = tl.load(best_class + s.to(tl.int64)[:, None] * rows + r[None, :], there, other=_NOWHERE)
        first = tl.min(tl.where(best == tl.max(best, 0)[None, :], classes_of, _NOWHERE), 0)
        tl.store(correct + r, (first == tl.load(wanted + r, r < rows, other=-1)) & counted, r < rows)


@triton.jit
def gradient(
    logits,
    stride,
    input,
    input_row,
    input_k,
    weight,
    weight_row,
    weight_k,
    bias,
    target,
    target_row,
    target_class,
    class_weight,
    peak_of,
    log_sum_of,
    mass_of,
    spread_of,
    grad_loss,
    grad_loss_row,
    grad_lse,  # or None
    grad_lse_row,
    gradient,  # transposed, from class `begin` on
    gradient_stride,
    rows,
    classes,
    features,
    begin,
    end,
    ignore_index,
    smoothing: tl.float64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    T: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient by a tile of logits; what z-loss and lse add to it stands apart from the target's."""
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    x = logits_tile(
        logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
        features, T, DEEP, LANES, BLOCK_K, PRECISION,
    )  # fmt: skip
    here = r < rows
    peak = tl.load(peak_of + r, here, other=0.0)
    log_sum = tl.load(log_sum_of + r, here, other=0.0)
    mass = tl.load(mass_of + r, here, other=0.0)
    g = tl.load(grad_loss + r * grad_loss_row, here, other=0.0).to(T)
    counted = here
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, here, other=-1)
        counted = here & (y != ignore_index)
        g = tl.where((y >= 0) & (y < classes), g, float("nan"))
    # Expanded once, before `tl.where`: Triton 3.6 does not compile float64 where rows and tiles share the condition.
    counted, g = counted[None, None, :], g[None, None, :]
    g = tl.where(counted, g, 0.0)  # it may be infinite where no row counts
    rest = 2 * number(z_loss, T) * (peak + log_sum)[None, None, :] * g
    lively = counted
    if grad_lse is not None:
        rest = tl.where(counted, rest, 0.0)
        rest += tl.load(grad_lse + r * grad_lse_row, here, other=0.0).to(T)[None, None, :]
        lively = here[None, None, :]
    c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
    there = (c < end) & here[None, None, :]
    z, slope = _scaled(x, inv_t, cap, CAPPED)
    p = tl.exp(z - peak[None, None, :] - log_sum[None, None, :])
    # Parts of the target cancel exactly against their parts of the softmax, where that is 1.
    if PROBABILITIES:
        d = mass[None, None, :] * p - _probabilities(
            target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T
        )
    else:
        d = mass[None, None, :] * (p - tl.where(c == y[None, None, :], 1.0, 0.0))
        if SMOOTH:
            spread = tl.load(spread_of + r, here, other=0.0)
            d += smoothing / classes * (spread[None, None, :] * p - _weights(class_weight, c, c < classes, T))
    d = tl.where(counted, g * d, 0.0)
    d = (d + rest * p) * slope
    d = tl.where(lively, d, 0.0)
    at = gradient + (c - begin).to(tl.int64) * gradient_stride + r[None, None, :]
    tl.store(at, d.to(gradient.dtype.element_ty), there)
