"""The classes: their names, and the class number of each row."""

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
    """Return the classes: those that the data declare, 0 ... num_labels-1, or the labels of the training rows.

    Labels are sorted as numbers if all are numbers, otherwise as strings.

    Raises:
        UserError: no training row has a label, or `num_labels` is not the number of declared classes.
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
    """Return each row's class, or `IGNORE`. Raises `UserError` for a label that is not in `names`."""
    labels: Any = rows.labels
    classes = pc.index_in(labels, value_set=pa.array(names, pa.large_string()), skip_nulls=True)
    unknown = pc.and_(pc.is_null(classes), pc.is_valid(labels))
    if (row := pc.index(unknown, True).as_py()) >= 0:
        label = shown(labels[row].as_py())
        raise UserError(
            f"label {label} in {rows.place(row)} is not one of the {len(names)} classes ({listed(names, 8)})"
        )
    result: list[int] = classes.fill_null(IGNORE).to_pylist()
    return result
