"""Comparing two networks on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def paired_difference(
    first: Sequence[float], second: Sequence[float], counts: Tensor | None = None
) -> tuple[float, float]:
    """Return the difference of two means, and the half-width of its 95 % interval.

    Rows are taken as independent of one another. That both networks have the same rows makes the interval narrow: only
    the rows' differences vary.

    Args:
        first, second: what each row adds to either network's score.
        counts: what each row adds to the denominator of the means, such as its tokens; None: 1.
    """
    difference = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    counts = torch.ones_like(difference) if counts is None else counts.double()
    total, rows = float(counts.sum()), len(difference)
    mean = float(difference.sum()) / total
    spread = float(((difference - mean * counts) ** 2).sum())  # a ratio's variance, to first order
    return mean, 1.96 * math.sqrt(spread * rows / max(rows - 1, 1)) / total
