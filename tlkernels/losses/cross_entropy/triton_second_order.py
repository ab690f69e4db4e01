"""The kernel of cross entropy's second derivative; `second_order.py` has the formulas."""

import triton
import triton.language as tl

from tlkernels.losses.cross_entropy.triton_kernels import bounded, peak_and_sum, spread_target, target_of


@triton.jit
def _direction_tile(
    input, direction, target, weight, at, at_v, at_t, valid, c, C, y, target_q, smoothing, spread, inv_t, softcap,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a tile's bounded logits, the derivative of the scaled ones, the direction times that, and q."""
    u, slope = bounded(tl.load(input + at, valid, other=float("-inf")).to(T), softcap, SOFTCAP)
    slope *= inv_t
    w = tl.load(direction + at_v, valid, other=0.0).to(T) * slope
    q = spread_target(target, weight, at_t, valid, c, C, smoothing, spread, PROBABILITIES, SMOOTHING, T)
    q += tl.where(c[None, :] == y[:, None], target_q[:, None], 0.0)
    return tl.where(valid, u, float("-inf")), slope, w, q


@triton.jit
def _directional_tile(
    v_input, v_target, weight, at_o, at_u, stored, c, C, u, slope, w, q, p, distance, g, a, h, along, covariance,
    penalty, counted, softcap, smoothing, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write a tile of the derivatives by the input and by the target."""
    centred = w - along[:, None]
    if ENTROPY:
        by_p = a[:, None] - h[:, None] * distance
        result = (by_p - h[:, None]) * centred + (h * covariance + penalty)[:, None]
    else:
        by_p = a[:, None]
        result = by_p * centred + penalty[:, None]
    result *= slope * p
    if SOFTCAP:
        result += w * (-2 / softcap * u) * (by_p * p - g[:, None] * q)
    result = tl.where(counted[:, None], result, 0.0)
    tl.store(v_input + at_o, result.to(v_input.dtype.element_ty), stored)
    if v_target is not None:
        by_target = (smoothing - 1) * g[:, None] * centred
        if weight is not None:
            by_target *= tl.load(weight + c, c < C, other=0.0).to(T)[None, :]
        tl.store(v_target + at_u, by_target.to(v_target.dtype.element_ty), stored)


@triton.jit
def directional(
    direction,  # of the input's shape
    grad_loss,  # (outer, P), upstream of the gradient
    grad_lse, grad_entropy,  # (outer, P), or None for 0
    input,  # logits, (outer, P, C)
    target,  # (outer, P) class indices, or probabilities, (outer, P, C)
    weight,  # (C,), or None
    v_loss, v_lse,  # results, (outer, P): the derivatives by grad_loss and grad_lse
    v_entropy,  # result, (outer, P), with grad_entropy; or None
    v_input,  # result of the input's shape
    v_target,  # result of the target's shape, or None
    P, C,  # inner positions and classes; the grid has outer * cdiv(P, BP) programs
    x_outer, x_pos, x_class,  # strides of input
    v_outer, v_pos, v_class,  # strides of direction
    o_outer, o_pos, o_class,  # strides of v_input
    t_outer, t_pos, t_class,  # strides of target; t_class is 0 for class indices
    u_outer, u_pos, u_class,  # strides of v_target
    ignore_index,
    smoothing: tl.float64,  # taken from the target
    spread: tl.float64,  # given to each class for it
    temperature: tl.float64, softcap: tl.float64, z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,  # target has probabilities
    ELSEWHERE: tl.constexpr,  # a class index of -1 counts: the target is no class of input
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,  # whether these options are used
    WHOLE: tl.constexpr,  # a tile has all classes
    T: tl.constexpr,  # dtype of the arithmetic
    BP: tl.constexpr, BC: tl.constexpr,  # positions and classes of a tile
):  # fmt: skip
    """Write the derivatives of <direction, gradient of the input>."""
    ENTROPY: tl.constexpr = grad_entropy is not None
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
    y, counted, bad, target_q, _ = target_of(
        target, weight, input, at_target, at_row, x_class, mask, C, ignore_index, smoothing, softcap,
        PROBABILITIES, ELSEWHERE, SOFTCAP, T,
    )  # fmt: skip
    along_classes = classes[None, :].to(tl.int64)
    at = at_row[:, None] + along_classes * x_class
    at_v = (outer * v_outer + pos * v_pos)[:, None] + along_classes * v_class
    at_o = (outer * o_outer + pos * o_pos)[:, None] + along_classes * o_class
    at_t = at_target[:, None] + along_classes * t_class
    at_u = (outer * u_outer + pos * u_pos)[:, None] + along_classes * u_class
    g = tl.where(bad, float("nan"), tl.load(grad_loss + row, counted, other=0.0).to(T))
    inside = (classes < C)[None, :]

    # Sums over p and q of w, the direction times the logits' derivative, and of depth, a logit's below the peak.
    depth_along = tl.zeros([BP], T)
    mean_depth = tl.zeros([BP], T)
    if WHOLE:
        u, slope, w, q = _direction_tile(
            input, direction, target, weight, at, at_v, at_t, counted[:, None] & inside, classes, C, y, target_q,
            smoothing, spread, inv_t, softcap, PROBABILITIES, SMOOTHING, SOFTCAP, T,
        )  # fmt: skip
        peak = tl.max(u, 1)
        depth = (peak[:, None] - u) * k
        e = tl.exp(-depth)
        total = tl.sum(e, 1)
        log_sum = tl.log(total)
        p = e * (1 / total)[:, None]
        along, target_along, Q = tl.sum(w * p, 1), tl.sum(w * q, 1), tl.sum(q, 1)
        if ENTROPY:
            p_depth = tl.where(p == 0, 0.0, p * depth)
            mean_depth, depth_along = tl.sum(p_depth, 1), tl.sum(w * p_depth, 1)
    else:
        peak, total = peak_and_sum(input + at, x_class, counted, classes, C, softcap, k, SOFTCAP, T, BC)
        log_sum = tl.log(total)
        alongs, target_alongs, Qs = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        depths, depth_alongs = tl.zeros([BP, BC], T), tl.zeros([BP, BC], T)
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, slope, w, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                counted[:, None] & (c < C)[None, :], c, C, y, target_q, smoothing, spread, inv_t, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            depth = (peak[:, None] - u) * k
            p = tl.exp(-depth - log_sum[:, None])
            alongs += w * p
            target_alongs += w * q
            Qs += q
            if ENTROPY:
                p_depth = tl.where(p == 0, 0.0, p * depth)
                depths += p_depth
                depth_alongs += w * p_depth
        along, target_along, Q = tl.sum(alongs, 1), tl.sum(target_alongs, 1), tl.sum(Qs, 1)
        if ENTROPY:
            mean_depth, depth_along = tl.sum(depths, 1), tl.sum(depth_alongs, 1)

    twice = 2 * z_loss
    share = Q + twice * (peak * k + log_sum)
    penalty = twice * g * along
    a = g * share
    if grad_lse is not None:
        a += tl.load(grad_lse + row, counted, other=0.0).to(T)
    h, covariance = a, a
    by_loss = tl.where(bad, float("nan"), share * along - target_along)
    tl.store(v_loss + row, tl.where(counted, by_loss, 0.0), mask)
    tl.store(v_lse + row, tl.where(counted, along, 0.0), mask)
    if ENTROPY:
        h = tl.load(grad_entropy + row, counted, other=0.0).to(T)
        covariance = mean_depth * along - depth_along  # over p, of log p and w
        tl.store(v_entropy + row, tl.where(counted, -covariance, 0.0), mask)

    if WHOLE:
        distance = tl.where(p == 0, 0.0, mean_depth[:, None] - depth)
        _directional_tile(
            v_input, v_target, weight, at_o, at_u, mask[:, None] & inside, classes, C, u, slope, w, q, p, distance, g,
            a, h, along, covariance, penalty, counted, softcap, smoothing, ENTROPY, SOFTCAP, T,
        )  # fmt: skip
    else:
        for start in range(0, C, BC):
            c, far = start + classes, tl.cast(start, tl.int64)
            u, slope, w, q = _direction_tile(
                input, direction, target, weight, at + far * x_class, at_v + far * v_class, at_t + far * t_class,
                counted[:, None] & (c < C)[None, :], c, C, y, target_q, smoothing, spread, inv_t, softcap,
                PROBABILITIES, SMOOTHING, SOFTCAP, T,
            )  # fmt: skip
            depth = (peak[:, None] - u) * k
            p = tl.exp(-depth - log_sum[:, None])
            distance = tl.where(p == 0, 0.0, mean_depth[:, None] - depth)
            _directional_tile(
                v_input, v_target, weight, at_o + far * o_class, at_u + far * u_class,
                mask[:, None] & (c < C)[None, :], c, C, u, slope, w, q, p, distance, g, a, h, along, covariance,
                penalty, counted, softcap, smoothing, ENTROPY, SOFTCAP, T,
            )  # fmt: skip


# As `sweep_rows`.
directional_rows = triton.jit(directional.fn, do_not_specialize=["P"])
