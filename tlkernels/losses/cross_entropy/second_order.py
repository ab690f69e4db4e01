"""Second derivatives in closed form, in plain PyTorch and so differentiable to any order.

With z(x) the logits after softcap and temperature, p = softmax(z), q the target's terms, Q their sum, zeta = z_loss,
and upstream gradients g of loss, h of lse, k of entropy:

    loss    = sum_c q_c * (lse - z_c) + zeta * lse^2
    entropy = -sum_c p_c * log p_c
    d       = (a * p - g * q - k * r) * z'(x),      a = g * (Q + 2 * zeta * lse) + h,      r = p * (log p + entropy)

and for <v, d> of a direction v, with u = v * z'(x):

    by g: (Q + 2 * zeta * lse) * <u, p> - <u, q>          by h: <u, p>          by k: -<u, r>
    by x: z'(x) * (a * p * (u - <u, p>) + 2 * zeta * g * <u, p> * p - k * ((u - <u, p>) * (p + r) - <u, r> * p))
          + v * z''(x) * (a * p - g * q - k * r)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.cross_entropy.call import Options, class_axis


def _target_terms(target: Tensor, like: Tensor, axis: int, options: Options) -> Tensor:
    """Return q, in the shape of the logits `like`; 0 where ignored."""
    smoothing = options.label_smoothing
    spread = smoothing / (options.num_classes or like.shape[axis])
    if target.is_floating_point():
        return _weighted(target.to(like.dtype) * (1 - smoothing) + spread, axis, options)
    counted = (target != options.ignore_index).unsqueeze(axis)
    y = target.long().unsqueeze(axis)
    here = counted & (y >= 0)  # not in another part of the vocabulary
    q: Tensor = torch.zeros_like(like).scatter(axis, y.masked_fill(~here, 0), here.to(like.dtype) * (1 - smoothing))
    q = _weighted(q + spread, axis, options) * counted
    return q


def _weighted(values: Tensor, axis: int, options: Options) -> Tensor:
    """Return the values of the classes along `axis` times the classes' weights."""
    if options.weight is None:
        return values
    return values * options.weight.to(values.dtype).reshape([-1 if i == axis else 1 for i in range(values.dim())])


def _logits(input: Tensor, options: Options) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return z, z' and z''."""
    temperature, softcap = options.temperature, options.softcap
    x = input.to(compute_dtype(input))
    if softcap is None:
        return x / temperature, 1 / temperature, 0.0
    t = torch.tanh(x / softcap)
    slope = (1 - t * t) / temperature
    return softcap * t / temperature, slope, -2 / softcap * t * slope


class Directional(NamedTuple):
    """The derivatives of <direction, gradient of the input>."""

    loss: Tensor
    """By grad_loss; also the derivative of the loss along the direction."""
    lse: Tensor
    """By grad_lse; also the derivative of lse along the direction."""
    entropy: Tensor | None
    """By grad_entropy; also the derivative of entropy along the direction. None without grad_entropy."""
    input: Tensor
    target: Tensor | None
    """None for class indices."""


def directional(
    direction: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    options: Options,
) -> Directional:
    """Return the derivatives of <direction, gradient of the input> by the upstream gradients, input and target."""
    axis = class_axis(input)
    ignored = None if target.is_floating_point() else (target == options.ignore_index).unsqueeze(axis)
    if ignored is not None:
        input = input.masked_fill(ignored, 0)
    z, slope, curvature = _logits(input, options)
    v = direction.to(z.dtype)
    g = grad_loss.to(z.dtype).unsqueeze(axis)
    p = z.softmax(axis)
    q = _target_terms(target, z, axis, options)
    u = v * slope
    up = (u * p).sum(axis, keepdim=True)
    uq = (u * q).sum(axis, keepdim=True)
    a = q.sum(axis, keepdim=True)
    penalty = 2 * options.z_loss
    if penalty:
        a = a + penalty * torch.logsumexp(z, axis, keepdim=True)
    v_loss = a * up - uq
    a = g * a
    if grad_lse is not None:
        a = a + grad_lse.to(z.dtype).unsqueeze(axis)
    v_input = p * (a * (u - up) + penalty * g * up)
    by_z = a * p - g * q
    v_entropy = None
    if grad_entropy is not None:
        k = grad_entropy.to(z.dtype).unsqueeze(axis)
        log_p = z.log_softmax(axis).masked_fill(p == 0, 0)
        r = p * (log_p - (p * log_p).sum(axis, keepdim=True))
        ur = (u * r).sum(axis, keepdim=True)
        v_entropy = -ur
        v_input = v_input - k * ((u - up) * (p + r) - ur * p)
        by_z = by_z - k * r
    v_input = slope * v_input + v * curvature * by_z
    if ignored is not None:
        v_loss, up, v_input = (values.masked_fill(ignored, 0) for values in (v_loss, up, v_input))
        v_entropy = None if v_entropy is None else v_entropy.masked_fill(ignored, 0)
    v_target = None
    if target.is_floating_point():
        v_target = _weighted((1 - options.label_smoothing) * g * (up - u), axis, options).to(target.dtype)
    v_entropy = None if v_entropy is None else v_entropy.squeeze(axis)
    return Directional(v_loss.squeeze(axis), up.squeeze(axis), v_entropy, v_input.to(input.dtype), v_target)


def target_gradient(grad_loss: Tensor, input: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return the gradient of target probabilities: -(1 - label_smoothing) * weight * log p * grad_loss."""
    axis = class_axis(input)
    z, _, _ = _logits(input, options)
    grad = grad_loss.to(z.dtype).unsqueeze(axis) * (options.label_smoothing - 1) * z.log_softmax(axis)
    return _weighted(grad, axis, options).to(target.dtype)


def along_target(direction: Tensor, grad_loss: Tensor, input: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return the derivative of the input's gradient along a direction of target probabilities.

    It is g * z'(x) * (p * sum(dq) - dq), where dq is (1 - label_smoothing) * weight * direction.
    """
    axis = class_axis(input)
    z, slope, _ = _logits(input, options)
    dq = _weighted(direction.to(z.dtype) * (1 - options.label_smoothing), axis, options)
    g = grad_loss.to(z.dtype).unsqueeze(axis)
    result: Tensor = g * slope * (z.softmax(axis) * dq.sum(axis, keepdim=True) - dq)
    return result.to(input.dtype)
