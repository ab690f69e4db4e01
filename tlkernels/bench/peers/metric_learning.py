"""pytorch-metric-learning: losses in PyTorch."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Peer, Refused
from tlkernels.bench.work import Loss

LOSSES = "pytorch_metric_learning.losses"
MOST_ROWS, BYTES = 512, 17
"""`NTXentLoss` compares each positive pair with all negative pairs; in float32 it needs 17 N^3 bytes (measured)."""


def nt_xent(*, temperature: float) -> Loss:
    """`NTXentLoss`; both views of a row have its label."""
    module = import_module(LOSSES).NTXentLoss(temperature=temperature)

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z = torch.cat([z1, z2])
        if len(z) > MOST_ROWS:
            raise Refused(f"needs memory of N^3 numbers, {BYTES * len(z) ** 3 / 2**30:.0f} GiB for {len(z)} rows")
        value: Tensor = module(z, torch.arange(len(z1), device=z.device).repeat(2))
        return value

    return loss


def sup_con(*, labels: Tensor, temperature: float) -> Loss:
    """`SupConLoss`."""
    return partial(import_module(LOSSES).SupConLoss(temperature=temperature), labels=labels)


PEERS = (
    Peer("pytorch-metric-learning", "pytorch-metric-learning", {"nt_xent": nt_xent, "sup_con": sup_con}, CPU_AND_CUDA),
)
