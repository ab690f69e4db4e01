"""The kernels of distillation; `triton.py` launches them and has the formulas."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import tanh_and_slope
from tlkernels.losses.distillation.call import DIVERGENCES

FORWARD, REVERSE, JS, TV = (tl.constexpr(DIVERGENCES.index(name)) for name in ("forward_kl", "reverse_kl", "js", "tv"))


@triton.jit
def _capped(logit, cap):
    """Return f: tanh(logit / cap), or the logit if cap is None."""
    f = logit
    if cap is not None:
        f, _ = tanh_and_slope(logit / cap)
    return f


@triton.jit
def load(at, valid, cap, T: tl.constexpr, EVICTION: tl.constexpr):
    """Return f of a tile, -inf where not valid."""
    f = _capped(tl.load(at, valid, other=float("-inf"), eviction_policy=EVICTION).to(T), cap)
    if cap is not None:
        f = tl.where(valid, f, float("-inf"))  # not -1
    return f


@triton.jit
def of_x(difference, cap):
    """Return a difference of f as one of x = cap * f."""
    if cap is not None:
        difference *= cap
    return difference


@triton.jit
def slopes(p, q, log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """Return a, slope_p and slope_q of a tile."""
    zero = tl.zeros(p.shape, p.dtype)
    slope_p, slope_q = zero, zero
    if DIVERGENCE == FORWARD:
        slope_q = tl.where(q == 0, 0.0, log_q - log_p)
    if DIVERGENCE == REVERSE:
        slope_p = tl.where(p == 0, 0.0, log_p - log_q)
    if DIVERGENCE == JS:  # over m by the larger of the two, so that nothing overflows
        log_ratio = log_p - log_q
        ratio = tl.exp(-tl.abs(log_ratio))
        log_mixture = -tl.log(tl.where(log_ratio > 0, 1 - beta + beta * ratio, beta + (1 - beta) * ratio))
        slope_p = tl.where(p == 0, 0.0, (1 - beta) * (log_mixture + tl.minimum(log_ratio, 0.0)))
        slope_q = tl.where(q == 0, 0.0, beta * (log_mixture - tl.maximum(log_ratio, 0.0)))
    a = p * slope_p + q * slope_q
    if DIVERGENCE == TV:
        slope_p = tl.where(p > q, 0.5, tl.where(p < q, -0.5, p - q))  # NaN stays NaN
        slope_q = -slope_p
        a = tl.abs(p - q) / 2
    return a, slope_p, slope_q


@triton.jit
def lanes(f, cap, peaks, sums, sums_1, k, HARD: tl.constexpr):
    """Add f to each lane's peak and sums of exponentials of x, at the temperature and at temperature 1."""
    gap = of_x(tl.where(f == peaks, 0.0, tl.abs(f - peaks)), cap)
    e = tl.exp(-gap * k)
    sums = tl.where(f > peaks, sums * e + 1, sums + e)
    if HARD:
        e = tl.exp(-gap)
        sums_1 = tl.where(f > peaks, sums_1 * e + 1, sums_1 + e)
    return tl.maximum(peaks, f), sums, sums_1


@triton.jit
def soft_gradient(p, q, slope_p, mean_p, DIRECT: tl.constexpr):
    """Return the divergence's gradient by the x of p, but for a factor. DIRECT: it does not need the slopes."""
    return p - q if DIRECT else tl.where(p == 0, 0.0, p * (slope_p - mean_p[:, None]))


@triton.jit
def hard_gradient(p_1, c, C, y, smoothing):
    """Return the cross entropy's gradient by the student's x, whose softmax at temperature 1 is p_1."""
    return p_1 - (tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C)


