"""Kernels of cross entropy for GPUs.

Positions are laid out as (outer, P) and classes along a third axis, so that one kernel serves rows, channels-first
images and any strides that merge into these three.

Bytes. Up to a table's limit a tile of whole rows is in registers: the logits are read once, the gradient is written
once. A longer row is swept twice by one program: the first sweep reads it from memory and finds its peak and sum, lane
by lane with one exponential for each logit; the second reads it again, from L2 as long as a row for each multiprocessor
fits there (H200: 132 rows of 128256 bfloat16 are 34 MB of 50), and writes the gradient. Where only the losses of class
indices are asked for, there is no second sweep. Ignored rows are not read.

`second_order.py` has the formulas; q, Q, p, a are those of its first lines.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, check_classes, launch
from tlkernels._core.triton_kernels import DTYPES, count, sum_of, tanh_and_slope


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
def _sweep(
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
            kept = here
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
def _directional(
    direction, grad_loss, grad_lse, input, target, weight, v_loss, v_lse, v_input, v_target,
    P, C, x_outer, x_pos, x_class, v_outer, v_pos, v_class, o_outer, o_pos, o_class, t_outer, t_pos, t_class,
    u_outer, u_pos, u_class, ignore_index,
    smoothing: tl.float64, temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
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


# By the number of classes, where classes or where positions are next to each other. 2026-11-21, by reasoning and from
# the compiler's report, unmeasured: 16 to 64 logits for a thread, as many as registers allow without spills, so that a
# row's loads are all on their way before the first is used; a long row has 1024 threads, one program for a
# multiprocessor, so that what is to be read again is one row for each.
ROWS = Table(
    "cross_entropy rows",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 4),
    Config("*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("sm_120", 8, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),  # 8192 spill there
    Config("*", 0, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("*", 8, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("sm_120", 4, 16384, {"WHOLE": 1, "ELEMENTS": 16384}, 16),  # 32768 spill there
    Config("sm_120", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 32),
    Config("*", 0, 32768, {"WHOLE": 1, "ELEMENTS": 32768}, 16),
    Config("gfx*", 2, None, {"WHOLE": 0, "ELEMENTS": 8192}, 16),  # 64 lanes in a warp: 1024 threads
    Config("gfx*", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("*", 2, None, {"WHOLE": 0, "ELEMENTS": 8192}, 32),
    Config("*", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 32),
)
COLUMNS = Table(
    "cross_entropy columns",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("*", 0, 64, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("gfx*", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 4),
    Config("*", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),
)


def _halved(row: Config) -> Config:
    meta = {"WHOLE": 0, "ELEMENTS": row.meta["ELEMENTS"] // 2}
    return row._replace(meta=meta, num_warps=max(1, row.num_warps // 2))


# The second derivative holds twice as much of a tile.
_SECOND, _SECOND_COLUMNS = (
    Table(
        f"{table.name}, second derivative",
        *(row if row.meta["WHOLE"] else _halved(row) for row in table.rows),
    )
    for table in (ROWS, COLUMNS)
)


class Positions(NamedTuple):
    """How a tensor of logits lies in memory: numbers of outer, inner positions and classes, and strides along them."""

    outer: int
    inner: int
    classes: int
    strides: tuple[tuple[int, int, int], ...]
    """Of each tensor."""


def _merged(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return strides along the first axis, all axes behind the second as one, and the second; None if they differ."""
    if tensor.dim() == 1:
        return 0, 0, tensor.stride(0)
    first, classes, *behind = tensor.stride()
    if not behind:
        return 0, first, classes
    inner = next(
        (stride for size, stride in zip(reversed(tensor.shape[2:]), reversed(behind), strict=True) if size > 1), 1
    )
    expected = inner
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(behind), strict=True):
        if size > 1 and stride != expected:
            return None
        expected = stride * size if size > 1 else expected
    return first, inner, classes


def positions(*tensors: Tensor) -> Positions | None:
    """Return how the tensors, of one shape, lie in memory, or None if one has too many different strides."""
    shape = tensors[0].shape
    strides = [_merged(tensor) for tensor in tensors]
    if len(shape) < 3:
        return Positions(1, shape[0] if len(shape) == 2 else 1, shape[-1], tuple(s for s in strides if s))
    inner = shape[2:].numel()
    found = tuple(s for s in strides if s)
    if len(found) < len(strides):
        return None
    if all(first == inner * each or shape[0] == 1 for first, each, _ in found):
        return Positions(1, shape[0] * inner, shape[1], found)
    return Positions(shape[0], inner, shape[1], found)


