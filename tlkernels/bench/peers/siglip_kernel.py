"""siglip-kernel: SigLIP's loss in Triton; it chooses its kernel by card and dtype."""

from __future__ import annotations

import math
from importlib import import_module

import torch
from torch import Tensor

from tlkernels.bench.peers.peer import Peer
from tlkernels.bench.work import Loss


def sigmoid_contrastive(*, logit_scale: float, logit_bias: float) -> Loss:
    """`fused_siglip_loss`. Scale and bias are float32 tensors, made once for each device."""
    function = import_module("siglip_kernel").fused_siglip_loss
    scalars: dict[torch.device, tuple[Tensor, ...]] = {}

    def loss(q: Tensor, k: Tensor) -> Tensor:
        if q.device not in scalars:
            numbers = (math.log(logit_scale), logit_bias)
            scalars[q.device] = tuple(torch.tensor(number, device=q.device) for number in numbers)
        value: Tensor = function(q, k, *scalars[q.device])
        return value

    return loss


PEERS = (Peer("siglip-kernel", "siglip-kernel", {"sigmoid_contrastive": sigmoid_contrastive}, ("cuda",), tf32=True),)
