"""Which rows go into each step, process and micro-batch.

This depends only on the seed and the step: a resumed run has no data order to restore, and a step trains on the same
rows with any number of processes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def whole_batch(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """Return the row numbers of step `step` for all processes: the next ones in a sequence of shuffled epochs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    order = {epoch: _shuffled(rows, seed, epoch) for epoch in set((positions // rows).tolist())}
    return torch.stack([order[p // rows][p % rows] for p in positions.tolist()])


def micro_batches(batch: Tensor, lengths: Tensor, limit: int | None, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Return this process's share of a batch, in pieces of at most `limit` rows.

    Each piece has rows of similar length, since it is padded to its longest row. Every process gets rows of all
    lengths, and as many pieces as the others, as sharded parameters require: the last one may be empty.
    """
    share = batch[lengths[batch].argsort(descending=True, stable=True)][rank::world]
    most = math.ceil(len(batch) / world)  # rows of the first process
    count = math.ceil(most / (limit or max(1, most)))
    return list(share.tensor_split(count)) if count else []


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the seed of a step's random numbers, such as dropout's: a resumed run draws those of an unbroken one."""
    return (seed * 1_000_003 + step) * 1_009 + rank


@lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
