"""memeff: a CLIP loss in Triton for unit vectors. By default its gradient is not the loss's; `stable=False` is."""

from __future__ import annotations

from importlib import import_module

from tlkernels.bench.peers.peer import Peer, Refused
from tlkernels.bench.work import Loss


def info_nce(*, logit_scale: float, symmetric: bool = False) -> Loss:
    """`MemoryEfficientCLIPLoss` with the gradient of the loss. It is right for unit vectors only."""
    if not symmetric:
        raise Refused("has both directions only")
    module: Loss = import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / logit_scale, normalized_inputs=True, stable=False
    )
    return module


PEERS = (Peer("memeff", "memeff", {"info_nce": info_nce}, ("cuda",), tf32=True),)
