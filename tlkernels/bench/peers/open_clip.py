"""open_clip: the losses of CLIP and SigLIP in PyTorch, in one process."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Peer, Refused
from tlkernels.bench.work import Loss


def info_nce(*, logit_scale: float, symmetric: bool = False) -> Loss:
    """`ClipLoss`; it keeps the labels, as in open_clip's training."""
    if not symmetric:
        raise Refused("has both directions only")
    return partial(import_module("open_clip.loss").ClipLoss(cache_labels=True), logit_scale=logit_scale)


def sigmoid_contrastive(*, logit_scale: float, logit_bias: float) -> Loss:
    """`SigLipLoss`."""
    module = import_module("open_clip.loss").SigLipLoss(cache_labels=True)
    return partial(module, logit_scale=logit_scale, logit_bias=logit_bias)


PEERS = (
    Peer(
        "open_clip",
        "open_clip_torch",
        {"info_nce": info_nce, "sigmoid_contrastive": sigmoid_contrastive},
        CPU_AND_CUDA,
    ),
)
