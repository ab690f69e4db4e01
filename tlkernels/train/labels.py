"""Classes: the names that stand in the training rows, and the number of each row's name among them."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tlkernels.train.columns import Part
from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, listed, shown

IGNORE = -100  # the label of a row without one
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def class_names(train: Part, config: DataConfig) -> list[str]:
    """Return the classes: those that the data declare, 0 ... num_labels-1, or the names that the training rows have.

    Names that are all numbers stand in their order, others in that of the alphabet.

    Raises:
        UserError: no training row has a label, or `num_labels` is not the number of the declared classes.
    """
    names = [] if train.labels is None else pc.unique(train.labels).drop_null().to_pylist()
    if not names:
        raise UserError(f"no training row has a label in column {config.label_column!r}")
    if train.classes is not None:
        if config.num_labels not in (None, len(train.classes)):
            raise UserError(
                f"--data.num_labels is {config.num_labels}, but column {config.label_column!r} declares "
                f"{len(train.classes)} classes ({listed(train.classes)})"
            )
        return train.classes
    if config.num_labels is not None:
        return [str(number) for number in range(config.num_labels)]
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def numbers(rows: Part, names: list[str]) -> list[int]:
    """Return each row's class, or `IGNORE`. Raises `UserError` for a label that is none of `names`."""
    labels: Any = rows.labels
    found = pc.index_in(labels, value_set=pa.array(names, pa.large_string()), skip_nulls=True)
    unknown = pc.and_(pc.is_null(found), pc.is_valid(labels))
    if (row := pc.index(unknown, True).as_py()) >= 0:
        raise UserError(
            f"label {shown(labels[row].as_py())} in {rows.place(row)} is none of the {len(names)} classes "
            f"({listed(names, 8)})"
        )
    result: list[int] = found.fill_null(IGNORE).to_pylist()
    return result
