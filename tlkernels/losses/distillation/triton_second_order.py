"""The second derivatives of distillation in closed form; `triton.py` launches the kernel."""

import triton
import triton.language as tl

from tlkernels.losses.distillation.triton_kernels import (
    FORWARD,
    JS,
    REVERSE,
    hard_gradient,
    lanes,
    load,
    of_x,
    slopes,
    soft_gradient,
)


@triton.jit
def _times_slope(d, f, cap, valid):
    """Return d times the derivative of x by the logit."""
    if cap is not None:
        d *= tl.where(valid, (1 - f) * (1 + f), 0.0)
    return d


@triton.jit
def _second_tile(
    student, teacher, v_student, v_teacher, at_s, at_t, at_v, valid, s_cap, t_cap, peak_s, peak_t, log_s, log_t, k,
    beta, DIVERGENCE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's p, q, slopes, directions by x, both f, and the student's x minus its peak."""
    s, t = load(student + at_s, valid, s_cap, T, ""), load(teacher + at_t, valid, t_cap, T, "")
    d_s, d_t = of_x(s - peak_s[:, None], s_cap), of_x(t - peak_t[:, None], t_cap)
    log_p, log_q = d_s * k - log_s[:, None], d_t * k - log_t[:, None]
    p, q = tl.exp(log_p), tl.exp(log_q)
    _, slope_p, slope_q = slopes(p, q, log_p, log_q, beta, DIVERGENCE)
    v_s, v_t = tl.zeros(p.shape, T), tl.zeros(p.shape, T)
    if v_student is not None:
        v_s = _times_slope(tl.load(v_student + at_v, valid, other=0.0).to(T), s, s_cap, valid)
    if v_teacher is not None:
        v_t = _times_slope(tl.load(v_teacher + at_v, valid, other=0.0).to(T), t, t_cap, valid)
    return p, q, slope_p, slope_q, v_s, v_t, s, t, d_s


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
    s_softcap: tl.float64, t_softcap: tl.float64,  # of both sides
    DIVERGENCE: tl.constexpr,  # FORWARD, REVERSE, JS or TV
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,  # whether these are used
    HARD: tl.constexpr,  # hard is not 0
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # rows and classes of a tile
):  # fmt: skip
    """Write the derivatives of <v_student, gradient of student> + <v_teacher, gradient of teacher>.

    With x(logit) after the softcap and G the gradients by x, the gradient by a logit is x' * G. So that of <v, x' * G>
    is x' * (the derivative of <v * x', G> by x) + v * x'' * G, and x'' = -2 / softcap * f * x'.
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
    weight = tl.where(bad, float("nan"), 1.0).to(T)
    if row_weight is not None:
        weight *= tl.load(row_weight + row, mask, other=0.0).to(T)
    g = weight * tl.load(grad_rows + row, mask, other=0.0).to(T)

    peaks_s, peaks_t = tl.full([BP, BC], float("-inf"), T), tl.full([BP, BC], float("-inf"), T)
    sums_s, sums_t, sums_1 = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        valid = counted[:, None] & (c < C)[None, :]
        s = load(student + row_s[:, None] + c[None, :] * s_class, valid, s_cap, T, "")
        t = load(teacher + row_t[:, None] + c[None, :] * t_class, valid, t_cap, T, "")
        peaks_s, sums_s, sums_1 = lanes(s, s_cap, peaks_s, sums_s, sums_1, k, HARD)
        peaks_t, sums_t, _ = lanes(t, t_cap, peaks_t, sums_t, sums_t, k, False)
    peak_s, peak_t = tl.max(peaks_s, 1), tl.max(peaks_t, 1)
    down_s, down_t = of_x(peaks_s - peak_s[:, None], s_cap), of_x(peaks_t - peak_t[:, None], t_cap)
    log_s = tl.log(tl.sum(sums_s * tl.exp(down_s * k), 1))
    log_t = tl.log(tl.sum(sums_t * tl.exp(down_t * k), 1))
    log_1 = tl.log(tl.sum(sums_1 * tl.exp(down_s), 1))

    along_p, along_q, along_1 = tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T)
    mean_p, mean_q, by_soft, by_hard = tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T), tl.zeros([BP], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & (c < C)[None, :]
        p, q, slope_p, slope_q, v_s, v_t, s, t, d_s = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, s_cap, t_cap, peak_s, peak_t, log_s, log_t, k, beta,
            DIVERGENCE, T,
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
            p_1 = tl.exp(d_s - log_1[:, None])
            along_1 += tl.sum(p_1 * v_s, 1)
            by_hard += tl.sum(tl.where(valid, hard_gradient(p_1, c, C, y, smoothing) * v_s, 0.0), 1)
    by_soft -= along_p * mean_p + along_q * mean_q
    by_row = weight * ((1 - hard) * temperature * by_soft + hard * by_hard)
    tl.store(by_rows + row, tl.where(counted, by_row, 0.0), mask)

    sum_p, sum_q = tl.zeros([BP], T), tl.zeros([BP], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & (c < C)[None, :]
        p, q, slope_p, slope_q, v_s, v_t, s, t, d_s = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, s_cap, t_cap, peak_s, peak_t, log_s, log_t, k, beta,
            DIVERGENCE, T,
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
        p, q, slope_p, slope_q, v_s, v_t, s, t, d_s = _second_tile(
            student, teacher, v_student, v_teacher, row_s[:, None] + c[None, :] * s_class,
            row_t[:, None] + c[None, :] * t_class, at, valid, s_cap, t_cap, peak_s, peak_t, log_s, log_t, k, beta,
            DIVERGENCE, T,
        )  # fmt: skip
        x_p, x_q = _second_terms(
            p, q, slope_p, slope_q, v_s, v_t, along_p, along_q, mean_p, mean_q, k, beta, DIVERGENCE
        )
        soft_g = ((1 - hard) * temperature * g)[:, None]
        if by_student is not None:
            d = soft_g * (x_p - p * sum_p[:, None])
            if HARD:
                p_1 = tl.exp(d_s - log_1[:, None])
                d += (hard * g)[:, None] * p_1 * (v_s - along_1[:, None])
            if s_cap is not None:
                by_x = soft_g * soft_gradient(p, q, slope_p, mean_p, DIVERGENCE == FORWARD)
                if HARD:
                    by_x += (hard * g)[:, None] * hard_gradient(p_1, c, C, y, smoothing)
                d = _times_slope(d, s, s_cap, valid) - 2 / s_cap * s * v_s * by_x
            d = tl.where(valid, d, 0.0).to(by_student.dtype.element_ty)
            tl.store(by_student + at, d, mask[:, None] & inside)
        if by_teacher is not None:
            d = soft_g * (x_q - q * sum_q[:, None])
            if t_cap is not None:
                by_x = soft_g * soft_gradient(q, p, slope_q, mean_q, DIVERGENCE == REVERSE)
                d = _times_slope(d, t, t_cap, valid) - 2 / t_cap * t * v_t * by_x
            d = tl.where(valid, d, 0.0).to(by_teacher.dtype.element_ty)
            tl.store(by_teacher + at, d, mask[:, None] & inside)
