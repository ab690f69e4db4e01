"""The kernels of cross entropy; `triton.py` launches them and says how they work together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import tanh_and_slope


@triton.jit
def bounded(x, softcap, SOFTCAP: tl.constexpr):
    """Return the logits, or tanh(x / softcap), and its derivative by x but for the constant factor 1 / softcap."""
    if SOFTCAP:
        return tanh_and_slope(x / softcap)
    else:
        return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def peak_and_sum(at, step, read, classes, C, softcap, k, SOFTCAP: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """Return each position's largest bounded logit and the sum of exponentials relative to it, of rows of any length.

    `at` points to the tile of the first classes, and classes are `step` elements apart. Each lane has its own peak and
    sum until the end.
    """
    peaks = tl.full(at.shape, float("-inf"), T)
    sums = tl.zeros(at.shape, T)
    for start in range(0, C, BC):
        valid = read[:, None] & (start + classes < C)[None, :]
        x = tl.load(at + tl.cast(start, tl.int64) * step, valid, other=float("-inf"), eviction_policy="evict_last").to(
            T
        )
        u = x
        if SOFTCAP:
            u, _ = tanh_and_slope(x / softcap)
            u = tl.where(valid, u, float("-inf"))
        e = tl.where(u == peaks, 1.0, tl.exp(-tl.abs(u - peaks) * k))  # 1 where both are -inf: a 0 below multiplies it
        sums = tl.where(u > peaks, sums * e + 1, sums + e)
        peaks = tl.maximum(peaks, u)
    peak = tl.max(peaks, 1)
    return peak, tl.sum(sums * tl.exp((peaks - peak[:, None]) * k), 1)


@triton.jit
def spread_target(
    target, weight, at, valid, classes, C, smoothing, spread,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return q without the class index's share, 0 where not valid; `at` are the offsets of a tile of probabilities."""
    q = tl.zeros(valid.shape, T)
    if PROBABILITIES:
        q += tl.load(target + at, valid, other=0.0).to(T)
    if SMOOTHING:
        q = q * (1 - smoothing) + spread
    if PROBABILITIES or SMOOTHING:
        if weight is not None:
            q *= tl.load(weight + classes, classes < C, other=0.0).to(T)[None, :]
        q = tl.where(valid, q, 0.0)
    return q


@triton.jit
def is_larger(x, best):
    """Whether x comes before `best` in torch.argmax, for which NaN is the largest."""
    return (x > best) | ((x != x) & (best == best))


@triton.jit
def first_largest(best, classes, C):
    """Return each row's class that torch.argmax returns."""
    first_nan = tl.min(tl.where(best != best, classes, C), 1)
    first = tl.min(tl.where(best == tl.max(best, 1)[:, None], classes, C), 1)
    return tl.where(first_nan < C, first_nan, first)