def sweep(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, temperature: float,
    softcap: float | None, z_loss: float, *, grad: Tensor | None = None, factor: float = 1.0,
    divisor: Tensor | None = None, upstream: Tensor | None = None, upstream_lse: Tensor | None = None,
    loss: Tensor | None = None, peak: Tensor | None = None, log_sum: Tensor | None = None,
    entropy: Tensor | None = None, correct: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results; those with a number for each position are contiguous, as `target` indices are.

    Args:
        grad: of the input's shape, for upstream * factor / divisor of the losses; may be the input itself.
        factor, divisor: a number, and a 0-d tensor.
        upstream, upstream_lse: a number for each position.
        loss, peak, log_sum, entropy, correct: as of the ops.
        total: 0-d, factor * sum of the losses / divisor.
    """
    probabilities = target.is_floating_point()
    classes = input.shape[min(input.dim() - 1, 1)]
    if not probabilities:
        check_classes(target, classes, ignore_index)
        target = target.contiguous()
    arranged = [input] + ([grad] if grad is not None else []) + ([target] if probabilities else [])
    lying = positions(*arranged)
    if lying is None:  # a layout that three strides do not describe
        copy = None if grad is None else torch.empty_like(input, memory_format=torch.contiguous_format)
        sweep(
            input.contiguous(), target.contiguous(), weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss, grad=copy, factor=factor, divisor=divisor, upstream=upstream, upstream_lse=upstream_lse, loss=loss,
            peak=peak, log_sum=log_sum, entropy=entropy, correct=correct, total=total,
        )  # fmt: skip
        if grad is not None and copy is not None:
            grad.copy_(copy)
        return
    P = lying.inner
    x_outer, x_pos, x_class = lying.strides[0]
    columns = x_pos == 1 and x_class != 1 and P > 1
    # What is held beside the logits counts as if the row were longer.
    held = classes * (4 if softcap else 2 if probabilities or label_smoothing or entropy is not None else 1)
    T = compute_dtype(input)

    def launches(config: Config) -> None:
        BP, BC = _tile(config, P, classes, columns, held)
        programs = lying.outer * triton.cdiv(P, BP)
        partial = None if total is None else input.new_empty(programs, dtype=T)
        launch(
            _sweep, (programs,), input, target, weight, _rows(upstream), _rows(upstream_lse), divisor, loss, peak,
            log_sum, entropy, correct, partial, grad, P, classes, x_outer, x_pos, x_class,
            *(lying.strides[-1] if probabilities else (P, 1, 0)),
            *(lying.strides[1] if grad is not None else (0, 0, 0)),
            ignore_index, factor, label_smoothing, temperature, softcap or 1.0, z_loss, PROBABILITIES=probabilities,
            SMOOTHING=label_smoothing != 0, SOFTCAP=softcap is not None, Z_LOSS=z_loss != 0,
            WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    (COLUMNS if columns else ROWS).run(input.device, input.element_size(), held, launches, repeatable=grad is not input)


def _tile(config: Config, P: int, classes: int, columns: bool, held: int) -> tuple[int, int]:
    """Return a tile's positions and classes."""
    elements, most = config.meta["ELEMENTS"], triton.next_power_of_2(max(P, 1))
    if config.meta["WHOLE"]:
        BC = triton.next_power_of_2(max(classes, 1))
        return max(1, min(elements // triton.next_power_of_2(max(held, 1)), most)), BC
    BP = min(64, most) if columns else 1
    return BP, elements // BP


def _rows(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _each(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    return torch.empty(shape, dtype=dtype or compute_dtype(input), device=input.device)


def forward(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak and log_sum of each position."""
    loss, peak, log_sum = _each(input), _each(input), _each(input)
    sweep(input, target, *options, loss=loss, peak=peak, log_sum=log_sum)
    return loss, peak, log_sum


def forward_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak, log_sum, entropy and correctness of each position."""
    loss, peak, log_sum, entropy = (_each(input) for _ in range(4))
    correct = _each(input, torch.bool)
    sweep(input, target, *options, loss=loss, peak=peak, log_sum=log_sum, entropy=entropy, correct=correct)
    return loss, peak, log_sum, entropy, correct


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    *options: Any,
) -> Tensor:
    """Return the gradient of the input. It finds peak and sum again: its row is there, and it has to find Q anyway."""
    grad = torch.empty_like(input)
    sweep(input, target, *options, grad=grad, upstream=grad_loss, upstream_lse=grad_lse)
    return grad


def backward_(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    *options: Any,
) -> None:
    """Write the gradient over the input."""
    sweep(input, target, *options, grad=input, upstream=grad_loss, upstream_lse=grad_lse)


def total(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """Return the reduced loss."""
    return _reduced(input, target, *options, grad=None)


def step(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient."""
    grad = torch.empty_like(input)
    return _reduced(input, target, *options, grad=grad), grad


def _reduced(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *rest: Any, grad: Tensor | None
) -> Tensor:
    *numbers, mean = rest
    loss = input.new_empty((), dtype=compute_dtype(input))
    divisor, factor = None, 1.0
    classes = input.shape[min(input.dim() - 1, 1)]
    if mean and target.is_floating_point():
        factor = 1 / (input.numel() // classes) if input.numel() else float("inf")
    elif mean:
        divisor = count(target, classes, weight, ignore_index)
    sweep(input, target, weight, ignore_index, *numbers, grad=grad, factor=factor, divisor=divisor, total=loss)
    return loss


def directional(
    direction: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, temperature: float, softcap: float | None, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <direction, gradient of the input> by grad_loss, grad_lse, input and probabilities."""
    probabilities = target.is_floating_point()
    classes = input.shape[min(input.dim() - 1, 1)]
    v_loss, v_lse, v_input = _each(input), _each(input), torch.empty_like(input)
    v_target = torch.empty_like(target) if probabilities else input.new_empty((0,))
    if not probabilities:
        target = target.contiguous()
    more = (target, v_target) if probabilities else ()
    lying = positions(input, direction, v_input, *more)
    if lying is None:
        found = directional(
            direction.contiguous(), grad_loss, grad_lse, input.contiguous(), target.contiguous(), weight, ignore_index,
            label_smoothing, temperature, softcap, z_loss,
        )  # fmt: skip
        return found[0], found[1], v_input.copy_(found[2]), v_target.copy_(found[3])
    P = lying.inner
    columns = lying.strides[0][1] == 1 and lying.strides[0][2] != 1 and P > 1
    held = classes * (4 if softcap else 2)
    config = (_SECOND_COLUMNS if columns else _SECOND).find(input.device, input.element_size(), held)
    BP, BC = _tile(config, P, classes, columns, held)
    T = compute_dtype(input)
    launch(
        _directional, (lying.outer * triton.cdiv(P, BP),), direction, _rows(grad_loss), _rows(grad_lse), input, target,
        weight, v_loss, v_lse, v_input, v_target if probabilities else None, P, classes,
        *(stride for strides in lying.strides[:3] for stride in strides),
        *(stride for strides in (lying.strides[3:] or ((P, 1, 0), (0, 0, 0))) for stride in strides),
        ignore_index, label_smoothing, temperature, softcap or 1.0, z_loss, PROBABILITIES=probabilities,
        SMOOTHING=label_smoothing != 0, SOFTCAP=softcap is not None, WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T],
        BP=BP, BC=BC, config=config._replace(meta={}),
    )  # fmt: skip
    return v_loss, v_lse, v_input, v_target


_WIDE = {"_sweep": ("LDG.E.128", "STG.E.128")}
_PLAIN = (None, -100, 0.0, 1.0, None, 0.0)


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the tables."""
    for dtype, *sizes in (
        (torch.bfloat16, 1024, 4096, 8192, 32000, 128256),
        (torch.float32, 1024, 16384, 32000, 128256),
        (torch.float64, 4096, 8192, 32000),
    ):
        for classes in sizes:
            x, y = _meta((4096, classes), dtype), _meta((4096,), torch.int64)
            yield Example(f"step-{classes}-{dtype}", partial(step, x, y, *_PLAIN, True), _WIDE)
    x, y = _meta((4096, 32000), torch.bfloat16), _meta((4096,), torch.int64)
    for classes in (8192, 32000):
        z, weight = _meta((4096, classes), torch.bfloat16), _meta((classes,), torch.bfloat16)
        every = (weight, -100, 0.1, 2.0, 30.0, 1e-4, True)
        yield Example(f"step-weighted-{classes}", partial(step, z, y, *every), _WIDE)
        yield Example(f"step-probabilities-{classes}", partial(step, z, z, *every), _WIDE)
        yield Example(f"stats-{classes}", partial(forward_stats, z, y, *_PLAIN), {"_sweep": ("LDG.E.128",)})
    rows = _meta((4096,), torch.float32)
    yield Example("backward-in-place", partial(backward_, rows, rows, x, y, rows, rows, *_PLAIN), _WIDE)
    for options in (_PLAIN, (None, -100, 0.1, 2.0, 30.0, 1e-4)):
        for classes in (8192, 32000):
            z = x[:, :classes]
            yield Example(
                f"directional-{classes}-{options}", partial(directional, z, rows, rows, z, y, *options),
                {"_directional": ("LDG.E.128", "STG.E.128")},
            )  # fmt: skip
    yield Example("step-odd", partial(step, _meta((4096, 50257), torch.bfloat16), y, *_PLAIN, True))
    for classes in (21, 300):
        x, y = _meta((8, classes, 512, 512), torch.bfloat16), _meta((8, 512, 512), torch.int64)
        yield Example(f"columns-{classes}", partial(step, x, y, *_PLAIN, True), _WIDE)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
