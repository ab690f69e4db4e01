"""QuACK: kernels in CuTe for Hopper and Blackwell."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from torch import Tensor

from tlkernels.bench.peers.peer import Peer, class_indices
from tlkernels.bench.work import Loss


def cross_entropy(
    *, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100
) -> Loss:
    """`quack.cross_entropy.cross_entropy`."""
    return partial(
        import_module("quack.cross_entropy").cross_entropy,
        target=class_indices(target),
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def linear_cross_entropy(*, target: Tensor, reduction: str = "mean", ignore_index: int = -100) -> Loss:
    """`chunked_linear_cross_entropy` with its own choice of the pipeline, in chunks of 4096 rows."""
    return partial(
        import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy,
        target=class_indices(target),
        reduction=reduction,
        ignore_index=ignore_index,
    )


PEERS = (
    Peer(
        "quack",
        "quack-kernels",
        {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy},
        ("cuda",),
        tf32=True,
    ),
)
