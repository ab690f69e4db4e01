"""How well embeddings find what belongs to a query."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1024  # queries whose similarities to all keys exist at a time


def ranks(queries: Tensor, keys: Tensor, query_ids: Tensor, key_ids: Tensor, *, same: bool = False) -> Tensor:
    """Return for each query the rank, from 1, of the first key that belongs to it, among all keys by their similarity.

    A key belongs to a query if it has the same id. Of equally similar keys, those that do not belong come first, and
    so do those whose similarity is NaN. A query to which no key belongs gets 0.

    Args:
        queries: embeddings, `(N, D)`.
        keys: embeddings, `(K, D)`.
        query_ids: `(N,)`.
        key_ids: `(K,)`.
        same: whether the keys are the queries; each is then left out of its own search.
    """
    found = []
    for rows in torch.arange(len(queries), device=queries.device).split(_ROWS):
        similarity = queries[rows] @ keys.T
        belongs = query_ids[rows, None] == key_ids
        others = ~belongs
        if same:
            belongs = belongs & (rows[:, None] != torch.arange(len(keys), device=keys.device))
        best = similarity.masked_fill(~belongs, -torch.inf).amax(1, keepdim=True)
        rank = 1 + (others & ~(similarity < best)).sum(1)
        found.append(rank * belongs.any(1))
    return torch.cat(found)


def reciprocals(ranks: Tensor, most: int = 10) -> Tensor:
    """Return 1 / rank, and 0 beyond rank `most`; the mean over the queries is MRR@`most`."""
    return torch.where((ranks >= 1) & (ranks <= most), 1 / ranks.clamp_min(1).double(), 0.0)


def recall(ranks: Tensor, at: int) -> float:
    """Return the share of the queries whose first key is among the `at` most similar ones."""
    return float(((ranks >= 1) & (ranks <= at)).double().mean())
