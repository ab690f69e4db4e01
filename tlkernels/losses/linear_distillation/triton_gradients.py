"""The gradient kernel of linear distillation; `triton.py` launches it and has the formulas."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number
from tlkernels._core.triton.linear_kernels import logits_tile
from tlkernels.losses.linear_distillation.triton_kernels import FORWARD_KL, REVERSE_KL, capped, classes_of_tile, slopes


@triton.jit(do_not_specialize=["kept_rows"])
def gradient(
    s_logits, s_stride,  # student's logits, (classes, rows), and stride between classes; or None: compute them from the
    s_input, s_row, s_k,  # layer: input, (rows, features), and strides
    s_weight, s_weight_row, s_weight_k,  # weight, (classes, features), and strides
    s_bias,  # bias, (classes,), or None
    t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias,  # the teacher's, as above
    target,  # (rows,) int64 class indices, or None
    row_weight,  # (rows,), or None for 1
    kept,  # (result, row), of `finish`
    upstream, upstream_row,  # (rows,), and its stride, 0 for one number
    s_gradient, s_gradient_stride,  # result, (end - begin, rows), and stride between classes; or None
    t_gradient, t_gradient_stride,  # the same of the teacher
    rows, classes, s_features, t_features,  # sizes
    begin, end,  # the classes of the gradients
    kept_rows,  # stride of kept between results
    ignore_index,
    inv_temperature: tl.float64, beta: tl.float64,  # of the divergence
    soft_weight: tl.float64, hard_weight: tl.float64,  # of the divergence and of the cross entropy
    smoothing: tl.float64,  # of the cross entropy's target
    s_softcap: tl.float64, t_softcap: tl.float64,  # of both sides
    DIVERGENCE: tl.constexpr,  # FORWARD_KL, REVERSE_KL, JS or TV
    S_CAPPED: tl.constexpr, T_CAPPED: tl.constexpr,  # whether these are used
    HARD: tl.constexpr,  # hard_weight is not 0
    T: tl.constexpr, S_TYPE: tl.constexpr, T_TYPE: tl.constexpr,  # dtype of the arithmetic; of each side's logits
    DEEP: tl.constexpr, LANES: tl.constexpr,  # a tile has DEEP * LANES classes
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,  # rows of a tile; features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide" in the interpreter
):  # fmt: skip
    """Write the gradients by a tile of logits, those that are given."""
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    mask = r < rows
    s = logits_tile(
        s_logits, s_stride, s_input, s_row, s_k, s_weight, s_weight_row, s_weight_k, s_bias, first, r, rows, classes,
        s_features, S_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
    ).to(T)  # fmt: skip
    t = logits_tile(
        t_logits, t_stride, t_input, t_row, t_k, t_weight, t_weight_row, t_weight_k, t_bias, first, r, rows, classes,
        t_features, T_TYPE, DEEP, LANES, BLOCK_K, PRECISION,
    ).to(T)  # fmt: skip
    s, s_slope = capped(s, number(s_softcap, T), S_CAPPED)
    t, t_slope = capped(t, number(t_softcap, T), T_CAPPED)
    inv_t = number(inv_temperature, T)
    s_gap = s - tl.load(kept + r, mask, other=0.0)[None, None, :]
    t_gap = t - tl.load(kept + kept_rows + r, mask, other=0.0)[None, None, :]
    s_log_sum = tl.load(kept + 2 * kept_rows + r, mask, other=0.0)
    t_log_sum = tl.load(kept + 3 * kept_rows + r, mask, other=0.0)
    s_average = tl.load(kept + 4 * kept_rows + r, mask, other=0.0)
    t_average = tl.load(kept + 5 * kept_rows + r, mask, other=0.0)
    g = tl.load(upstream + r * upstream_row, mask, other=0.0).to(T)
    counted = mask
    if row_weight is not None:
        weight = tl.load(row_weight + r, mask, other=0.0).to(T)
        g *= weight
        counted &= weight != 0
    y = r
    if target is not None:
        y = tl.load(target + r, mask, other=-1)
        counted &= y != ignore_index
        g = tl.where((y >= 0) & (y < classes), g, float("nan"))
    g = tl.where(counted, g, 0.0)[None, None, :]  # it is infinite if no row counts
    ps = tl.exp(s_gap * inv_t - s_log_sum[None, None, :])
    pt = tl.exp(t_gap * inv_t - t_log_sum[None, None, :])
    # The numbers of the row are subtracted first: in a difference of large numbers each rounding shows.
    log_ratio = (t_gap - s_gap) * inv_t
    shift = t_log_sum - s_log_sum
    if DIVERGENCE == FORWARD_KL:
        ds = ps - pt
        dt = tl.where(pt == 0, 0.0, pt * (log_ratio - (shift + t_average)[None, None, :]))
    elif DIVERGENCE == REVERSE_KL:
        ds = tl.where(ps == 0, 0.0, ps * ((shift - s_average)[None, None, :] - log_ratio))
        dt = pt - ps
    else:
        s_part, t_part = slopes(log_ratio - shift[None, None, :], ps, pt, number(beta, T), DIVERGENCE)
        ds = s_part - ps * s_average[None, None, :]
        dt = t_part - pt * t_average[None, None, :]
    soft = number(soft_weight, T) * inv_t * g
    c = classes_of_tile(first, DEEP, LANES)
    valid = (c < end) & mask[None, None, :]
    offset = (c - begin).to(tl.int64)
    if s_gradient is not None:
        d = soft * ds
        if HARD:
            p = tl.exp(s_gap - tl.load(kept + 6 * kept_rows + r, mask, other=0.0)[None, None, :])
            smooth = number(smoothing, T)
            one_hot = tl.where(c == y[None, None, :], 1.0, 0.0)
            # Subtracted class by class, so that p and the target cancel exactly where p is 1.
            d += number(hard_weight, T) * g * ((1 - smooth) * (p - one_hot) + smooth * (p - number(1.0, T) / classes))
        if S_CAPPED:
            d *= s_slope
        d = tl.where(counted[None, None, :], d, 0.0)
        at = s_gradient + offset * s_gradient_stride + r[None, None, :]
        tl.store(at, d.to(s_gradient.dtype.element_ty), valid)
    if t_gradient is not None:
        d = soft * dt
        if T_CAPPED:
            d *= t_slope
        d = tl.where(counted[None, None, :], d, 0.0)
        at = t_gradient + offset * t_gradient_stride + r[None, None, :]
        tl.store(at, d.to(t_gradient.dtype.element_ty), valid)
