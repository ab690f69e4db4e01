"""The kernels of cross entropy; `triton.py` launches them and explains them together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import tanh_and_slope


@triton.jit
def _bounded(x, softcap, SOFTCAP: tl.constexpr):
    """Return the logits, or tanh(x / softcap), and the derivative of that by x, as far as it is not constant."""
    if SOFTCAP:
        return tanh_and_slope(x / softcap)
    else:
        return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _peak_and_sum(at, step, there, classes, C, softcap, k, SOFTCAP: tl.constexpr, T: tl.constexpr, BC: tl.constexpr):
    """Return each position's largest bounded logit and the sum of exponentials from there, of rows of any length.

    `at` points at the tile of the first classes, `step` elements are between classes. Each lane keeps its own peak and
    sum, which meet at the end.
    """
    peaks = tl.full(at.shape, float("-inf"), T)
    sums = tl.zeros(at.shape, T)
    for start in range(0, C, BC):
        valid = there[:, None] & (start + classes < C)[None, :]
        x = tl.load(at + tl.cast(start, tl.int64) * step, valid, other=float("-inf"), eviction_policy="evict_last").to(
            T
        )
        u = x
        if SOFTCAP:
            u, _ = tanh_and_slope(x / softcap)
            u = tl.where(valid, u, float("-inf"))
        e = tl.where(u == peaks, 1.0, tl.exp(-tl.abs(u - peaks) * k))  # 1 where both are -inf, too: it meets a 0 below
        sums = tl.where(u > peaks, sums * e + 1, sums + e)
        peaks = tl.maximum(peaks, u)
    peak = tl.max(peaks, 1)
    return peak, tl.sum(sums * tl.exp((peaks - peak[:, None]) * k), 1)


@triton.jit
def _spread(
    target, weight, at, valid, classes, C, counted, smoothing,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return the part of q that does not lie on a class index, 0 where ignored; `at` are a tile's target offsets."""
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
def _target(
    target, weight, input, at_target, at_row, step, here, C, ignore_index, smoothing, softcap,
    PROBABILITIES: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return the class index of each position, whether it counts, whether it is out of range, its q and its logit."""
    y = tl.full(here.shape, -1, tl.int64)
    counted, bad, own = here, here & False, tl.zeros(here.shape, T)
    x = tl.zeros(here.shape, T)
    if not PROBABILITIES:
        y = tl.load(target + at_target, here, other=0).to(tl.int64)
        counted = here & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
        mine = counted & (y >= 0) & (y < C)
        x = tl.load(input + at_row + y * step, mine, other=0.0).to(T)
        own = tl.where(mine, 1 - smoothing, 0.0)
        if weight is not None:
            own *= tl.load(weight + y, mine, other=0.0).to(T)
    if SOFTCAP:
        x, _ = tanh_and_slope(x / softcap)
    return y, counted, bad, own, x


@triton.jit
def sweep(
    input, target, weight,
    upstream,  # of each loss, or None for 1
    upstream_lse,  # of each lse, or None for 0
    divisor,  # of every upstream, 0-d, or None for 1
    loss, peak_out, log_sum_out, entropy_out, correct_out,  # one for each position, or None
    partial,  # the sum of each program's losses, or None
    grad,  # of the input, may be the input; or None
    P, C, x_outer, x_pos, x_class, t_outer, t_pos, t_class, g_outer, g_pos, g_class, ignore_index,
    factor: tl.float64, smoothing: tl.float64, temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, Z_LOSS: tl.constexpr,
    WHOLE: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and gradient of the positions of a tile, whatever of them is asked for."""
    # As `number` has it, in place: the interpreter takes long to call a function.
    smoothing, softcap, z_loss = tl.full([], smoothing, T), tl.full([], softcap, T), tl.full([], z_loss, T)
    slope = 1 / tl.full([], temperature, T)
    k = slope * softcap if SOFTCAP else slope
    tiles = tl.cdiv(P, BP)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    pos = (tl.program_id(0) % tiles).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    here = pos < P
    row = outer * P + pos
    at_row = outer * x_outer + pos * x_pos
    at_target = outer * t_outer + pos * t_pos
    y, counted, bad, own, u_y = _target(
        target, weight, input, at_target, at_row, x_class, here, C, ignore_index, smoothing, softcap,
        PROBABILITIES, SOFTCAP, T,
    )  # fmt: skip
    # An ignored position is looked at only where something is asked for that does not ignore it.
    read = counted
    if entropy_out is not None or upstream_lse is not None:
        read = here
    at = at_row[:, None] + classes[None, :].to(tl.int64) * x_class
    at_t = at_target[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (outer * g_outer + pos * g_pos)[:, None] + classes[None, :].to(tl.int64) * g_class

    Q = own
    valid = read[:, None] & (classes < C)[None, :]
    if WHOLE:
        x = tl.load(input + at, valid, other=float("-inf")).to(T)
        u, bend = x, 1.0
        if SOFTCAP:
            u, bend = tanh_and_slope(x / softcap)
            u = tl.where(valid, u, float("-inf"))
        peak = tl.max(u, 1)
        e = tl.exp((u - peak[:, None]) * k)
        total = tl.sum(e, 1)
        q = tl.zeros([BP, BC], T)
        if PROBABILITIES or SMOOTHING:
            q = _spread(target, weight, at_t, valid, classes, C, counted, smoothing, PROBABILITIES, SMOOTHING, T)
            Q += tl.sum(q, 1)
    else:
        peak, total = _peak_and_sum(input + at, x_class, read, classes, C, softcap, k, SOFTCAP, T, BC)
        if PROBABILITIES or SMOOTHING:
            sums = tl.zeros([BP, BC], T)
            for start in range(0, C, BC):
                c = start + classes
                sums += _spread(
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
            g *= tl.load(upstream + row, here, other=0.0).to(T)
        g = tl.where(counted, g, 0.0)
        b = tl.zeros([BP], T)
        if Z_LOSS:
            b += g * 2 * z_loss * lse
        kept = counted
        if upstream_lse is not None:
            b = tl.where(counted, b, 0.0) + tl.load(upstream_lse + row, here, other=0.0).to(T)
            kept = counted | (b != 0)
        g = tl.where(bad, float("nan"), g)

    # What lies under the peak: sum of q times it is the loss of the spread target, of p the entropy.
    under = tl.zeros([BP], T)
    spread_out = tl.zeros([BP], T)
    if WHOLE:
        if PROBABILITIES or SMOOTHING:
            under = tl.sum(tl.where(valid & counted[:, None], q * ((peak[:, None] - u) * k), 0.0), 1)
        if entropy_out is not None or grad is not None:
            p = e * (1 / total)[:, None]
        if entropy_out is not None:
            spread_out = tl.sum(tl.where(e == 0, 0.0, p * ((peak[:, None] - u) * k)), 1)
            best, best_class = tl.where(valid, x, float("-inf")), tl.zeros([BP, BC], tl.int32) + classes[None, :]
            if PROBABILITIES:
                t = tl.load(target + at_t, valid, other=float("-inf")).to(T)
                best_t, best_t_class = t, best_class
        if grad is not None:
            q += tl.where(classes[None, :] == y[:, None], own[:, None], 0.0)
            d = (g[:, None] * (Q[:, None] * p - q) + b[:, None] * p) * (bend * slope)
            d = tl.where(kept[:, None], d, 0.0)
            tl.store(grad + at_g, d.to(grad.dtype.element_ty), here[:, None] & (classes < C)[None, :])
    elif PROBABILITIES or SMOOTHING or entropy_out is not None or grad is not None:
        unders = tl.zeros([BP, BC], T)
        spreads = tl.zeros([BP, BC], T)
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
            u, bend = x, 1.0
            if SOFTCAP:
                u, bend = tanh_and_slope(x / softcap)
                u = tl.where(valid, u, float("-inf"))
            depth = (peak[:, None] - u) * k
            q = tl.zeros([BP, BC], T)
            if PROBABILITIES or SMOOTHING:
                q = _spread(
                    target, weight, at_t + far * t_class, valid, c, C, counted, smoothing, PROBABILITIES, SMOOTHING, T
                )
                unders += tl.where(valid & counted[:, None], q * depth, 0.0)
            if entropy_out is not None or grad is not None:
                p = tl.exp(-depth - log_sum[:, None])
            if entropy_out is not None:
                spreads += tl.where(p == 0, 0.0, p * depth)
                better = valid & (x > best)
                best, best_class = tl.where(better, x, best), tl.where(better, c[None, :], best_class)
                if PROBABILITIES:
                    t = tl.load(target + at_t + far * t_class, valid, other=float("-inf")).to(T)
                    better = t > best_t
                    best_t, best_t_class = tl.where(better, t, best_t), tl.where(better, c[None, :], best_t_class)
            if grad is not None:
                q += tl.where(c[None, :] == y[:, None], own[:, None], 0.0)
                d = (g[:, None] * (Q[:, None] * p - q) + b[:, None] * p) * (bend * slope)
                d = tl.where(kept[:, None], d, 0.0).to(grad.dtype.element_ty)
                tl.store(grad + at_g + far * g_class, d, here[:, None] & inside, eviction_policy="evict_first")
        under = tl.sum(unders, 1)
        spread_out = tl.sum(spreads, 1)

    if loss is not None or partial is not None:
        value = Q * log_sum + own * ((peak - u_y) * k) + under
        if Z_LOSS:
            value += z_loss * lse * lse
        value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
        if loss is not None:
            tl.store(loss + row, value, here)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))
    if peak_out is not None:
        tl.store(peak_out + row, peak, here)
        tl.store(log_sum_out + row, log_sum, here)
    if entropy_out is not None:
        tl.store(entropy_out + row, log_sum + spread_out, here)
        found = tl.min(tl.where(best == tl.max(best, 1)[:, None], best_class, C), 1)
        if PROBABILITIES:
            right = tl.min(tl.where(best_t == tl.max(best_t, 1)[:, None], best_t_class, C), 1)
            tl.store(correct_out + row, found == right, here)
        else:
            tl.store(correct_out + row, counted & (found == y), here)


@triton.jit
def _direction_tile(
    input, direction, target, weight, at, at_v, at_t, valid, c, C, y, own, counted, smoothing, softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's bounded logits, their derivative by the logits but for the temperature, the direction, and q."""
    u, bend = _bounded(tl.load(input + at, valid, other=float("-inf")).to(T), softcap, SOFTCAP)
    v = tl.load(direction + at_v, valid, other=0.0).to(T)
    q = _spread(target, weight, at_t, valid, c, C, counted, smoothing, PROBABILITIES, SMOOTHING, T)
    q += tl.where(c[None, :] == y[:, None], own[:, None], 0.0)
    return tl.where(valid, u, float("-inf")), bend, v, q


@triton.jit
def _directional_tile(
    v_input, v_target, weight, at_o, at_u, stored, c, C, u, bend, v, q, p, g, a, twice, along, kept, slope, softcap,
    smoothing, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write a tile of the derivatives by the input and by the target."""
    first = bend * slope
    w = v * first
    result = first * p * (a[:, None] * (w - along[:, None]) + (twice * g * along)[:, None])
    if SOFTCAP:
        result += v * (-2 / softcap * u * first) * (a[:, None] * p - g[:, None] * q)
    result = tl.where(kept[:, None], result, 0.0)
    tl.store(v_input + at_o, result.to(v_input.dtype.element_ty), stored)
    if v_target is not None:
        by_target = (1 - smoothing) * g[:, None] * (along[:, None] - w)
        if weight is not None:
            by_target *= tl.load(weight + c, c < C, other=0.0).to(T)[None, :]
        tl.store(v_target + at_u, by_target.to(v_target.dtype.element_ty), stored)


@triton.jit
def directional(
    direction, grad_loss, grad_lse, input, target, weight, v_loss, v_lse, v_input, v_target,
    P, C, x_outer, x_pos, x_class, v_outer, v_pos, v_class, o_outer, o_pos, o_class, t_outer, t_pos, t_class,
    u_outer, u_pos, u_class, ignore_index,
    smoothing: tl.float64, temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The derivatives of the product of the gradient with a direction."""
    # As `number` has it, in place: the interpreter takes long to call a function.
    smoothing, softcap, z_loss = tl.full([], smoothing, T), tl.full([], softcap, T), tl.full([], z_loss, T)
    slope = 1 / tl.full([], temperature, T)
    k = slope * softcap if SOFTCAP else slope
    tiles = tl.cdiv(P, BP)
    outer = (tl.program_id(0) // tiles).to(tl.int64)
    pos = (tl.program_id(0) % tiles).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    here = pos < P
    row = outer * P + pos
    at_row = outer * x_outer + pos * x_pos
    at_target = outer * t_outer + pos * t_pos
    y, counted, bad, own, _ = _target(
        target, weight, input, at_target, at_row, x_class, here, C, ignore_index, smoothing, softcap,
        PROBABILITIES, SOFTCAP, T,
    )  # fmt: skip
    along_classes = classes[None, :].to(tl.int64)
    at = at_row[:, None] + along_classes * x_class
    at_v = (outer * v_outer + pos * v_pos)[:, None] + along_classes * v_class
    at_o = (outer * o_outer + pos * o_pos)[:, None] + along_classes * o_class
    at_t = at_target[:, None] + along_classes * t_class
    at_u = (outer * u_outer + pos * u_pos)[:, None] + along_classes * u_class
    kept = here if grad_lse is not None else counted
    g = tl.where(counted, tl.load(grad_loss + row, here, other=0.0).to(T), 0.0)
    g = tl.where(bad, float("nan"), g)
    inside = (classes < C)[None, :]
    if WHOLE:
        u, bend, v, q = _direction_tile(
            input, direction, target, weight, at, at_v, at_t, kept[:, None] & inside, classes, C, y, own, counted,
            smoothing, softcap, PROBABILITIES, SMOOTHING, SOFTCAP, T,
        )  # fmt: skip
        peak = tl.max(u, 1)
        e = tl.exp((u - peak[:, None]) * k)
        total = tl.sum(e, 1)
        p = e * (1 / total)[:, None]
        along, target_along, Q = tl.sum(v * bend * slope * p, 1), tl.sum(v * bend * slope * q, 1), tl.sum(q, 1)
        log_sum = tl.log(total)
    else:
        peak, total = _peak_and_sum(input + at, x_class, kept, classes, C, softcap, k, SOFTCAP, T, BC)
        log_sum = tl.log(total)
        alongs, target_alongs, Qs = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, bend, v, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                kept[:, None] & (c < C)[None, :], c, C, y, own, counted, smoothing, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            alongs += v * bend * slope * tl.exp((u - peak[:, None]) * k - log_sum[:, None])
            target_alongs += v * bend * slope * q
            Qs += q
        along, target_along, Q = tl.sum(alongs, 1), tl.sum(target_alongs, 1), tl.sum(Qs, 1)

    twice = 2 * z_loss
    share = Q + twice * (peak * k + log_sum)
    a = tl.where(counted, g * share, 0.0)
    if grad_lse is not None:
        a += tl.load(grad_lse + row, here, other=0.0).to(T)
        kept = counted | (a != 0)
    by_loss = tl.where(counted, share * along - target_along, 0.0)
    tl.store(v_loss + row, tl.where(bad, float("nan"), by_loss), here)
    tl.store(v_lse + row, along, here)

    if WHOLE:
        _directional_tile(
            v_input, v_target, weight, at_o, at_u, here[:, None] & inside, classes, C, u, bend, v, q, p, g, a, twice,
            along, kept, slope, softcap, smoothing, SOFTCAP, T,
        )  # fmt: skip
    else:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, bend, v, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                kept[:, None] & (c < C)[None, :], c, C, y, own, counted, smoothing, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            p = tl.exp((u - peak[:, None]) * k - log_sum[:, None])
            _directional_tile(
                v_input, v_target, weight, at_o + far * o_class, at_u + far * u_class,
                here[:, None] & (c < C)[None, :], c, C, u, bend, v, q, p, g, a, twice, along, kept, slope, softcap,
                smoothing, SOFTCAP, T,
            )  # fmt: skip


# Where the rows of classes lie together, P is the number of rows, which a last, shorter batch changes. In columns the
# positions lie together, and how wide their loads are depends on what divides P.
sweep_rows, directional_rows = (triton.jit(kernel.fn, do_not_specialize=["P"]) for kernel in (sweep, directional))
