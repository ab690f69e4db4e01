"""The kernel of cross entropy's second derivative; `second_order.py` has the formulas."""

import triton
import triton.language as tl

from tlkernels.losses.cross_entropy.triton_kernels import bounded, peak_and_sum, spread_target, target_of


@triton.jit
def _direction_tile(
    input, direction, target, weight, at, at_v, at_t, valid, c, C, y, target_q, counted, smoothing, softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's bounded logits, their derivative without the temperature, the direction, and q."""
    u, slope = bounded(tl.load(input + at, valid, other=float("-inf")).to(T), softcap, SOFTCAP)
    v = tl.load(direction + at_v, valid, other=0.0).to(T)
    q = spread_target(target, weight, at_t, valid, c, C, counted, smoothing, PROBABILITIES, SMOOTHING, T)
    q += tl.where(c[None, :] == y[:, None], target_q[:, None], 0.0)
    return tl.where(valid, u, float("-inf")), slope, v, q


@triton.jit
def _directional_tile(
    v_input, v_target, weight, at_o, at_u, stored, c, C, u, slope, v, q, p, g, a, twice, along, kept, inv_t,
    softcap, smoothing, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write a tile of the derivatives by the input and by the target."""
    first = slope * inv_t
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
    direction,  # of the input's shape
    grad_loss,  # (outer, P), the gradient's upstream
    grad_lse,  # (outer, P), or None for 0
    input,  # logits, (outer, P, C)
    target,  # (outer, P) class indices, or probabilities, (outer, P, C)
    weight,  # (C,), or None
    v_loss, v_lse,  # results, (outer, P): the derivatives by grad_loss and grad_lse
    v_input,  # result of the input's shape
    v_target,  # result of the target's shape, or None
    P, C,  # inner positions and classes; the grid has outer * cdiv(P, BP) programs
    x_outer, x_pos, x_class,  # strides of input
    v_outer, v_pos, v_class,  # strides of direction
    o_outer, o_pos, o_class,  # strides of v_input
    t_outer, t_pos, t_class,  # strides of target; t_class is 0 for class indices
    u_outer, u_pos, u_class,  # strides of v_target
    ignore_index,
    smoothing: tl.float64, temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,  # the loss's options
    PROBABILITIES: tl.constexpr,  # target has probabilities
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,  # whether these options are used
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # positions and classes of a tile
):  # fmt: skip
    """Write the derivatives of <direction, gradient of the input>."""
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
    y, counted, bad, target_q, _ = target_of(
        target, weight, input, at_target, at_row, x_class, mask, C, ignore_index, smoothing, softcap,
        PROBABILITIES, SOFTCAP, T,
    )  # fmt: skip
    along_classes = classes[None, :].to(tl.int64)
    at = at_row[:, None] + along_classes * x_class
    at_v = (outer * v_outer + pos * v_pos)[:, None] + along_classes * v_class
    at_o = (outer * o_outer + pos * o_pos)[:, None] + along_classes * o_class
    at_t = at_target[:, None] + along_classes * t_class
    at_u = (outer * u_outer + pos * u_pos)[:, None] + along_classes * u_class
    kept = mask if grad_lse is not None else counted
    g = tl.where(counted, tl.load(grad_loss + row, mask, other=0.0).to(T), 0.0)
    g = tl.where(bad, float("nan"), g)
    inside = (classes < C)[None, :]
    if WHOLE:
        u, slope, v, q = _direction_tile(
            input, direction, target, weight, at, at_v, at_t, kept[:, None] & inside, classes, C, y, target_q, counted,
            smoothing, softcap, PROBABILITIES, SMOOTHING, SOFTCAP, T,
        )  # fmt: skip
        peak = tl.max(u, 1)
        e = tl.exp((u - peak[:, None]) * k)
        total = tl.sum(e, 1)
        p = e * (1 / total)[:, None]
        along, target_along, Q = (
            tl.sum(v * slope * inv_t * p, 1),
            tl.sum(v * slope * inv_t * q, 1),
            tl.sum(q, 1),
        )
        log_sum = tl.log(total)
    else:
        peak, total = peak_and_sum(input + at, x_class, kept, classes, C, softcap, k, SOFTCAP, T, BC)
        log_sum = tl.log(total)
        alongs, target_alongs, Qs = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, slope, v, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                kept[:, None] & (c < C)[None, :], c, C, y, target_q, counted, smoothing, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            alongs += v * slope * inv_t * tl.exp((u - peak[:, None]) * k - log_sum[:, None])
            target_alongs += v * slope * inv_t * q
            Qs += q
        along, target_along, Q = tl.sum(alongs, 1), tl.sum(target_alongs, 1), tl.sum(Qs, 1)

    twice = 2 * z_loss
    share = Q + twice * (peak * k + log_sum)
    a = tl.where(counted, g * share, 0.0)
    if grad_lse is not None:
        a += tl.load(grad_lse + row, mask, other=0.0).to(T)
        kept = counted | (a != 0)
    by_loss = tl.where(counted, share * along - target_along, 0.0)
    tl.store(v_loss + row, tl.where(bad, float("nan"), by_loss), mask)
    tl.store(v_lse + row, along, mask)

    if WHOLE:
        _directional_tile(
            v_input, v_target, weight, at_o, at_u, mask[:, None] & inside, classes, C, u, slope, v, q, p, g, a, twice,
            along, kept, inv_t, softcap, smoothing, SOFTCAP, T,
        )  # fmt: skip
    else:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, slope, v, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                kept[:, None] & (c < C)[None, :], c, C, y, target_q, counted, smoothing, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            p = tl.exp((u - peak[:, None]) * k - log_sum[:, None])
            _directional_tile(
                v_input, v_target, weight, at_o + far * o_class, at_u + far * u_class,
                mask[:, None] & (c < C)[None, :], c, C, u, slope, v, q, p, g, a, twice, along, kept, inv_t,
                softcap, smoothing, SOFTCAP, T,
            )  # fmt: skip


# As `sweep_rows`.
directional_rows = triton.jit(directional.fn, do_not_specialize=["P"])
