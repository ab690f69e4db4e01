"""sentence-transformers: `MultipleNegativesRankingLoss` of embeddings, whole and in mini-batches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Peer
from tlkernels.bench.work import Loss


def _loss(name: str, logit_scale: float, symmetric: bool) -> Any:
    """Return the library's module. It gets embeddings, so its model does nothing."""
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return getattr(import_module("sentence_transformers.sentence_transformer.losses"), name)(
        torch.nn.Sequential(torch.nn.Identity()),
        scale=logit_scale,
        similarity_fct=import_module("sentence_transformers.util").dot_score,
        **(both if symmetric else {}),
    )


def info_nce(*, logit_scale: float, symmetric: bool = False) -> Loss:
    """`MultipleNegativesRankingLoss.compute_loss_from_embeddings`."""
    module = _loss("MultipleNegativesRankingLoss", logit_scale, symmetric)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        value: Tensor = module.compute_loss_from_embeddings([q, k], None)
        return value

    return loss


class _Cached(torch.autograd.Function):
    """The loss stage of GradCache: the forward computes the gradients of the embeddings, by mini-batches of rows."""

    @staticmethod
    def forward(ctx: Any, module: Any, *embeddings: Tensor) -> Tensor:
        leaves = [embedding.detach().requires_grad_() for embedding in embeddings]
        with torch.enable_grad():
            value: Tensor = module.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        ctx.grads = [leaf.grad for leaf in leaves]
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(upstream[0] * grad for grad in ctx.grads))


def cached_info_nce(*, logit_scale: float, symmetric: bool = False) -> Loss:
    """`CachedMultipleNegativesRankingLoss.calculate_loss`, in mini-batches of 32 rows, its default."""
    module = _loss("CachedMultipleNegativesRankingLoss", logit_scale, symmetric)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        value: Tensor = _Cached.apply(module, q, k)  # type: ignore[no-untyped-call]
        return value

    return loss


PACKAGE = "sentence-transformers"
PEERS = (
    Peer("sentence-transformers", PACKAGE, {"info_nce": info_nce}, CPU_AND_CUDA),
    Peer("sentence-transformers cached", PACKAGE, {"info_nce": cached_info_nce}, CPU_AND_CUDA),
)
