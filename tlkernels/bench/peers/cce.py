"""Cut Cross-Entropy.

By default it leaves out blocks of gradients below 1/32 of the dtype's rounding; "cce exact" computes them all. Both
take 16 bits only, and "cce compile" is its name for compiled PyTorch lines.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Adapter, Peer, class_indices
from tlkernels.bench.work import Loss


def cut(**options: Any) -> Adapter:
    """Return the adapter of `cut_cross_entropy.linear_cross_entropy` with these options."""

    def linear_cross_entropy(*, target: Tensor, reduction: str = "mean", ignore_index: int = -100) -> Loss:
        return partial(
            import_module("cut_cross_entropy").linear_cross_entropy,
            targets=class_indices(target),
            reduction=reduction,
            ignore_index=ignore_index,
            **options,
        )

    return linear_cross_entropy


PACKAGE = "cut-cross-entropy"
PEERS = (
    Peer("cce", PACKAGE, {"linear_cross_entropy": cut()}, ("cuda",), compiles=True),
    Peer("cce exact", PACKAGE, {"linear_cross_entropy": cut(filter_eps=None)}, ("cuda",)),
    Peer("cce compile", PACKAGE, {"linear_cross_entropy": cut(impl="torch_compile")}, CPU_AND_CUDA, compiles=True),
)
