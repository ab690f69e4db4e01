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
    target, weight, at, valid, classes, C, counted, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return q without the class index's share, 0 where ignored; `at` are the offsets of a tile of probabilities."""
    q = tl.zeros(valid.shape, T)
    if PROBABILITIES:
        q += tl.load(target + at, valid, other=0.0).to(T)
    if SMOOTHING:
        q = q * (1 - smoothing) + smoothing / C
    if PROBABILITIES or SMOOTHING:
        if weight is not None:
            q *= tl.load(weight + classes, classes < C, other=0.0).to(T)[None, :]
        q = tl.where(valid & counted[:, None], q, 0.0)
    return q


@triton.jit
def target_of(
    target, weight, input, at_target, at_row, step, mask, C, ignore_index, smoothing, softcap,
    PROBABILITIES: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return each position's class index, whether it counts, whether it is out of range, its q and its logit."""
    y = tl.full(mask.shape, -1, tl.int64)
    counted, bad, target_q = mask, mask & False, tl.zeros(mask.shape, T)
    x = tl.zeros(mask.shape, T)
    if not PROBABILITIES:
        y = tl.load(target + at_target, mask, other=0).to(tl.int64)
        counted = mask & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
        in_range = counted & (y >= 0) & (y < C)
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
    upstream,  # (outer, P), of the losses; or None for 1
    upstream_lse,  # (outer, P), of the lse; or None for 0
    divisor,  # 0-d, divides every upstream; or None for 1
    loss, peak_out, log_sum_out, entropy_out, correct_out,  # results, (outer, P), or None
    partial,  # result: the sum of each program's losses, or None
    grad,  # result of the input's shape, may be the input; or None
    P, C,  # inner positions and classes; the grid has outer * cdiv(P, BP) programs
    x_outer, x_pos, x_class,  # strides of input
    t_outer, t_pos, t_class,  # strides of target; t_class is 0 for class indices
    g_outer, g_pos, g_class,  # strides of grad
    ignore_index,
    factor: tl.float64,  # multiplies every upstream
    smoothing: tl.float64, temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,  # the loss's options
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr,  # whether these options are used
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # positions and classes of a tile
):  # fmt: skip
    """Write the losses, statistics and gradient of a tile's positions, those that are given."""
    # `number` in place: the interpreter takes long to call a function.
    smoothing, softcap, z_loss = tl.full([], smoothing, T), tl.full([], softcap, T), tl.full([], z_loss, T)
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
    y, counted, bad, target_q, u_y = target_of(
        target, weight, input, at_target, at_row, x_class, mask, C, ignore_index, smoothing, softcap,
        PROBABILITIES, SOFTCAP, T,
    )  # fmt: skip
    # Ignored positions are read only for the entropy and the gradient of lse, which do not ignore them.
    read = counted
    if entropy_out is not None or upstream_lse is not None:
        read = mask
    at = at_row[:, None] + classes[None, :].to(tl.int64) * x_class
    at_t = at_target[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (outer * g_outer + pos * g_pos)[:, None] + classes[None, :].to(tl.int64) * g_class

    Q = target_q
    valid = read[:, None] & (classes < C)[None, :]
    if WHOLE:
        x = tl.load(input + at, valid, other=float("-inf")).to(T)
        u, slope = x, 1.0
        if SOFTCAP:
            u, slope = tanh_and_slope(x / softcap)
            u = tl.where(valid, u, float("-inf"))
        peak = tl.max(u, 1)
        e = tl.exp((u - peak[:, None]) * k)
        total = tl.sum(e, 1)
        q = tl.zeros([BP, BC], T)
        if PROBABILITIES or SMOOTHING:
            q = spread_target(target, weight, at_t, valid, classes, C, counted, smoothing, PROBABILITIES, SMOOTHING, T)
            Q += tl.sum(q, 1)
    else:
        peak, total = peak_and_sum(input + at, x_class, read, classes, C, softcap, k, SOFTCAP, T, BC)
        if PROBABILITIES or SMOOTHING:
            sums = tl.zeros([BP, BC], T)
            for start in range(0, C, BC):
                c = start + classes
                sums += spread_target(
                    target, weight, at_t + tl.cast(start, tl.int64) * t_class, read[:, None] & (c < C)[None, :], c, C,
                    counted, smoothing, PROBABILITIES, SMOOTHING, T,
                )  # fmt: skip
            Q += tl.sum(sums, 1)
    log_sum = tl.log(total)
    lse = peak * k + log_sum

    if grad is not None:
        g = tl.full([BP], factor, T)
        if divisor is not None:
            g /= tl.load(divisor).to(T)
        if upstream is not None:
            g *= tl.load(upstream + row, mask, other=0.0).to(T)
        g = tl.where(counted, g, 0.0)
        b = tl.zeros([BP], T)
        if Z_LOSS:
            b += g * 2 * z_loss * lse
        kept = counted
        if upstream_lse is not None:
            b = tl.where(counted, b, 0.0) + tl.load(upstream_lse + row, mask, other=0.0).to(T)
            kept = counted | (b != 0)
        g = tl.where(bad, float("nan"), g)

    # Distance: of a logit from the peak. Its sum over q is the loss of the spread target, over p the entropy.
    q_distance = tl.zeros([BP], T)
    p_distance = tl.zeros([BP], T)
    if WHOLE:
        if PROBABILITIES or SMOOTHING:
            q_distance = tl.sum(tl.where(valid & counted[:, None], q * ((peak[:, None] - u) * k), 0.0), 1)
        if entropy_out is not None or grad is not None:
            p = e * (1 / total)[:, None]
        if entropy_out is not None:
            p_distance = tl.sum(tl.where(e == 0, 0.0, p * ((peak[:, None] - u) * k)), 1)
            best, best_class = tl.where(valid, x, float("-inf")), tl.zeros([BP, BC], tl.int32) + classes[None, :]
            if PROBABILITIES:
                t = tl.load(target + at_t, valid, other=float("-inf")).to(T)
                best_t, best_t_class = t, best_class
        if grad is not None:
            q += tl.where(classes[None, :] == y[:, None], target_q[:, None], 0.0)
            d = (g[:, None] * (Q[:, None] * p - q) + b[:, None] * p) * (slope * inv_t)
            d = tl.where(kept[:, None], d, 0.0)
            tl.store(grad + at_g, d.to(grad.dtype.element_ty), mask[:, None] & (classes < C)[None, :])
    elif PROBABILITIES or SMOOTHING or entropy_out is not None or grad is not None:
        q_distances = tl.zeros([BP, BC], T)
        p_distances = tl.zeros([BP, BC], T)
        if entropy_out is not None:
            best = tl.full([BP, BC], float("-inf"), T)
            best_class = tl.zeros([BP, BC], tl.int32) + classes[None, :]
            if PROBABILITIES:
                best_t, best_t_class = best, best_class
        for start in range(0, C, BC):
            c = start + classes
            inside = (c < C)[None, :]
            valid = read[:, None] & inside
            far = tl.cast(start, tl.int64)
            x = tl.load(input + at + far * x_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            u, slope = x, 1.0
            if SOFTCAP:
                u, slope = tanh_and_slope(x / softcap)
                u = tl.where(valid, u, float("-inf"))
            depth = (peak[:, None] - u) * k
            q = tl.zeros([BP, BC], T)
            if PROBABILITIES or SMOOTHING:
                q = spread_target(
                    target, weight, at_t + far * t_class, valid, c, C, counted, smoothing, PROBABILITIES, SMOOTHING, T
                )
                q_distances += tl.where(valid & counted[:, None], q * depth, 0.0)
            if entropy_out is not None or grad is not None:
                p = tl.exp(-depth - log_sum[:, None])
            if entropy_out is not None:
                p_distances += tl.where(p == 0, 0.0, p * depth)
                better = valid & (x > best)
                best, best_class = tl.where(better, x, best), tl.where(better, c[None, :], best_class)
                if PROBABILITIES:
                    t = tl.load(target + at_t + far * t_class, valid, other=float("-inf")).to(T)
                    better = t > best_t
                    best_t, best_t_class = tl.where(better, t, best_t), tl.where(better, c[None, :], best_t_class)
            if grad is not None:
                q += tl.where(c[None, :] == y[:, None], target_q[:, None], 0.0)
                d = (g[:, None] * (Q[:, None] * p - q) + b[:, None] * p) * (slope * inv_t)
                d = tl.where(kept[:, None], d, 0.0).to(grad.dtype.element_ty)
                tl.store(grad + at_g + far * g_class, d, mask[:, None] & inside, eviction_policy="evict_first")
        q_distance = tl.sum(q_distances, 1)
        p_distance = tl.sum(p_distances, 1)

    if loss is not None or partial is not None:
        value = Q * log_sum + target_q * ((peak - u_y) * k) + q_distance
        if Z_LOSS:
            value += z_loss * lse * lse
        value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
        if loss is not None:
            tl.store(loss + row, value, mask)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))
    if peak_out is not None:
        tl.store(peak_out + row, peak, mask)
        tl.store(log_sum_out + row, log_sum, mask)
    if entropy_out is not None:
        tl.store(entropy_out + row, log_sum + p_distance, mask)
        best_index = tl.min(tl.where(best == tl.max(best, 1)[:, None], best_class, C), 1)
        if PROBABILITIES:
            target_index = tl.min(tl.where(best_t == tl.max(best_t, 1)[:, None], best_t_class, C), 1)
            tl.store(correct_out + row, best_index == target_index, mask)
        else:
            tl.store(correct_out + row, counted & (best_index == y), mask)


# If the classes of a row are contiguous, P is the number of rows, which the last, shorter batch changes: it must not
# compile again. In columns positions are contiguous, and the width of their loads depends on what divides P.
sweep_rows = triton.jit(sweep.fn, do_not_specialize=["P"])
