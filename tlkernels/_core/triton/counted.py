"""Which rows of a linear loss are computed, known on the device alone."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.triton import check_num_valid


class CountedRows(NamedTuple):
    """Which rows of a call are computed, and in which order. The host does not wait for the device to know them."""

    numbers: Tensor | None = None
    """Those of the rows that are computed; None: all, in order."""
    total: Tensor | None = None
    """How many rows count, (1,), if these come first; else None."""
    absent: Tensor | None = None
    """(rows, 1), True in rows that are computed but do not count; None if there are none."""
    miscounted: Tensor | None = None
    """Whether `num_valid` is wrong, 0-d; None without it."""

    def kept(self, rows: Tensor) -> Tensor:
        """Return the rows that are computed."""
        return rows if self.numbers is None else rows.index_select(0, self.numbers)

    def spread(self, kept: Tensor, rows: int) -> Tensor:
        """Return all of `rows` rows, with zeros in those that are not computed."""
        if self.numbers is None:
            return kept
        return kept.new_zeros((rows, *kept.shape[1:])).index_copy_(0, self.numbers, kept)


def counted_rows(valid: Tensor | None, used: Tensor | None, num_valid: int | None, ahead: bool) -> CountedRows:
    """Return which rows to compute.

    Args:
        valid: True in rows that are not ignored; None if none is.
        used: True in rows whose weight is not 0; None for all.
        num_valid: the number of valid rows, if known: only these are computed.
        ahead: whether otherwise the rows that count come before the others.

    Raises:
        ValueError: `num_valid` is wrong; on a GPU only with TLKERNELS_CHECK=1 in the environment.
    """
    masks = [mask for mask in (valid, used) if mask is not None and mask.numel()]
    if not masks:
        return CountedRows()
    if valid is not None and num_valid is not None:
        numbers, total = _first(valid)
        check_num_valid(total, num_valid)
        # At least one row is kept, so that a wrong `num_valid` of 0 can make it NaN.
        numbers = numbers[: max(1, num_valid)]
        masks = [mask[numbers] for mask in (masks if num_valid == 0 else masks[1:])]
        absent = ~functools.reduce(torch.logical_and, masks).unsqueeze(1) if masks else None
        return CountedRows(numbers, absent=absent, miscounted=total != num_valid)
    present = functools.reduce(torch.logical_and, masks)
    if not ahead:
        return CountedRows(absent=~present.unsqueeze(1))
    numbers, total = _first(present)
    return CountedRows(numbers, total.view(1), ~present[numbers].unsqueeze(1))


def _first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of all rows, those where the mask is True first, and how many these are, 0-d."""
    until = mask.cumsum(0)
    total, row = until[-1], torch.arange(mask.numel(), device=mask.device)
    return torch.empty_like(row).scatter_(0, torch.where(mask, until - 1, total + row - until), row), total
