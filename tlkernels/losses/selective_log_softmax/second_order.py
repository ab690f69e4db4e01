"""Second derivatives in closed form, in plain PyTorch and so differentiable to any order.

With z(x) the logits after softcap and temperature, p = softmax(z), H its entropy, d = z - max(z), E and Cov the mean
and covariance under p, and upstreams g_k of the selected log-probabilities, of sum G, and h of the entropy:

    y_c = sum of g_k over the k with index_k = c
    D   = E[d],   dH/dz_c = -p_c * (d_c - D)
    e_c = y_c - G * p_c - h * p_c * (d_c - D)        the gradient of z
    e_c * z'(x_c)                                    the gradient of x

and for <v, gradient of x> of a direction v, with u = v * z'(x), U = E[u] and V = Cov(d, u):

    by g_k: u at index_k, minus U          by h: -V
    by x_c: v * z''(x) * e_c - z'(x) * p_c * (G * (u_c - U) + h * ((d_c - D + 1) * (u_c - U) - V))
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.selective_log_softmax.call import Options


class Directional(NamedTuple):
    """The derivatives of <direction, gradient of the logits>."""

    log_probs: Tensor
    """By grad_log_probs."""
    entropy: Tensor
    """By grad_entropy."""
    logits: Tensor


def directional(
    direction: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    index: Tensor,
    options: Options,
) -> Directional:
    """Return the derivatives of <direction, gradient of the logits> by the upstreams and the logits."""
    present = index >= 0
    absent = ~present.any(-1, keepdim=True)
    temperature, softcap = options.temperature, options.softcap
    x = logits.masked_fill(absent, 0).to(compute_dtype(logits))
    z, slope, curvature = x / temperature, torch.full_like(x, 1 / temperature), torch.zeros_like(x)
    if softcap is not None:
        t = torch.tanh(x / softcap)
        z, slope = softcap * t / temperature, (1 - t * t) / temperature
        curvature = -2 / softcap * t * slope
    v = direction.to(x.dtype).masked_fill(absent, 0)
    g = grad_log_probs.to(x.dtype).masked_fill(~present, 0)
    classes = index.clamp(min=0)
    p = z.softmax(-1)
    u = v * slope
    mean_u = (p * u).sum(-1, keepdim=True)
    total = g.sum(-1, keepdim=True)
    by_g = (u.gather(-1, classes) - mean_u).masked_fill(~present, 0)
    e = torch.zeros_like(x).scatter_add(-1, classes, g) - total * p
    by_z = total * (u - mean_u)
    # Where p is 0, d may be infinite.
    d = (z - z.detach().amax(-1, keepdim=True)).masked_fill(p == 0, 0)
    d = d - (p * d).sum(-1, keepdim=True)
    covariance = (p * d * u).sum(-1, keepdim=True)
    if grad_entropy is not None:
        h = grad_entropy.to(x.dtype).unsqueeze(-1).masked_fill(absent, 0)
        e = e - h * p * d
        by_z = by_z + h * ((d + 1) * (u - mean_u) - covariance)
    by_x = (v * curvature * e - slope * p * by_z).masked_fill(absent, 0)
    return Directional(by_g, -covariance.squeeze(-1), by_x.to(logits.dtype))
