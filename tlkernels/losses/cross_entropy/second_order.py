"""What follows the first gradient: its derivatives in closed form, in plain PyTorch, so differentiable to any order.

With z(x) the logits after softcap and temperature, p = softmax(z), q the target's terms, Q their sum, zeta = z_loss:

    loss = sum_c q_c * (lse - z_c) + zeta * lse^2
    d    = (a * p - g * q) * z'(x),      a = g * (Q + 2 * zeta * lse) + h      upstream g of loss, h of lse

and for <v, d> of a direction v, with u = v * z'(x):

    by g: (Q + 2 * zeta * lse) * <u, p> - <u, q>          by h: <u, p>
    by x: z'(x) * (a * p * (u - <u, p>) + 2 * zeta * g * <u, p> * p) + v * z''(x) * (a * p - g * q)
"""

from typing import Any

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.cross_entropy.call import class_axis


def _target_terms(target: Tensor, weight: Tensor | None, like: Tensor, axis: int, numbers: Any) -> Tensor:
    """Return q, of the shape of the logits `like`; 0 where ignored."""
    ignore_index, smoothing = numbers[:2]
    spread = smoothing / like.shape[axis]
    if target.is_floating_point():
        q: Tensor = target.to(like.dtype) * (1 - smoothing) + spread
        return q if weight is None else q * _along(weight, like, axis)
    counted = (target != ignore_index).unsqueeze(axis)
    y = target.long().unsqueeze(axis).masked_fill(~counted, 0)
    own: Tensor = torch.zeros_like(like).scatter(axis, y, 1 - smoothing) + spread
    if weight is not None:
        own = own * _along(weight, like, axis)
    own = own * counted
    return own


def _along(weight: Tensor, like: Tensor, axis: int) -> Tensor:
    return weight.to(like.dtype).reshape([-1 if i == axis else 1 for i in range(like.dim())])


def _logits(input: Tensor, numbers: Any) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return z, z' and z''."""
    _, _, temperature, softcap, _ = numbers
    x = input.to(compute_dtype(input))
    if softcap is None:
        return x / temperature, 1 / temperature, 0.0
    t = torch.tanh(x / softcap)
    slope = (1 - t * t) / temperature
    return softcap * t / temperature, slope, -2 / softcap * t * slope


def _lost(input: Tensor, target: Tensor, numbers: Any) -> Tensor | None:
    """Return which positions are ignored and have no finite lse: their derivatives are 0, as the reference's are."""
    if target.is_floating_point():
        return None
    axis = class_axis(input)
    lse = torch.logsumexp(_logits(input.detach(), numbers)[0], axis, keepdim=True)
    lost: Tensor = (target == numbers[0]).unsqueeze(axis) & ~lse.isfinite()
    return lost


def directional(
    direction: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the derivatives of <direction, gradient of the input> by grad_loss, grad_lse, input and target.

    The first two are also the derivatives of loss and lse along `direction`. `rest` ends with the options after weight.
    """
    numbers = rest[-1]
    axis = class_axis(input)
    lost = _lost(input, target, numbers)
    if lost is not None:
        input = input.masked_fill(lost, 0)
    z, slope, curvature = _logits(input, numbers)
    v = direction.to(z.dtype)
    g = grad_loss.to(z.dtype).unsqueeze(axis)
    p = z.softmax(axis)
    q = _target_terms(target, weight, z, axis, numbers)
    u = v * slope
    up = (u * p).sum(axis, keepdim=True)
    uq = (u * q).sum(axis, keepdim=True)
    a = q.sum(axis, keepdim=True)
    penalty: Tensor | float = 0.0
    if numbers[4]:
        counted = 1.0 if target.is_floating_point() else (target != numbers[0]).unsqueeze(axis)
        penalty = 2 * numbers[4] * counted
        a = a + penalty * torch.logsumexp(z, axis, keepdim=True)
    v_loss = (a * up - uq).squeeze(axis)
    a = g * a
    if grad_lse is not None:
        a = a + grad_lse.to(z.dtype).unsqueeze(axis)
    v_input = slope * p * (a * (u - up) + penalty * g * up) + v * curvature * (a * p - g * q)
    if lost is not None:
        up, v_input = up.masked_fill(lost, 0), v_input.masked_fill(lost, 0)
    v_target = None
    if target.is_floating_point():
        v_target = (1 - numbers[1]) * g * (up - u)
        v_target = (v_target if weight is None else v_target * _along(weight, z, axis)).to(target.dtype)
    return v_loss, up.squeeze(axis), v_input.to(input.dtype), v_target


def target_gradient(grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, numbers: Any) -> Tensor:
    """Return the gradient of target probabilities: -(1 - label_smoothing) * weight * log p, times the upstream."""
    axis = class_axis(input)
    z, _, _ = _logits(input, numbers)
    grad: Tensor = grad_loss.to(z.dtype).unsqueeze(axis) * (numbers[1] - 1) * z.log_softmax(axis)
    return (grad if weight is None else grad * _along(weight, z, axis)).to(target.dtype)


def along_target(
    direction: Tensor, grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, numbers: Any
) -> Tensor:
    """Return the derivative of the input's gradient along a direction of target probabilities.

    It is g * z'(x) * (p * sum(dq) - dq), where dq is (1 - label_smoothing) * weight * direction.
    """
    axis = class_axis(input)
    z, slope, _ = _logits(input, numbers)
    dq = direction.to(z.dtype) * (1 - numbers[1])
    dq = dq if weight is None else dq * _along(weight, z, axis)
    g = grad_loss.to(z.dtype).unsqueeze(axis)
    result: Tensor = g * slope * (z.softmax(axis) * dq.sum(axis, keepdim=True) - dq)
    return result.to(input.dtype)
