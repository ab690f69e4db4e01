"""From a file, a folder, a hub name or this machine's docstrings to rows that a model can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from tlkernels.train import docstrings
from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, one_line

IGNORE = -100  # the label of a row without one
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Table:
    """The rows of one side before a tokenizer saw them: `column` is a text or an image."""

    rows: Any  # datasets.Dataset
    column: str
    labels: list[int]

    def select(self, numbers: list[int]) -> Table:
        """Return the rows of these numbers, in the table's order."""
        chosen = sorted(numbers)
        return Table(self.rows.select(chosen), self.column, [self.labels[number] for number in chosen])


@dataclass(frozen=True)
class Data:
    """Three sides, the classes' names in the order of their numbers, and whether the column holds images."""

    train: Table
    eval: Table
    test: Table | None
    classes: list[str]
    images: bool


def load_data(config: DataConfig, seed: int) -> Data:
    """Read everything that `config` names; `seed` decides the split where none is given.

    Raises:
        UserError: a file or name that cannot be read, a missing column, a label that is no class, too few rows.
    """
    if config.path is None:
        return _built_in(config)
    named = _read(config.path, config)
    rows = {"train": _split(named, config.split, config.path)}
    for side, value in (("eval", config.eval), ("test", config.test)):
        if value is not None:
            own = value in named
            rows[side] = _split(named, value, config.path) if own else _split(_read(value, config), "train", value)
    column, images = _column(rows["train"], config)
    # Over all rows of the file, before it is split: a rare class is one too, and an error names the file's own row.
    classes = _Classes(rows["train"], config)
    tables = {side: _table(table, side, column, images, classes) for side, table in rows.items()}
    return _with_shares(tables, config, seed, classes.names, images)


def _table(rows: Any, side: str, column: str, images: bool, classes: _Classes) -> Table:
    if column not in rows.column_names:
        raise UserError(f"the {side} rows have no column {column!r}, only {', '.join(rows.column_names)}")
    for number, text in enumerate(() if images else rows[column]):
        if not isinstance(text, str):
            raise UserError(f"row {number} of the {side} rows has no text in column {column!r} but {text!r}")
    return Table(rows, column, classes.numbers(rows, side))


def _with_shares(tables: dict[str, Table], config: DataConfig, seed: int, classes: list[str], images: bool) -> Data:
    """Cuts the sides that were not named out of the training rows, by chance."""
    whole = tables["train"]
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(seed)).tolist()
    for side, share in (("eval", config.eval_fraction), ("test", config.test_fraction)):
        if side not in tables and share > 0:
            count = max(1, round(share * len(whole.labels)))
            tables[side], order = whole.select(order[:count]), order[count:]
    tables["train"] = whole.select(order)
    if not order:
        raise UserError(f"{config.path} has {len(whole.labels)} rows, too few to train, evaluate and test on")
    for side, table in tables.items():
        if all(label == IGNORE for label in table.labels):
            raise UserError(
                f"none of the {len(table.labels)} {side} rows has a label in column {config.label_column!r}"
            )
    return Data(tables["train"], tables["eval"], tables.get("test"), classes, images)