@triton.jit
def target_of(
    target, weight, input, at_target, at_row, step, mask, C, ignore_index, smoothing, softcap,
    PROBABILITIES: tl.constexpr, ELSEWHERE: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return each position's class index, whether it counts, whether it is out of range, its q and its logit.

    `mask` are the positions that may count.
    """
    y = tl.full(mask.shape, -1, tl.int64)
    counted, bad, target_q = mask, mask & False, tl.zeros(mask.shape, T)
    x = tl.zeros(mask.shape, T)
    if not PROBABILITIES:
        y = tl.load(target + at_target, mask, other=0).to(tl.int64)
        counted = mask & (y != ignore_index)
        in_range = counted & (y >= 0) & (y < C)
        bad = counted & ((y < (-1 if ELSEWHERE else 0)) | (y >= C))
        x = tl.load(input + at_row + y * step, in_range, other=0.0).to(T)
        target_q = tl.where(in_range, 1 - smoothing, 0.0)
        if weight is not None:
            target_q *= tl.load(weight + y, in_range, other=0.0).to(T)
    if SOFTCAP:
        x, _ = tanh_and_slope(x / softcap)
    return y, counted, bad, target_q, x


@triton.jit
def sweep(
    input,  # logits, (outer, P, C)
    target,  # (outer, P) class indices, or probabilities, (outer, P, C)
    weight,  # (C,), or None
    row_weight,  # (outer, P), multiplies the losses; or None for 1
    upstream,  # (outer, P), of the losses; or None for 1
    upstream_lse,  # (outer, P), of the lse; or None for 0
    upstream_entropy,  # (outer, P), of the entropy, with GIVEN; or None for 0
    loss,  # result, (outer, P); or None
    peak_of, log_sum_of, entropy_of,  # (outer, P), or None: with GIVEN read, else results
    correct,  # result, (outer, P); or None
    divisor,  # 0-d, divides the upstream of the losses; or None for 1
    partial,  # result: the sum of each program's losses, or None
    grad,  # result of the input's shape, may be the input; or None
    P, C,  # inner positions and classes; the grid has outer * cdiv(P, BP) programs
    x_outer, x_pos, x_class,  # strides of input
    t_outer, t_pos, t_class,  # strides of target; t_class is 0 for class indices
    g_outer, g_pos, g_class,  # strides of grad
    ignore_index,
    factor: tl.float64,  # multiplies the upstream of the losses
    smoothing: tl.float64,  # taken from the target
    spread: tl.float64,  # given to each class for it
    temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,  # target has probabilities
    ELSEWHERE: tl.constexpr,  # a class index of -1 counts: the target is no class of input
    GIVEN: tl.constexpr,  # the normaliser is given; it may be that of more classes than input has
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr,  # whether these options are used
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # positions and classes of a tile
):  # fmt: skip
    """Write the losses, statistics and gradient of a tile's positions, those that are given.

    Ignored positions and those of weight 0 are not read.
    """
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTHING
    LOSS: tl.constexpr = loss is not None or partial is not None
    ENTROPY: tl.constexpr = entropy_of is not None and not GIVEN
    # `number` in place: the interpreter takes long to call a function.
    smoothing, spread = tl.full([], smoothing, T), tl.full([], spread, T)
    softcap, z_loss = tl.full([], softcap, T), tl.full([], z_loss, T)
    inv_t = 1 / tl.full([], temperature, T)
    k = inv_t * softcap if SOFTCAP else inv_t
    tiles = tl.cdiv(P, BP)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    pos = (tl.program_id(0) % tiles).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    mask = pos < P
    row = outer * P + pos
    at_row = outer * x_outer + pos * x_pos
    at_target = outer * t_outer + pos * t_pos
    counted = mask
    if row_weight is not None:
        w = tl.load(row_weight + row, mask, other=0.0).to(T)
        counted = mask & (w != 0)
    y, counted, bad, target_q, u_y = target_of(
        target, weight, input, at_target, at_row, x_class, counted, C, ignore_index, smoothing, softcap,
        PROBABILITIES, ELSEWHERE, SOFTCAP, T,
    )  # fmt: skip
    at = at_row[:, None] + classes[None, :].to(tl.int64) * x_class
    at_t = at_target[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (outer * g_outer + pos * g_pos)[:, None] + classes[None, :].to(tl.int64) * g_class

    # Q, the peak and the sum of exponentials.
    Q = target_q
    valid = counted[:, None] & (classes < C)[None, :]
    if GIVEN:
        peak = tl.load(peak_of + row, counted, other=0.0)
        log_sum = tl.load(log_sum_of + row, counted, other=0.0)
    if WHOLE:
        x = tl.load(input + at, valid, other=float("-inf")).to(T)
        u, slope = x, 1.0
        if SOFTCAP:
            u, slope = tanh_and_slope(x / softcap)
            u = tl.where(valid, u, float("-inf"))
        if not GIVEN:
            peak = tl.max(u, 1)
            e = tl.exp((u - peak[:, None]) * k)
            total = tl.sum(e, 1)
            log_sum = tl.log(total)
        if SPREAD:
            q = spread_target(target, weight, at_t, valid, classes, C, smoothing, spread, PROBABILITIES, SMOOTHING, T)
            q += tl.where(classes[None, :] == y[:, None], target_q[:, None], 0.0)
            Q = tl.sum(q, 1)  # with the target's: with one class Q * p - q is exactly 0, however sums are rounded
    else:
        if not GIVEN:
            peak, total = peak_and_sum(input + at, x_class, counted, classes, C, softcap, k, SOFTCAP, T, BC)
            log_sum = tl.log(total)
        if SPREAD:
            sums = tl.zeros([BP, BC], T)
            for start in range(0, C, BC):
                c = start + classes
                sums += spread_target(
                    target, weight, at_t + tl.cast(start, tl.int64) * t_class, counted[:, None] & (c < C)[None, :], c,
                    C, smoothing, spread, PROBABILITIES, SMOOTHING, T,
                )  # fmt: skip
            Q += tl.sum(sums, 1)
    lse = peak * k + log_sum

    # The gradient by a logit z is g * (Q * p - q) + b * p - h * p * (log p + entropy).
    if grad is not None:
        g = tl.full([BP], factor, T)
        if divisor is not None:
            g /= tl.load(divisor).to(T)
        if upstream is not None:
            g *= tl.load(upstream + row, counted, other=0.0).to(T)
        if row_weight is not None:
            g *= w
        b = tl.zeros([BP], T)
        if Z_LOSS:
            b += g * 2 * z_loss * lse
        if upstream_lse is not None:
            b += tl.load(upstream_lse + row, counted, other=0.0).to(T)
        if upstream_entropy is not None:
            h = tl.load(upstream_entropy + row, counted, other=0.0).to(T)
            mean_depth = tl.load(entropy_of + row, counted, other=0.0) - log_sum
        g = tl.where(bad, float("nan"), g)

    # Depth: of a logit below the peak. Its sum over q is the loss of the spread target (in a whole row of q with the
    # class index's share), over p the entropy.
    q_depth = tl.zeros([BP], T)
    p_depth = tl.zeros([BP], T)
    if WHOLE:
        depth = (peak[:, None] - u) * k
        if SPREAD and LOSS:
            q_depth = tl.sum(tl.where(valid, q * depth, 0.0), 1)
        if ENTROPY or grad is not None:
            p = tl.exp(-depth - log_sum[:, None]) if GIVEN else e * (1 / total)[:, None]
        if ENTROPY:
            p_depth = tl.sum(tl.where(p == 0, 0.0, p * depth), 1)
        if correct is not None:
            best, best_class = tl.where(valid, x, float("-inf")), tl.zeros([BP, BC], tl.int32) + classes[None, :]
            if PROBABILITIES:
                t = tl.load(target + at_t, valid, other=float("-inf")).to(T)
                best_t, best_t_class = t, best_class
        if grad is not None:
            if not SPREAD:
                q = tl.where(classes[None, :] == y[:, None], target_q[:, None], 0.0)
            d = g[:, None] * (Q[:, None] * p - q) + b[:, None] * p
            if upstream_entropy is not None:
                d += h[:, None] * tl.where(p == 0, 0.0, p * (depth - mean_depth[:, None]))
            d = tl.where(counted[:, None], d * (slope * inv_t), 0.0)
            tl.store(grad + at_g, d.to(grad.dtype.element_ty), mask[:, None] & (classes < C)[None, :])
    elif (SPREAD and LOSS) or ENTROPY or correct is not None or grad is not None:
        q_depths = tl.zeros([BP, BC], T)
        p_depths = tl.zeros([BP, BC], T)
        if correct is not None:
            best = tl.full([BP, BC], float("-inf"), T)
            best_class = tl.zeros([BP, BC], tl.int32) + classes[None, :]
            if PROBABILITIES:
                best_t, best_t_class = best, best_class
        for start in range(0, C, BC):
            c = start + classes
            inside = (c < C)[None, :]
            valid = counted[:, None] & inside
            far = tl.cast(start, tl.int64)
            x = tl.load(input + at + far * x_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            u, slope = x, 1.0
            if SOFTCAP:
                u, slope = tanh_and_slope(x / softcap)
                u = tl.where(valid, u, float("-inf"))
            depth = (peak[:, None] - u) * k
            q = tl.zeros([BP, BC], T)
            if SPREAD:
                q = spread_target(
                    target, weight, at_t + far * t_class, valid, c, C, smoothing, spread, PROBABILITIES, SMOOTHING, T
                )
                if LOSS:
                    q_depths += tl.where(valid, q * depth, 0.0)
            if ENTROPY or grad is not None:
                p = tl.exp(-depth - log_sum[:, None])
            if ENTROPY:
                p_depths += tl.where(p == 0, 0.0, p * depth)
            if correct is not None:
                better = valid & is_larger(x, best)
                best, best_class = tl.where(better, x, best), tl.where(better, c[None, :], best_class)
                if PROBABILITIES:
                    t = tl.load(target + at_t + far * t_class, valid, other=float("-inf")).to(T)
                    better = is_larger(t, best_t)
                    best_t, best_t_class = tl.where(better, t, best_t), tl.where(better, c[None, :], best_t_class)
            if grad is not None:
                q += tl.where(c[None, :] == y[:, None], target_q[:, None], 0.0)
                d = g[:, None] * (Q[:, None] * p - q) + b[:, None] * p
                if upstream_entropy is not None:
                    d += h[:, None] * tl.where(p == 0, 0.0, p * (depth - mean_depth[:, None]))
                d = tl.where(counted[:, None], d * (slope * inv_t), 0.0).to(grad.dtype.element_ty)
                tl.store(grad + at_g + far * g_class, d, mask[:, None] & inside, eviction_policy="evict_first")
        q_depth = tl.sum(q_depths, 1)
        p_depth = tl.sum(p_depths, 1)

    if LOSS:
        value = Q * log_sum + q_depth
        if not (WHOLE and SPREAD):
            value += target_q * ((peak - u_y) * k)
        if Z_LOSS:
            value += z_loss * lse * lse
        if row_weight is not None:
            value *= w
        value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
        if loss is not None:
            tl.store(loss + row, value, mask)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))
    if peak_of is not None and not GIVEN:
        tl.store(peak_of + row, tl.where(counted, peak, 0.0), mask)
        tl.store(log_sum_of + row, tl.where(counted, log_sum, 0.0), mask)
    if ENTROPY:
        tl.store(entropy_of + row, tl.where(counted, log_sum + p_depth, 0.0), mask)
    if correct is not None:
        best_index = first_largest(best, best_class, C)
        if PROBABILITIES:
            y = first_largest(best_t, best_t_class, C)
        tl.store(correct + row, counted & (best_index == y), mask)


# If the classes of a row are contiguous, P is the number of rows, which the last, shorter batch changes: it must not
# compile again. In columns positions are contiguous, and the width of their loads depends on what divides P.
sweep_rows = triton.jit(sweep.fn, do_not_specialize=["P"])
