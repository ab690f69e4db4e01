"""Kernels of distillation for GPUs.

With p the student's and q the teacher's softmax at the temperature, D = sum of a_c, where slope_p = dD/dp but for a
constant, and the same for q:

    forward KL    a = q * slope_q                  slope_q = log q - log p
    reverse KL    a = p * slope_p                  slope_p = log p - log q
    js            a = p * slope_p + q * slope_q    slope_p = (1 - beta) * log(p / m), slope_q = beta * log(q / m)
    tv            a = |p - q| / 2                  slope_p = sign(p - q) / 2 = -slope_q

    T * dD/dstudent = p * (slope_p - sum of p * slope_p), and p - q for the forward KL; the teacher's alike

Bytes. Up to a table's limit both rows are in registers: each tensor of logits is read once, each gradient written once.
A longer row is swept again by the same program, which finds it in L2 as long as both rows of every multiprocessor fit
there (H200: 132 times two rows of 32000 bfloat16 are 17 MB of 50): the first sweep finds peaks and sums, the second the
divergence, and with it the gradient where that needs no sum over the row (the student's of the forward KL, the
teacher's of the reverse); else a third writes it. Ignored rows are not read.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, check_classes, launch
from tlkernels._core.triton_kernels import DTYPES, count, sum_of
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
        apart = log_p - log_q
        ratio = tl.exp(-tl.abs(apart))
        more = -tl.log(tl.where(apart > 0, 1 - beta + beta * ratio, beta + (1 - beta) * ratio))
        slope_p = tl.where(p == 0, 0.0, (1 - beta) * (more + tl.minimum(apart, 0.0)))
        slope_q = tl.where(q == 0, 0.0, beta * (more - tl.maximum(apart, 0.0)))
    a = p * slope_p + q * slope_q
    if DIVERGENCE == TV:
        slope_p = tl.where(p > q, 0.5, tl.where(p < q, -0.5, p - q))  # NaN stays NaN
        slope_q = -slope_p
        a = tl.abs(p - q) / 2
    return a, slope_p, slope_q


@triton.jit
def _lanes(x, peaks, sums, sums_1, k, HARD: tl.constexpr):
    """Return each lane's peak and sums of exponentials, at the temperature and at 1, with x among them."""
    apart = tl.where(x == peaks, 0.0, tl.abs(x - peaks))
    e = tl.exp(-apart * k)
    sums = tl.where(x > peaks, sums * e + 1, sums + e)
    if HARD:
        e = tl.exp(-apart)
        sums_1 = tl.where(x > peaks, sums_1 * e + 1, sums_1 + e)
    return tl.maximum(peaks, x), sums, sums_1


