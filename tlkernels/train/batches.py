"""Which rows go into which step, process and micro-batch.

These are functions of the seed and the step alone: a resumed run has no data order to restore, and the number of
processes does not change what a step learns from.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def whole_batch(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """Return the row numbers of step `step`, over all processes: the next ones of a stream of shuffled epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    order = {epoch: _shuffled(rows, seed, epoch) for epoch in set((positions // rows).tolist())}
    return torch.stack([order[p // rows][p % rows] for p in positions.tolist()])


def micro_batches(batch: Tensor, lengths: Tensor, limit: int | None, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Return this process's share of a batch, cut into pieces of at most `limit` rows.

    Rows of like length stand together, since a piece is padded to its longest row. Every process has rows of all
    lengths.
    """
    own = batch[lengths[batch].argsort(descending=True, stable=True)][rank::world]
    size = limit or max(1, len(own))
    return [own[start : start + size] for start in range(0, len(own), size)]


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