def _built_in(config: DataConfig) -> Data:
    split = docstrings.build(config.classes, config.per_class, config.eval_fraction, config.test_fraction)
    names = sorted({document.package for document in split["train"]})

    def table(side: str) -> Table:
        rows = datasets.Dataset.from_dict(
            {"text": [d.text for d in split[side]], "module": [d.module for d in split[side]]}
        )
        return Table(rows, "text", [names.index(document.package) for document in split[side]])

    return Data(table("train"), table("eval"), table("test"), names, images=False)


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(path: str, config: DataConfig) -> Any:
    """A `datasets.DatasetDict`: of a file it has one split, `train`."""
    local = Path(path).expanduser()
    looks_local = local.suffix in _BUILDERS or path.startswith((".", "/", "~")) or path.count("/") > 1
    if not local.exists() and looks_local:
        raise UserError(f"no such file or folder: {path}")
    if local.is_file():
        if local.suffix not in _BUILDERS:
            raise UserError(f"{path}: of a file, the ending says what it is; known are {' '.join(_BUILDERS)}")
        if local.stat().st_size == 0:
            raise UserError(f"{path} is empty")
    try:
        if local.is_file():
            options: dict[str, Any] = {"sep": "\t"} if local.suffix == ".tsv" else {}
            return datasets.load_dataset(_BUILDERS[local.suffix], data_files=str(local), **options)
        return datasets.load_dataset(str(local) if local.is_dir() else path, config.subset)
    except Exception as error:  # every reader of every format has errors of its own; all mean that it cannot be read
        raise UserError(f"cannot read {path}: {one_line(error.__cause__ or error)}") from error


def _split(named: Any, split: str, path: str) -> Any:
    if split not in named:
        raise UserError(f"{path} has no split {split!r}, only {', '.join(named)}")
    if not len(named[split]):
        raise UserError(f"{path} has no rows in {split!r}")
    return named[split]


def _column(rows: Any, config: DataConfig) -> tuple[str, bool]:
    names = rows.column_names
    if config.label_column not in names:
        raise UserError(f"no label column {config.label_column!r}; there are {', '.join(names)} (--data.label_column)")
    if config.text_column in names:
        return config.text_column, False
    if config.image_column in names and isinstance(rows.features[config.image_column], datasets.Image):
        return config.image_column, True
    raise UserError(f"no text column {config.text_column!r}; there are {', '.join(names)} (--data.text_column)")


class _Classes:
    """The classes that the training rows have, and the number of each label of any side."""

    def __init__(self, train: Any, config: DataConfig) -> None:
        self.column = config.label_column
        feature = train.features[self.column]
        values = set(self._values(train, "train")) - {None, IGNORE}
        if not values:
            raise UserError(f"no training row has a label in column {self.column!r}")
        if isinstance(feature, datasets.ClassLabel):
            self.names = list(feature.names)
        elif all(isinstance(value, str) for value in values):
            self.names = sorted(values)
        elif any(isinstance(value, str) for value in values):
            raise UserError(f"column {self.column!r} mixes strings and integers")
        else:
            largest = max(values)
            if config.num_labels is None and largest >= len(train):
                raise UserError(
                    f"label {largest} among {len(train)} training rows; if it is right, give --data.num_labels"
                )
            self.names = [str(number) for number in range(config.num_labels or largest + 1)]
        self.index: dict[Any, int] | None = None
        if all(isinstance(value, str) for value in values):
            self.index = {name: number for number, name in enumerate(self.names)}

    def numbers(self, rows: Any, side: str) -> list[int]:
        if self.column not in rows.column_names:
            raise UserError(f"the {side} rows have no column {self.column!r}, only {', '.join(rows.column_names)}")
        return [self._number(value, row, side) for row, value in enumerate(self._values(rows, side))]

    def _number(self, value: Any, row: int, side: str) -> int:
        if value is None or value == IGNORE:
            return IGNORE
        number = value if self.index is None else self.index.get(value)
        if not isinstance(number, int) or not 0 <= number < len(self.names):
            known = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
            raise UserError(
                f"label {value!r} in row {row} of the {side} rows is none of the {len(self.names)} classes ({known})"
            )
        return number

    def _values(self, rows: Any, side: str) -> Iterable[Any]:
        """Strings, integers, or None where there is none. A missing integer turns a whole CSV column into floats."""
        for row, value in enumerate(rows[self.column]):
            if value is None or value == "" or value != value:  # None, an empty string, NaN
                yield None
            elif isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer()):
                yield value if isinstance(value, str) else int(value)
            else:
                raise UserError(f"label {value!r} in row {row} of the {side} rows is neither a string nor an integer")