@triton.jit
def _distillation(
    student, teacher, target, row_weight,
    upstream,  # of each row, or None for 1
    divisor,  # of every upstream, 0-d, or None for 1
    loss,  # of each row, or None
    partial,  # the sum of each program's rows, or None
    grad_student, grad_teacher,  # contiguous, or None; may be the logits
    N, inner, C, s_outer, s_inner, s_class, t_outer, t_inner, t_class, ignore_index,
    factor: tl.float64, temperature: tl.float64, beta: tl.float64, hard: tl.float64, smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, WHOLE: tl.constexpr, T: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    beta, hard, smoothing = tl.full([], beta, T), tl.full([], hard, T), tl.full([], smoothing, T)
    temperature = tl.full([], temperature, T)
    k = 1 / temperature
    row = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    here = row < N
    counted, bad = here, here & False
    y = tl.full([BP], -1, tl.int64)
    if target is not None:
        y = tl.load(target + row, here, other=0).to(tl.int64)
        counted = here & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
    row_s = row // inner * s_outer + row % inner * s_inner
    row_t = row // inner * t_outer + row % inner * t_inner
    at_s = row_s[:, None] + classes[None, :].to(tl.int64) * s_class
    at_t = row_t[:, None] + classes[None, :].to(tl.int64) * t_class
    at_g = (row * C)[:, None] + classes[None, :].to(tl.int64)
    if HARD:
        own_at = row_s + y * s_class
        own_logit = tl.load(student + own_at, counted & (y >= 0) & (y < C), other=0.0).to(T)

    g = tl.full([BP], factor, T)
    if divisor is not None:
        g /= tl.load(divisor).to(T)
    if upstream is not None:
        g *= tl.load(upstream + row, here, other=0.0).to(T)
    weight = tl.full([BP], 1.0, T)
    if row_weight is not None:
        weight = tl.load(row_weight + row, here, other=0.0).to(T)
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
                stored = here[:, None] & (c < C)[None, :]
                if grad_student is not None:
                    d = soft_g * (p - q)
                    if HARD:
                        y_1 = tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
                        d += hard_g * (tl.exp(s - peak_s[:, None] - log_1[:, None]) - y_1)
                    d = tl.where(counted[:, None], d, 0.0).to(grad_student.dtype.element_ty)
                    tl.store(grad_student + at_g + far, d, stored, eviction_policy="evict_first")
                if grad_teacher is not None:
                    d = tl.where(counted[:, None], soft_g * (q - p), 0.0).to(grad_teacher.dtype.element_ty)
                    tl.store(grad_teacher + at_g + far, d, stored, eviction_policy="evict_first")
        value, mean_p, mean_q = tl.sum(sums_a, 1), tl.sum(sums_p, 1), tl.sum(sums_q, 1)

    if loss is not None or partial is not None:
        if HARD:
            value += hard * ((1 - smoothing) * (peak_s - own_logit) + log_1)
        value = tl.where(bad, float("nan"), tl.where(counted, value * weight, 0.0))
        if loss is not None:
            tl.store(loss + row, value, here)
        if partial is not None:
            tl.store(partial + tl.program_id(0), tl.sum(value, 0))

    if WHOLE:
        stored = here[:, None] & (classes < C)[None, :]
        if grad_student is not None:
            if DIVERGENCE == FORWARD:
                d = soft_g * (p - q)
            else:
                d = soft_g * tl.where(p == 0, 0.0, p * (slope_p - mean_p[:, None]))
            if HARD:
                y_1 = tl.where(classes[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
                d += hard_g * (p_1 - y_1)
            d = tl.where(counted[:, None], d, 0.0).to(grad_student.dtype.element_ty)
            tl.store(grad_student + at_g, d, stored)
        if grad_teacher is not None:
            if DIVERGENCE == REVERSE:
                d = soft_g * (q - p)
            else:
                d = soft_g * tl.where(q == 0, 0.0, q * (slope_q - mean_q[:, None]))
            tl.store(grad_teacher + at_g, tl.where(counted[:, None], d, 0.0).to(grad_teacher.dtype.element_ty), stored)
    elif not DIRECT:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            inside = (c < C)[None, :]
            valid, stored = counted[:, None] & inside, here[:, None] & inside
            s = tl.load(student + at_s + far * s_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            t = tl.load(teacher + at_t + far * t_class, valid, other=float("-inf"), eviction_policy="evict_first").to(T)
            log_p = (s - peak_s[:, None]) * k - log_s[:, None]
            log_q = (t - peak_t[:, None]) * k - log_t[:, None]
            p, q = tl.exp(log_p), tl.exp(log_q)
            _, slope_p, slope_q = _slopes(p, q, log_p, log_q, beta, DIVERGENCE)
            if grad_student is not None:
                if DIVERGENCE == FORWARD:
                    d = soft_g * (p - q)
                else:
                    d = soft_g * tl.where(p == 0, 0.0, p * (slope_p - mean_p[:, None]))
                if HARD:
                    y_1 = tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
                    d += hard_g * (tl.exp(s - peak_s[:, None] - log_1[:, None]) - y_1)
                d = tl.where(counted[:, None], d, 0.0).to(grad_student.dtype.element_ty)
                tl.store(grad_student + at_g + far, d, stored, eviction_policy="evict_first")
            if grad_teacher is not None:
                if DIVERGENCE == REVERSE:
                    d = soft_g * (q - p)
                else:
                    d = soft_g * tl.where(q == 0, 0.0, q * (slope_q - mean_q[:, None]))
                d = tl.where(counted[:, None], d, 0.0).to(grad_teacher.dtype.element_ty)
                tl.store(grad_teacher + at_g + far, d, stored, eviction_policy="evict_first")


@triton.jit
def _second_tile(
    student, teacher, v_student, v_teacher, at_s, at_t, at_v, valid, peak_s, peak_t, log_s, log_t, k, beta,
    DIVERGENCE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's p, q, slopes, directions and the student's logits under its peak."""
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


@triton.jit
def _second(
    v_student, v_teacher, grad_rows, student, teacher, target, row_weight, by_rows, by_student, by_teacher,
    N, inner, C, s_outer, s_inner, s_class, t_outer, t_inner, t_class, ignore_index,
    temperature: tl.float64, beta: tl.float64, hard: tl.float64, smoothing: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    beta, hard, smoothing = tl.full([], beta, T), tl.full([], hard, T), tl.full([], smoothing, T)
    temperature = tl.full([], temperature, T)
    k = 1 / temperature
    row = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    classes = tl.arange(0, BC)
    here = row < N
    counted, bad = here, here & False
    y = tl.full([BP], -1, tl.int64)
    if target is not None:
        y = tl.load(target + row, here, other=0).to(tl.int64)
        counted = here & (y != ignore_index)
        bad = counted & ((y < 0) | (y >= C))
    row_s = row // inner * s_outer + row % inner * s_inner
    row_t = row // inner * t_outer + row % inner * t_inner
    weight = tl.where(bad, float("nan"), 1.0).to(T)
    if row_weight is not None:
        weight *= tl.load(row_weight + row, here, other=0.0).to(T)
    g = weight * tl.load(grad_rows + row, here, other=0.0).to(T)

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
        p, q, slope_p, slope_q, v_s, v_t, under = _second_tile(
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
            along_1 += tl.sum(tl.exp(under - log_1[:, None]) * v_s, 1)
            y_1 = tl.where(c[None, :] == y[:, None], 1 - smoothing, 0.0) + smoothing / C
            by_hard += tl.sum(tl.where(valid, (tl.exp(under - log_1[:, None]) - y_1) * v_s, 0.0), 1)
    by_soft -= along_p * mean_p + along_q * mean_q
    by_row = weight * ((1 - hard) * temperature * by_soft + hard * by_hard)
    tl.store(by_rows + row, tl.where(counted, by_row, 0.0), here)

    sum_p, sum_q = tl.zeros([BP], T), tl.zeros([BP], T)
    for start in range(0, C, BC):
        c = tl.cast(start, tl.int64) + classes
        at, valid = (row * C)[:, None] + c[None, :], counted[:, None] & (c < C)[None, :]
        p, q, slope_p, slope_q, v_s, v_t, under = _second_tile(
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
        p, q, slope_p, slope_q, v_s, v_t, under = _second_tile(
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
                p_1 = tl.exp(under - log_1[:, None])
                d += (hard * g)[:, None] * p_1 * (v_s - along_1[:, None])
            d = tl.where(valid, d, 0.0).to(by_student.dtype.element_ty)
            tl.store(by_student + at, d, here[:, None] & inside)
        if by_teacher is not None:
            d = tl.where(valid, soft_g * (x_q - q * sum_q[:, None]), 0.0).to(by_teacher.dtype.element_ty)
            tl.store(by_teacher + at, d, here[:, None] & inside)


# By the number of classes. 2026-11-21, by reasoning and from the compiler's report, unmeasured: as cross entropy's,
# with two tensors in registers.
TABLE = Table(
    "distillation",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("gfx*", 0, 1024, {"WHOLE": 1, "ELEMENTS": 1024}, 2),  # 64 lanes in a warp
    Config("gfx*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 4),
    Config("gfx*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("gfx*", 8, None, {"WHOLE": 0, "ELEMENTS": 1024}, 8),
    Config("gfx*", 2, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("gfx*", 2, None, {"WHOLE": 0, "ELEMENTS": 4096}, 8),
    Config("gfx*", 4, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("gfx*", 4, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),
    Config("*", 0, 1024, {"WHOLE": 1, "ELEMENTS": 1024}, 4),
    Config("*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 8),
    Config("*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 16),
    Config("*", 8, None, {"WHOLE": 0, "ELEMENTS": 1024}, 16),
    Config("*", 0, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("sm_100", 2, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),  # 16 warps spill there; its L2 has room for more rows
    Config("*", 2, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("*", 4, None, {"WHOLE": 0, "ELEMENTS": 2048}, 16),
)


_SECOND = Table(
    "distillation, second derivative",
    Config("interpreter", 0, None, {"ELEMENTS": 512}, 1),
    Config("gfx*", 0, None, {"ELEMENTS": 1024}, 2),
    Config("sm_100", 0, None, {"ELEMENTS": 512}, 4),  # 8 for a thread spill there
    Config("*", 0, None, {"ELEMENTS": 1024}, 4),
)


def _rows(*tensors: Tensor) -> tuple[int | None, list[int]]:
    """Return the number of rows behind the first axis, or of all, and each tensor's strides along both and classes.

    None for the number if that does not describe a tensor.
    """
    shape = tensors[0].shape
    merged = [_merged(tensor.shape[:-1], tensor.stride()[:-1]) for tensor in tensors]
    if None not in merged:
        whole = [(0, each, tensor.stride(-1)) for each, tensor in zip(merged, tensors, strict=True)]
        return shape[:-1].numel(), [stride or 0 for strides in whole for stride in strides]
    behind = [_merged(tensor.shape[1:-1], tensor.stride()[1:-1]) for tensor in tensors]
    if None in behind:
        return None, []
    split = [(tensor.stride(0), each, tensor.stride(-1)) for each, tensor in zip(behind, tensors, strict=True)]
    return shape[1:-1].numel(), [stride or 0 for strides in split for stride in strides]


def _merged(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride along axes as if they were one, or None."""
    axes = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, outer), (size, stride) in pairwise(axes):
        if outer != size * stride:
            return None
    return axes[-1][1] if axes else 1


def sweep(
    student: Tensor, teacher: Tensor, target: Tensor | None, row_weight: Tensor | None, temperature: float,
    divergence: str, beta: float, hard_weight: float, ignore_index: int, label_smoothing: float, *,
    grad_student: Tensor | None = None, grad_teacher: Tensor | None = None, factor: float = 1.0,
    divisor: Tensor | None = None, upstream: Tensor | None = None, loss: Tensor | None = None,
    total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results; those with a number for each row are contiguous.

    Args:
        grad_student, grad_teacher: of the logits' shape, contiguous, for upstream * factor / divisor of the rows; may
            be the logits themselves.
        factor, divisor: a number, and a 0-d tensor.
        upstream: a number for each row.
        loss: of each row.
        total: 0-d, factor * sum of the rows / divisor.
    """
    classes = student.shape[-1]
    if target is not None:
        check_classes(target, classes, ignore_index)
    inner, strides = _rows(student, teacher)
    if inner is None:  # more strides along the rows than two
        student, teacher = student.contiguous(), teacher.contiguous()
        inner, strides = _rows(student, teacher)
    rows = student.shape[:-1].numel()
    T = compute_dtype(student, teacher)
    wide = compute_dtype(student, teacher).itemsize == 8
    itemsize = 8 if wide else max(student.element_size(), teacher.element_size())
    # The Jensen-Shannon divergence has more in registers, as if the row were longer.
    held = classes * (2 if divergence == "js" else 1)
    target, row_weight, upstream = (x if x is None else x.contiguous() for x in (target, row_weight, upstream))
    heavy = divergence == "js" or hard_weight != 0 or (grad_student is not None and grad_teacher is not None)

    def launches(config: Config) -> None:
        if heavy and not config.meta["WHOLE"]:  # the same for each thread, but room for twice as many registers
            meta = {"WHOLE": 0, "ELEMENTS": config.meta["ELEMENTS"] // 2}
            config = config._replace(meta=meta, num_warps=max(1, config.num_warps // 2))
        BP, BC = 1, config.meta["ELEMENTS"]
        if config.meta["WHOLE"]:
            BC = triton.next_power_of_2(classes)
            BP = max(
                1, min(config.meta["ELEMENTS"] // triton.next_power_of_2(held), triton.next_power_of_2(max(1, rows)))
            )
        programs = triton.cdiv(rows, BP)
        partial = None if total is None else student.new_empty(programs, dtype=T)
        launch(
            _distillation, (programs,), student, teacher, target, row_weight, upstream, divisor, loss, partial,
            grad_student, grad_teacher, rows, inner, classes, *strides, ignore_index, factor, temperature, beta,
            hard_weight, label_smoothing, DIVERGENCE=DIVERGENCES.index(divergence), HARD=hard_weight != 0,
            WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    repeatable = grad_student is not student and grad_teacher is not teacher
    TABLE.run(student.device, itemsize, held, launches, repeatable)


def forward(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    """Return the loss of each row."""
    loss = torch.empty(student.shape[:-1], dtype=compute_dtype(student, teacher), device=student.device)
    sweep(student, teacher, *options, loss=loss)
    return loss


def backward(grad_rows: Tensor, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of both logits, without elements where not needed."""
    *options, needs_student, needs_teacher = rest
    grads, given = _gradients(student, teacher, needs_student, needs_teacher)
    sweep(student, teacher, *options, **given, upstream=grad_rows)
    return grads


def step(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced loss and the gradients."""
    *options, mean, needs_student, needs_teacher = rest
    target, ignore_index = options[0], options[6]
    grads, given = _gradients(student, teacher, needs_student, needs_teacher)
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    divisor, factor = None, 1.0
    if mean and target is None:
        rows = student.shape[:-1].numel()
        factor = 1 / rows if rows else float("inf")
    elif mean:
        divisor = count(target, student.shape[-1], None, ignore_index)
    sweep(student, teacher, *options, **given, factor=factor, divisor=divisor, total=loss)
    return loss, *grads


def _gradients(
    student: Tensor, teacher: Tensor, needs_student: bool, needs_teacher: bool
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Return contiguous gradients, without elements where not needed, and those that are needed by name."""
    first = student.new_empty(student.shape if needs_student else (0,))
    second = teacher.new_empty(teacher.shape if needs_teacher else (0,))
    named: dict[str, Any] = {"grad_student": first} if needs_student else {}
    return (first, second), {**named, "grad_teacher": second} if needs_teacher else named


def second(
    v_student: Tensor | None, v_teacher: Tensor | None, grad_rows: Tensor, student: Tensor, teacher: Tensor,
    target: Tensor | None, row_weight: Tensor | None, temperature: float, divergence: str, beta: float,
    hard_weight: float, ignore_index: int, label_smoothing: float, needs_student: bool, needs_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <v, the gradients for grad_rows> by grad_rows, student and teacher.

    With X the terms of `_second_terms`: each is a row of the Hessian of D times the directions, in closed form. The
    rows are swept four times, all but the first time from L2; no sweep holds more than a tile.
    """
    inner, strides = _rows(student, teacher)
    if inner is None:
        student, teacher = student.contiguous(), teacher.contiguous()
        inner, strides = _rows(student, teacher)
    rows, classes = student.shape[:-1].numel(), student.shape[-1]
    T = compute_dtype(student, teacher)
    (by_student, by_teacher), _ = _gradients(student, teacher, needs_student, needs_teacher)
    by_rows = torch.empty(student.shape[:-1], dtype=T, device=student.device)
    grad_rows = grad_rows.contiguous()
    v_student, v_teacher, target, row_weight = (
        x if x is None else x.contiguous() for x in (v_student, v_teacher, target, row_weight)
    )
    config = _SECOND.find(student.device, T.itemsize, classes)
    BC = min(config.meta["ELEMENTS"], triton.next_power_of_2(classes))
    BP = min(config.meta["ELEMENTS"] // BC, triton.next_power_of_2(max(1, rows)))
    launch(
        _second, (triton.cdiv(rows, BP),), v_student, v_teacher, grad_rows, student, teacher, target, row_weight,
        by_rows, by_student if needs_student else None, by_teacher if needs_teacher else None, rows, inner, classes,
        *strides, ignore_index, temperature, beta, hard_weight, label_smoothing,
        DIVERGENCE=DIVERGENCES.index(divergence), HARD=hard_weight != 0, T=DTYPES[T], BP=BP, BC=BC,
        config=config._replace(meta={}),
    )  # fmt: skip
    return by_rows, by_student, by_teacher


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the table."""
    wide = {"_distillation": ("LDG.E.128", "STG.E.128")}

    def logits(classes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((4096, classes), dtype=dtype, device="meta")

    plain = (None, None, 2.0, "forward_kl", 0.5, 0.0, -100, 0.0, True)
    for dtype, *sizes in (
        (torch.bfloat16, 1024, 2048, 4096, 8192, 32000),
        (torch.float32, 8192, 32000),
        (torch.float64, 4096, 32000),
    ):
        for classes in sizes:
            x = logits(classes, dtype)
            yield Example(f"step-{classes}-{dtype}", partial(step, x, x, *plain, True, False), wide)
    target = torch.empty((4096,), dtype=torch.int64, device="meta")
    rows = torch.empty((4096,), dtype=torch.float32, device="meta")
    for divergence in DIVERGENCES:
        options = (target, rows, 2.0, divergence, 0.3, 0.5, -100, 0.1)
        for classes in (8192, 32000):
            x = logits(classes, torch.bfloat16)
            yield Example(f"{divergence}-{classes}", partial(backward, rows, x, x, *options, True, True), wide)
        yield Example(
            f"second-{divergence}",
            partial(second, x, x, rows, x, x, *options, True, True),
            {"_second": wide["_distillation"]},
            {
                (
                    "_second",
                    "sm_100",
                    "LDG.E.128",
                ): "half as wide: what it reads is in L2, and registers are what is short"
            },
        )
    x = logits(32000, torch.bfloat16)
    yield Example("losses", partial(forward, x, x, *plain[:-1]), {"_distillation": ("LDG.E.128",)})
