"""Reduction of the losses of rows."""

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")

_BLOCK = 4096  # below torch's threshold for splitting one sum over threads


def sum_in_order(values: Tensor) -> Tensor:
    """Return the sum of all elements: bitwise the same for any number of threads, differentiable to any order."""
    values = values.reshape(-1)
    while _is_long(values.numel()):
        values = torch.nn.functional.pad(values, (0, -values.numel() % _BLOCK)).view(-1, _BLOCK).sum(1)
    return values.sum()


def _is_long(size: int) -> bool:
    if not torch.compiler.is_compiling():
        return size > _BLOCK
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(size > _BLOCK))  # the size may be unbacked, as that of rows that a mask selects


def reduce(rows: Tensor, denominator: Tensor | float, reduction: str) -> Tensor:
    """Return `rows`, their sum, or their sum over `denominator`."""
    if reduction == "none":
        return rows
    total = sum_in_order(rows)
    return total / denominator if reduction == "mean" else total