@triton.jit
def _write_gradients(
    grad_student, grad_teacher, at, stored, counted, c, C, y,
    s, t, s_cap, t_cap,  # f and softcap of both sides
    p, q, slope_p, slope_q,
    mean_p, mean_q,  # of the slopes by row; None where the divergence's gradient does not need them
    p_1,  # the student's softmax at temperature 1, with HARD
    soft_g, hard_g, smoothing, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradients that are given, 0 in rows that do not count."""
    if grad_student is not None:
        d = soft_g * soft_gradient(p, q, slope_p, mean_p, DIVERGENCE == FORWARD)
        if HARD:
            d += hard_g * hard_gradient(p_1, c, C, y, smoothing)
        if s_cap is not None:
            d *= (1 - s) * (1 + s)  # small near the cap: from f, not from x, which is rounded again
        d = tl.where(counted[:, None], d, 0.0).to(grad_student.dtype.element_ty)
        tl.store(grad_student + at, d, stored, eviction_policy=EVICTION)
    if grad_teacher is not None:
        d = soft_g * soft_gradient(q, p, slope_q, mean_q, DIVERGENCE == REVERSE)
        if t_cap is not None:
            d *= (1 - t) * (1 + t)
        d = tl.where(counted[:, None], d, 0.0).to(grad_teacher.dtype.element_ty)
        tl.store(grad_teacher + at, d, stored, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["N", "inner"])
def distillation(
    student, teacher,  # logits, (N, C)
    target,  # (N,) class indices, or None
    row_weight,  # (N,), or None for 1; rows of weight 0 do not count
    upstream,  # (N,), or None for 1
    divisor,  # 0-d, divides every upstream; or None for 1
    loss,  # result, (N,), or None
    partial,  # result: the sum of each program's losses, or None
    grad_student, grad_teacher,  # results, (N, C) contiguous, or None; may be the logits
    N, inner, C,  # rows, of which row is (row // inner, row % inner); classes
    s_outer, s_inner, s_class,  # strides of student
    t_outer, t_inner, t_class,  # strides of teacher
    ignore_index,
    factor: tl.float64,  # multiplies every upstream
    temperature: tl.float64, beta: tl.float64,  # of the divergence
    hard: tl.float64, smoothing: tl.float64,  # hard_weight and label_smoothing of the cross entropy
    s_softcap: tl.float64, t_softcap: tl.float64,  # of both sides
    DIVERGENCE: tl.constexpr,  # FORWARD, REVERSE, JS or TV
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,  # whether these are used
    HARD: tl.constexpr,  # hard is not 0
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # rows and classes of a tile
):  # fmt: skip
    """Write the losses and gradients of some rows, those that are given.

    f is tanh(logit / softcap), or the logit on a side without one, and x = softcap * f, or f.
    """
    beta, hard, smoothing = tl.full([], beta, T), tl.full([], hard, T), tl.full([], smoothing, T)
    temperature = tl.full([], temperature, T)
    s_cap = tl.full([], s_softcap, T) if S_CAPPED else None
    t_cap = tl.full([], t_softcap, T) if T_CAPPED else None
    k = 1 / temperature
    row = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    mask = row < N
    counted, bad = mask, mask & False
    if row_weight is not None:
        counted &= tl.load(row_weight + row, mask, other=0.0) != 0
    y = tl.full([BP], -1, tl.int64)
    if target is not None:
        y = tl.load(target + row, mask, other=0).to(tl.int64)
        counted &= y != ignore_index
        bad = counted & ((y < 0) | (y >= C))
    row_s = row // inner * s_outer + row % inner * s_inner
    row_t = row // inner * t_outer + row % inner * t_inner
    at_s = row_s[:, None] + classes[None, :].to(tl.int64) * s_class
    at_t = row_t[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (row * C)[:, None] + classes[None, :].to(tl.int64)
    if HARD:
        target_at = row_s + y * s_class
        target_logit = tl.load(student + target_at, counted & (y >= 0) & (y < C), other=0.0).to(T)
        target_f = _capped(target_logit, s_cap)

    g = tl.full([BP], factor, T)
    if divisor is not None:
        g /= tl.load(divisor).to(T)
    if upstream is not None:
        g *= tl.load(upstream + row, mask, other=0.0).to(T)
    weight = tl.full([BP], 1.0, T)
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask, other=0.0).to(T)
    g = tl.where(bad, float("nan"), g * weight)
    soft_g, hard_g = ((1 - hard) * temperature * g)[:, None], (hard * g)[:, None]

    if WHOLE:
        valid = counted[:, None] & (classes < C)[None, :]
        s, t = load(student + at_s, valid, s_cap, T, ""), load(teacher + at_t, valid, t_cap, T, "")
        peak_s, peak_t = tl.max(s, 1), tl.max(t, 1)
        d_s, d_t = of_x(s - peak_s[:, None], s_cap), of_x(t - peak_t[:, None], t_cap)
        p, q = tl.exp(d_s * k), tl.exp(d_t * k)
        sum_s, sum_t = tl.sum(p, 1), tl.sum(q, 1)
        p, q = p * (1 / sum_s)[:, None], q * (1 / sum_t)[:, None]
        p_1 = p
        if HARD:
            p_1 = tl.exp(d_s)
            sum_1 = tl.sum(p_1, 1)
            p_1 = p_1 * (1 / sum_1)[:, None]
    else:
        peaks_s, peaks_t = tl.full([BP, BC], float("-inf"), T), tl.full([BP, BC], float("-inf"), T)
        sums_s, sums_t, sums_1 = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            valid, far = counted[:, None] & (start + classes < C)[None, :], tl.cast(start, tl.int64)
            s = load(student + at_s + far * s_class, valid, s_cap, T, "evict_last")
            t = load(teacher + at_t + far * t_class, valid, t_cap, T, "evict_last")
            peaks_s, sums_s, sums_1 = lanes(s, s_cap, peaks_s, sums_s, sums_1, k, HARD)
            peaks_t, sums_t, _ = lanes(t, t_cap, peaks_t, sums_t, sums_t, k, False)
        peak_s, peak_t = tl.max(peaks_s, 1), tl.max(peaks_t, 1)
        down_s, down_t = of_x(peaks_s - peak_s[:, None], s_cap), of_x(peaks_t - peak_t[:, None], t_cap)
        sum_s, sum_t = tl.sum(sums_s * tl.exp(down_s * k), 1), tl.sum(sums_t * tl.exp(down_t * k), 1)
        if HARD:
            sum_1 = tl.sum(sums_1 * tl.exp(down_s), 1)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    if HARD:
        log_1 = tl.log(sum_1)

    DIRECT: tl.constexpr = (grad_student is None or DIVERGENCE == FORWARD) and (
        grad_teacher is None or DIVERGENCE == REVERSE
    )
    soft = (1 - hard) * temperature * temperature
    if WHOLE:
        log_p, log_q = d_s * k - log_s[:, None], d_t * k - log_t[:, None]
        a, slope_p, slope_q = slopes(p, q, log_p, log_q, beta, DIVERGENCE)
        mean_p, mean_q = tl.sum(p * slope_p, 1), tl.sum(q * slope_q, 1)
        a *= soft
        if HARD:
            spread = tl.where(valid, hard * smoothing / C * of_x(peak_s[:, None] - s, s_cap), 0.0)
            a += tl.where(smoothing == 0, 0.0, spread)
        value = tl.sum(a, 1)
    else:
        sums_a, sums_p, sums_q = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            valid = counted[:, None] & (c < C)[None, :]
            s = load(student + at_s + far * s_class, valid, s_cap, T, "")
            t = load(teacher + at_t + far * t_class, valid, t_cap, T, "")
            d_s, d_t = of_x(s - peak_s[:, None], s_cap), of_x(t - peak_t[:, None], t_cap)
            log_p, log_q = d_s * k - log_s[:, None], d_t * k - log_t[:, None]
            p, q = tl.exp(log_p), tl.exp(log_q)
            a, slope_p, slope_q = slopes(p, q, log_p, log_q, beta, DIVERGENCE)
            sums_a += soft * a
            if HARD:
                spread = tl.where(valid, hard * smoothing / C * of_x(peak_s[:, None] - s, s_cap), 0.0)
                sums_a += tl.where(smoothing == 0, 0.0, spread)
            if not DIRECT:
                sums_p += p * slope_p
                sums_q += q * slope_q
            elif grad_student is not None or grad_teacher is not None:
                p_1 = p
                if HARD:
                    p_1 = tl.exp(d_s - log_1[:, None])
                _write_gradients(
                    grad_student, grad_teacher, at_g + far, mask[:, None] & (c < C)[None, :], counted, c, C, y, s, t,
                    s_cap, t_cap, p, q, slope_p, slope_q, None, None, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD,
                    "evict_first",
                )  # fmt: skip
        value, mean_p, mean_q = tl.sum(sums_a, 1), tl.sum(sums_p, 1), tl.sum(sums_q, 1)

    if loss is not None or partial is not None:
        if HARD:
            value += hard * ((1 - smoothing) * of_x(peak_s - target_f, s_cap) + log_1)
        value = tl.where(bad, float("nan"), tl.where(counted, value * weight, 0.0))
        if loss is not None:
            tl.store(loss + row, value, mask)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))

    if WHOLE:
        _write_gradients(
            grad_student, grad_teacher, at_g, mask[:, None] & (classes < C)[None, :], counted, classes, C, y, s, t,
            s_cap, t_cap, p, q, slope_p, slope_q, mean_p, mean_q, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD, "",
        )  # fmt: skip
    elif not DIRECT:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            inside = (c < C)[None, :]
            valid = counted[:, None] & inside
            s = load(student + at_s + far * s_class, valid, s_cap, T, "evict_first")
            t = load(teacher + at_t + far * t_class, valid, t_cap, T, "evict_first")
            d_s, d_t = of_x(s - peak_s[:, None], s_cap), of_x(t - peak_t[:, None], t_cap)
            log_p, log_q = d_s * k - log_s[:, None], d_t * k - log_t[:, None]
            p, q = tl.exp(log_p), tl.exp(log_q)
            _, slope_p, slope_q = slopes(p, q, log_p, log_q, beta, DIVERGENCE)
            p_1 = p
            if HARD:
                p_1 = tl.exp(d_s - log_1[:, None])
            _write_gradients(
                grad_student, grad_teacher, at_g + far, mask[:, None] & inside, counted, c, C, y, s, t, s_cap, t_cap,
                p, q, slope_p, slope_q, mean_p, mean_q, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD, "evict_first",
            )  # fmt: skip
