"""The kernels of distillation; `triton.py` launches them and has the formulas."""

import triton
import triton.language as tl

from tlkernels.losses.distillation.call import DIVERGENCES

FORWARD, REVERSE, JS, TV = (tl.constexpr(DIVERGENCES.index(name)) for name in ("forward_kl", "reverse_kl", "js", "tv"))


@triton.jit
def _slopes(p, q, log_p, log_q, beta, DIVERGENCE: tl.constexpr):
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
def _lanes(x, peaks, sums, sums_1, k, HARD: tl.constexpr):
    """Add x to each lane's peak and sums of exponentials, at the temperature and at temperature 1."""
    gap = tl.where(x == peaks, 0.0, tl.abs(x - peaks))
    e = tl.exp(-gap * k)
    sums = tl.where(x > peaks, sums * e + 1, sums + e)
    if HARD:
        e = tl.exp(-gap)
        sums_1 = tl.where(x > peaks, sums_1 * e + 1, sums_1 + e)
    return tl.maximum(peaks, x), sums, sums_1


@triton.jit
def _write_gradients(
    grad_student, grad_teacher, at, stored, counted, c, C, y, p, q, slope_p, slope_q,
    mean_p, mean_q,  # of the slopes by row; None where the divergence's gradient does not need them
    p_1,  # the student's softmax at temperature 1, with HARD
    soft_g, hard_g, smoothing, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Write a tile of the gradients that are given, 0 in rows that do not count."""
    if grad_student is not None:
        if DIVERGENCE == FORWARD:
            d = soft_g * (p - q)
        else:
            d = soft_g * tl.where(p == 0, 0.0, p * (slope_p - mean_p[:, None]))
        if HARD:
            y_1 = tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
            d += hard_g * (p_1 - y_1)
        d = tl.where(counted[:, None], d, 0.0).to(grad_student.dtype.element_ty)
        tl.store(grad_student + at, d, stored, eviction_policy=EVICTION)
    if grad_teacher is not None:
        if DIVERGENCE == REVERSE:
            d = soft_g * (q - p)
        else:
            d = soft_g * tl.where(q == 0, 0.0, q * (slope_q - mean_q[:, None]))
        d = tl.where(counted[:, None], d, 0.0).to(grad_teacher.dtype.element_ty)
        tl.store(grad_teacher + at, d, stored, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["N", "inner"])
def distillation(
    student, teacher,  # logits, (N, C)
    target,  # (N,) class indices, or None
    row_weight,  # (N,), or None for 1
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
    DIVERGENCE: tl.constexpr,  # FORWARD, REVERSE, JS or TV
    HARD: tl.constexpr,  # hard is not 0
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # rows and classes of a tile
):  # fmt: skip
    """Write the losses and gradients of some rows, those that are given."""
    beta, hard, smoothing = tl.full([], beta, T), tl.full([], hard, T), tl.full([], smoothing, T)
    temperature = tl.full([], temperature, T)
    k = 1 / temperature
    row = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    mask = row < N
    counted, bad = mask, mask & False
    y = tl.full([BP], -1, tl.int64)
    if target is not None:
        y = tl.load(target + row, mask, other=0).to(tl.int64)
        counted = mask & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
    row_s = row // inner * s_outer + row % inner * s_inner
    row_t = row // inner * t_outer + row % inner * t_inner
    at_s = row_s[:, None] + classes[None, :].to(tl.int64) * s_class
    at_t = row_t[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (row * C)[:, None] + classes[None, :].to(tl.int64)
    if HARD:
        target_at = row_s + y * s_class
        target_logit = tl.load(student + target_at, counted & (y >= 0) & (y < C), other=0.0).to(T)

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
        s = tl.load(student + at_s, valid, other=float("-inf")).to(T)
        t = tl.load(teacher + at_t, valid, other=float("-inf")).to(T)
        peak_s, peak_t = tl.max(s, 1), tl.max(t, 1)
        p, q = tl.exp((s - peak_s[:, None]) * k), tl.exp((t - peak_t[:, None]) * k)
        sum_s, sum_t = tl.sum(p, 1), tl.sum(q, 1)
        p, q = p * (1 / sum_s)[:, None], q * (1 / sum_t)[:, None]
        p_1 = p
        if HARD:
            p_1 = tl.exp(s - peak_s[:, None])
            sum_1 = tl.sum(p_1, 1)
            p_1 = p_1 * (1 / sum_1)[:, None]
    else:
        peaks_s, peaks_t = tl.full([BP, BC], float("-inf"), T), tl.full([BP, BC], float("-inf"), T)
        sums_s, sums_t, sums_1 = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            valid, far = counted[:, None] & (start + classes < C)[None, :], tl.cast(start, tl.int64)
            s = tl.load(student + at_s + far * s_class, valid, other=float("-inf"), eviction_policy="evict_last").to(T)
            t = tl.load(teacher + at_t + far * t_class, valid, other=float("-inf"), eviction_policy="evict_last").to(T)
            peaks_s, sums_s, sums_1 = _lanes(s, peaks_s, sums_s, sums_1, k, HARD)
            peaks_t, sums_t, _ = _lanes(t, peaks_t, sums_t, sums_t, k, False)
        peak_s, peak_t = tl.max(peaks_s, 1), tl.max(peaks_t, 1)
        sum_s = tl.sum(sums_s * tl.exp((peaks_s - peak_s[:, None]) * k), 1)
        sum_t = tl.sum(sums_t * tl.exp((peaks_t - peak_t[:, None]) * k), 1)
        if HARD:
            sum_1 = tl.sum(sums_1 * tl.exp(peaks_s - peak_s[:, None]), 1)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    if HARD:
        log_1 = tl.log(sum_1)

    DIRECT: tl.constexpr = (grad_student is None or DIVERGENCE == FORWARD) and (
        grad_teacher is None or DIVERGENCE == REVERSE
    )
    soft = (1 - hard) * temperature * temperature
    if WHOLE:
        log_p = (s - peak_s[:, None]) * k - log_s[:, None]
        log_q = (t - peak_t[:, None]) * k - log_t[:, None]
        a, slope_p, slope_q = _slopes(p, q, log_p, log_q, beta, DIVERGENCE)
        mean_p, mean_q = tl.sum(p * slope_p, 1), tl.sum(q * slope_q, 1)
        a *= soft
        if HARD:
            spread = tl.where(valid, hard * smoothing / C * (peak_s[:, None] - s), 0.0)
            a += tl.where(smoothing == 0, 0.0, spread)
        value = tl.sum(a, 1)
    else:
        sums_a, sums_p, sums_q = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            valid = counted[:, None] & (c < C)[None, :]
            s = tl.load(student + at_s + far * s_class, valid, other=float("-inf")).to(T)
            t = tl.load(teacher + at_t + far * t_class, valid, other=float("-inf")).to(T)
            log_p = (s - peak_s[:, None]) * k - log_s[:, None]
            log_q = (t - peak_t[:, None]) * k - log_t[:, None]
            p, q = tl.exp(log_p), tl.exp(log_q)
            a, slope_p, slope_q = _slopes(p, q, log_p, log_q, beta, DIVERGENCE)
            sums_a += soft * a
            if HARD:
                spread = tl.where(valid, hard * smoothing / C * (peak_s[:, None] - s), 0.0)
                sums_a += tl.where(smoothing == 0, 0.0, spread)
            if not DIRECT:
                sums_p += p * slope_p
                sums_q += q * slope_q
            elif grad_student is not None or grad_teacher is not None:
                p_1 = p
                if HARD:
                    p_1 = tl.exp(s - peak_s[:, None] - log_1[:, None])
                _write_gradients(
                    grad_student, grad_teacher, at_g + far, mask[:, None] & (c < C)[None, :], counted, c, C, y, p, q,
                    slope_p, slope_q, None, None, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD, "evict_first",
                )  # fmt: skip
        value, mean_p, mean_q = tl.sum(sums_a, 1), tl.sum(sums_p, 1), tl.sum(sums_q, 1)

    if loss is not None or partial is not None:
        if HARD:
            value += hard * ((1 - smoothing) * (peak_s - target_logit) + log_1)
        value = tl.where(bad, float("nan"), tl.where(counted, value * weight, 0.0))
        if loss is not None:
            tl.store(loss + row, value, mask)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))

    if WHOLE:
        _write_gradients(
            grad_student, grad_teacher, at_g, mask[:, None] & (classes < C)[None, :], counted, classes, C, y, p, q,
            slope_p, slope_q, mean_p, mean_q, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD, "",
        )  # fmt: skip
    elif not DIRECT:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            inside = (c < C)[None, :]
            valid = counted[:, None] & inside
            s = tl.load(student + at_s + far * s_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            t = tl.load(teacher + at_t + far * t_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            log_p = (s - peak_s[:, None]) * k - log_s[:, None]
            log_q = (t - peak_t[:, None]) * k - log_t[:, None]
            p, q = tl.exp(log_p), tl.exp(log_q)
            _, slope_p, slope_q = _slopes(p, q, log_p, log_q, beta, DIVERGENCE)
            p_1 = p
            if HARD:
                p_1 = tl.exp(s - peak_s[:, None] - log_1[:, None])
            _write_gradients(
                grad_student, grad_teacher, at_g + far, mask[:, None] & inside, counted, c, C, y, p, q, slope_p,
                slope_q, mean_p, mean_q, p_1, soft_g, hard_g, smoothing, DIVERGENCE, HARD, "evict_first",
            )  # fmt: skip


@triton.jit
def _second_tile(
    student, teacher, v_student, v_teacher, at_s, at_t, at_v, valid, peak_s, peak_t, log_s, log_t, k, beta,
    DIVERGENCE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's p, q, slopes, directions, and the student's logits minus its peak."""
    s = tl.load(student + at_s, valid, other=float("-inf")).to(T) - peak_s[:, None]
    t = tl.load(teacher + at_t, valid, other=float("-inf")).to(T) - peak_t[:, None]
    log_p, log_q = s * k - log_s[:, None], t * k - log_t[:, None]
    p, q = tl.exp(log_p), tl.exp(log_q)
    _, slope_p, slope_q = _slopes(p, q, log_p, log_q, beta, DIVERGENCE)
    v_s, v_t = tl.zeros(p.shape, T), tl.zeros(p.shape, T)
    if v_student is not None:
        v_s = tl.load(v_student + at_v, valid, other=0.0).to(T)
    if v_teacher is not None:
        v_t = tl.load(v_teacher + at_v, valid, other=0.0).to(T)
    return p, q, slope_p, slope_q, v_s, v_t, s


@triton.jit
def _second_terms(
    p, q, slope_p, slope_q, v_s, v_t, along_p, along_q, mean_p, mean_q, k, beta, DIVERGENCE: tl.constexpr
):
    """Return x_p and x_q: the second derivatives along the directions are x_p - p * sum of x_p, and the same for q."""
    a_p, a_q = (v_s - along_p[:, None]) * k, (v_t - along_q[:, None]) * k  # dp / p and dq / q
    x_p, x_q = p * a_p * (slope_p - mean_p[:, None]), q * a_q * (slope_q - mean_q[:, None])
    if DIVERGENCE == FORWARD:
        x_p = p * a_p - q * a_q
        x_q += q * (a_q - a_p)
    if DIVERGENCE == REVERSE:
        x_q = q * a_q - p * a_p
        x_p += p * (a_p - a_q)
    if DIVERGENCE == JS:
        share_q = tl.where(q == 0, 0.0, beta * tl.exp(slope_q / beta))  # of q in the mixture
        x_p += (1 - beta) * p * share_q * (a_p - a_q)
        x_q += beta * q * (1 - share_q) * (a_q - a_p)
    return x_p, x_q


@triton.jit(do_not_specialize=["N", "inner"])
def second(
    v_student, v_teacher,  # directions, (N, C) contiguous, or None for 0
    grad_rows,  # (N,), the gradients' upstream
    student, teacher,  # logits, (N, C)
    target,  # (N,) class indices, or None
    row_weight,  # (N,), or None for 1
    by_rows,  # result, (N,): the derivative by grad_rows
    by_student, by_teacher,  # results, (N, C) contiguous, or None
    N, inner, C,  # rows, of which row is (row // inner, row % inner); classes
    s_outer, s_inner, s_class,  # strides of student
    t_outer, t_inner, t_class,  # strides of teacher
    ignore_index,
    temperature: tl.float64, beta: tl.float64,  # of the divergence
    hard: tl.float64, smoothing: tl.float64,  # hard_weight and label_smoothing of the cross entropy
    DIVERGENCE: tl.constexpr,  # FORWARD, REVERSE, JS or TV
    HARD: tl.constexpr,  # hard is not 0
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # rows and classes of a tile
):  # fmt: skip
    """Write the derivatives of <v_student, gradient of student> + <v_teacher, gradient of teacher>."""
    beta, hard, smoothing = tl.full([], beta, T), tl.full([], hard, T), tl.full([], smoothing, T)
    temperature = tl.full([], temperature, T)
    k = 1 / temperature
    row = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    mask = row < N
    counted, bad = mask, mask & False
    y = tl.full([BP], -1, tl.int64)
    if target is not None:
        y = tl.load(target + row, mask, other=0).to(tl.int64)
        counted = mask & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
    row_s = row // inner * s_outer + row % inner * s_inner
    row_t = row // inner * t_outer + row % inner * t_inner
    weight = tl.where(bad, float("nan"), 1.0).to(T)
    if row_weight is not None:
        weight *= tl.load(row_weight + row, mask, other=0.0).to(T)
    g = weight * tl.load(grad_rows + row, mask, other=0.0).to(T)

    peaks_s, peaks_t = tl.full([BP, BC], float("-inf"), T), tl.full([BP, BC], float("-inf"), T)
    sums_s, sums_t, sums_1 = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        valid = counted[:, None] & (c < C)[None, :]
        s = tl.load(student + row_s[:, None] + c[None, :] * s_class, valid, other=float("-inf")).to(T)
        t = tl.load(teacher + row_t[:, None] + c[None, :] * t_class, valid, other=float("-inf")).to(T)
        peaks_s, sums_s, sums_1 = _lanes(s, peaks_s, sums_s, sums_1, k, HARD)
        peaks_t, sums_t, _ = _lanes(t, peaks_t, sums_t, sums_t, k, False)
    peak_s, peak_t = tl.max(peaks_s, 1), tl.max(peaks_t, 1)
    log_s = tl.log(tl.sum(sums_s * tl.exp((peaks_s - peak_s[:, None]) * k), 1))
    log_t = tl.log(tl.sum(sums_t * tl.exp((peaks_t - peak_t[:, None]) * k), 1))
    log_1 = tl.log(tl.sum(sums_1 * tl.exp(peaks_s - peak_s[:, None]), 1))

    along_p, along_q, along_1 = tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T)
    mean_p, mean_q, by_soft, by_hard = tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & (c < C)[None, :]
        p, q, slope_p, slope_q, v_s, v_t, s_below_peak = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, peak_s, peak_t, log_s, log_t, k, beta, DIVERGENCE, T,
        )  # fmt: skip
        along_p += tl.sum(p * v_s, 1)
        along_q += tl.sum(q * v_t, 1)
        mean_p += tl.sum(p * slope_p, 1)
        mean_q += tl.sum(q * slope_q, 1)
        by_soft += tl.sum(p * slope_p * v_s + q * slope_q * v_t, 1)
        if DIVERGENCE == FORWARD:
            by_soft += tl.sum((p - q) * v_s, 1)
        if DIVERGENCE == REVERSE:
            by_soft += tl.sum((q - p) * v_t, 1)
        if HARD:
            along_1 += tl.sum(tl.exp(s_below_peak - log_1[:, None]) * v_s, 1)
            y_1 = tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
            by_hard += tl.sum(tl.where(valid, (tl.exp(s_below_peak - log_1[:, None]) - y_1) * v_s, 0.0), 1)
    by_soft -= along_p * mean_p + along_q * mean_q
    by_row = weight * ((1 - hard) * temperature * by_soft + hard * by_hard)
    tl.store(by_rows + row, tl.where(counted, by_row, 0.0), mask)

    sum_p, sum_q = tl.zeros([BP], T), tl.zeros([BP], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & (c < C)[None, :]
        p, q, slope_p, slope_q, v_s, v_t, s_below_peak = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, peak_s, peak_t, log_s, log_t, k, beta, DIVERGENCE, T,
        )  # fmt: skip
        x_p, x_q = _second_terms(
            p, q, slope_p, slope_q, v_s, v_t, along_p, along_q, mean_p, mean_q, k, beta, DIVERGENCE
        )
        sum_p += tl.sum(x_p, 1)
        sum_q += tl.sum(x_q, 1)

    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        inside = (c < C)[None, :]
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & inside
        p, q, slope_p, slope_q, v_s, v_t, s_below_peak = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, peak_s, peak_t, log_s, log_t, k, beta, DIVERGENCE, T,
        )  # fmt: skip
        x_p, x_q = _second_terms(
            p, q, slope_p, slope_q, v_s, v_t, along_p, along_q, mean_p, mean_q, k, beta, DIVERGENCE
        )
        soft_g = ((1 - hard) * temperature * g)[:, None]
        if by_student is not None:
            d = soft_g * (x_p - p * sum_p[:, None])
            if HARD:
                p_1 = tl.exp(s_below_peak - log_1[:, None])
                d += (hard * g)[:, None] * p_1 * (v_s - along_1[:, None])
            d = tl.where(valid, d, 0.0).to(by_student.dtype.element_ty)
            tl.store(by_student + at, d, mask[:, None] & inside)
        if by_teacher is not None:
            d = tl.where(valid, soft_g * (x_q - q * sum_q[:, None]), 0.0).to(by_teacher.dtype.element_ty)
            tl.store(by_teacher + at, d, mask[:, None] & inside)
