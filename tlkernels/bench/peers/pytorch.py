"""PyTorch: `F.linear_cross_entropy` with its options, and inductor's auto-chunker.

The options have a policy for what is accumulated in float32, and a size of the chunks. "auto" takes both from a table
by device and dtype. On a CPU in 16 bits, every policy but "accurate" multiplies 20 to 50 times slower, says PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Adapter, Peer, Refused, class_indices
from tlkernels.bench.work import Loss


def chunked(**options: Any) -> Adapter:
    """Return the adapter of `F.linear_cross_entropy` with these options; without them, PyTorch chooses.

    A policy that is named accumulates 16 bits in 16 bits unless told otherwise; PyTorch's own choice uses float32.
    """

    def linear_cross_entropy(
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> Loss:
        class_indices(target)
        if not hasattr(F, "linear_cross_entropy"):
            raise Refused(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")

        def loss(x: Tensor, w: Tensor) -> Tensor:
            chosen = {**options, "acc_dtype": torch.float32} if options and x.element_size() == 2 else options
            value: Tensor = F.linear_cross_entropy(
                x,
                w,
                target,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                options=torch.nn.LinearCrossEntropyOptions(**chosen),
            )
            return value

        return loss

    return linear_cross_entropy


_CHUNKED: set[tuple[object, ...]] = set()
"""Sizes and dtypes whose lines the auto-chunker has chunked; torch.compile may have them still."""


def auto_chunker(
    *,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    """Compile the eager lines with inductor's auto-chunker, without its thresholds on the size of the logits.

    Where it finds nothing to chunk, it compiles as usual without a word; that is refused here. A graph from
    inductor's cache would not tell, so the cache is off.
    """
    from torch._inductor import metrics

    def lines(x: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(x, w)
        return F.cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)

    options: dict[str, Any] = {
        "auto_chunker.enable": True,
        "auto_chunker.output_size_threshold": 0,
        "auto_chunker.amplify_ratio_threshold": 0,
        "fx_graph_cache": False,
    }
    compiled = torch.compile(lines, dynamic=False, options=options)
    before, has_run = metrics.num_auto_chunking, False

    def loss(x: Tensor, w: Tensor) -> Tensor:
        nonlocal has_run
        value: Tensor = compiled(x, w)
        if not has_run:
            sizes = (*x.shape, *w.shape, x.dtype)
            if metrics.num_auto_chunking > before:
                _CHUNKED.add(sizes)
            elif sizes not in _CHUNKED:
                raise Refused("the auto-chunker chunks nothing here")
            has_run = True
        return value

    return loss


def _peer(name: str, adapter: Adapter, devices: tuple[str, ...] = CPU_AND_CUDA, compiles: bool = False) -> Peer:
    return Peer(name, "torch", {"linear_cross_entropy": adapter}, devices, compiles=compiles)


PEERS = (
    _peer("torch chunked", chunked()),
    _peer("torch chunked accurate", chunked(acc_policy="accurate", chunking_method="aspect_ratio")),
    _peer("torch chunked balanced", chunked(acc_policy="balanced", chunking_method="aspect_ratio"), ("cuda",)),
    _peer("torch chunked compact", chunked(acc_policy="compact", chunking_method="aspect_ratio")),
    _peer("torch auto-chunker", auto_chunker, compiles=True),
)
