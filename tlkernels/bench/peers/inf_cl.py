"""Inf-CL: a contrastive loss in Triton without the N x N tensor; it converts the inputs to float32."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from tlkernels.bench.peers.peer import Peer, Refused
from tlkernels.bench.work import Loss

LEAST, MOST = 16, 256
"""Features of a head: the kernel splits the features into heads of a power of two."""


def info_nce(*, logit_scale: float, symmetric: bool = False) -> Loss:
    """`cal_flash_loss`, one call a direction."""
    function = import_module("inf_cl").cal_flash_loss

    def loss(q: Tensor, k: Tensor) -> Tensor:
        features = q.shape[1]
        head = min(features & -features, MOST)
        if head < LEAST:
            raise Refused(f"needs features divisible by {LEAST}, got {features}")
        value: Tensor = function(q, k, scale=logit_scale, head_dim=head).mean()
        if not symmetric:
            return value
        back: Tensor = function(k, q, scale=logit_scale, head_dim=head).mean()
        return (value + back) / 2

    return loss


PEERS = (Peer("inf-cl", "inf-cl", {"info_nce": info_nce}, ("cuda",), tf32=True),)
