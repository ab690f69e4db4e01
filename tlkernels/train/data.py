"""Reading a file, a folder, a hub data set or this machine's docstrings, and splitting the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tlkernels.train import docstrings
from tlkernels.train.columns import Part, as_json, part_of, read_lists, wanted
from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, listed, one_line
from tlkernels.train.files import OPTIONS, ending, read_file
from tlkernels.train.folders import Splits, read_folder
from tlkernels.train.labels import IGNORE as IGNORE
from tlkernels.train.labels import class_names, numbers

_FINGERPRINT = "0"  # otherwise `datasets` hashes all values, row by row, for a cache that is not used


@dataclass(frozen=True)
class Table:
    """The rows of one side (train, eval or test), before tokenisation.

    Attributes:
        rows: a `datasets.Dataset`.
        column: the column of `rows` with the text or the image.
        labels: the class of each row, or `IGNORE`.
        place: row number -> the row's place in its file.
    """

    rows: Any
    column: str
    labels: list[int]
    place: Callable[[int], str] = "row {}".format

    def select(self, numbers: list[int]) -> Table:
        """Return the rows with these numbers, in the table's order."""
        chosen = sorted(numbers)
        labels = [self.labels[number] for number in chosen]
        rows = self.rows.select(chosen, new_fingerprint=_FINGERPRINT)
        return Table(rows, self.column, labels, lambda row: self.place(chosen[row]))


@dataclass(frozen=True)
class Data:
    """Three sides, the names of the classes in the order of their numbers, and whether the rows are images.

    `splits` are the splits of `--data.path`. If `eval` or `test` is the name of one of them, it is not a path.
    """

    train: Table
    eval: Table
    test: Table | None
    classes: list[str]
    images: bool
    splits: tuple[str, ...] = ()


def load_data(config: DataConfig, seed: int) -> Data:
    """Read the rows that `config` names; `seed` decides the split if none is given.

    Raises:
        UserError: a file or hub data set cannot be read, a column is missing, a label is not a class, there are too few
            rows, or there is only one class.
    """
    if config.path is None:
        refuse_unused(config, set())
        return _built_in(config)
    splits = open_splits(config.path, config)
    parts = {"train": read_split(splits, config.split, config.path)}
    for side, value in (("eval", config.eval), ("test", config.test)):
        if value is not None:
            if value in splits:
                parts[side] = read_split(splits, value, config.path)
            else:
                parts[side] = read_split(open_splits(value, config), "train", value)
    refuse_unused(config, {part.kind for part in parts.values()})
    column, images = _column(parts["train"], config)
    # From all rows of the file, before it is split: so a rare class is a class, and an error names the file's line.
    classes = class_names(parts["train"], config)
    tables = {side: _table(part, side, column, images, classes, config) for side, part in parts.items()}
    tables = _with_shares(tables, config, seed, classes)
    return Data(tables["train"], tables["eval"], tables.get("test"), classes, images, tuple(splits))


def _table(part: Part, side: str, column: str, images: bool, classes: list[str], config: DataConfig) -> Table:
    values = part.images if images else part.texts
    for name, present in ((column, values), (config.label_column, part.labels)):
        if present is None:
            raise UserError(f"the {side} rows have no column {name!r}, only {listed(part.names)} ({part.place(0)})")
    missing = pc.is_null(values) if images else pc.equal(pc.fill_null(pc.binary_length(values), 0), 0)
    if (row := pc.index(missing, True).as_py()) >= 0:
        raise UserError(f"{part.place(row)} has no {'image' if images else 'text'} in column {column!r}")
    table = datasets.table.InMemoryTable(pa.table({column: values}))
    rows = datasets.Dataset(table, fingerprint=_FINGERPRINT)
    if images:
        rows = rows.cast_column(column, datasets.Image())
    return Table(rows, column, numbers(part, classes), part.place)


def _with_shares(tables: dict[str, Table], config: DataConfig, seed: int, classes: list[str]) -> dict[str, Table]:
    """Take the sides that were not named at random from the training rows."""
    train = tables["train"]
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).tolist()
    for side, share in (("eval", config.eval_fraction), ("test", config.test_fraction)):
        if side not in tables and share > 0:
            count = max(1, round(share * len(train.labels)))
            tables[side], order = train.select(order[:count]), order[count:]
    tables["train"] = train.select(order)
    if not order:
        raise UserError(f"{config.path} has {len(train.labels)} rows, too few to train, evaluate and test on")
    for side, table in tables.items():
        if all(label == IGNORE for label in table.labels):
            count, column = len(table.labels), config.label_column
            raise UserError(f"none of the {count} {side} rows has a label in column {column!r}")
    counts = Counter(tables["train"].labels)
    del counts[IGNORE]
    if len(counts) == 1:
        only = classes[min(counts)]
        raise UserError(f"all {counts.total()} labelled training rows have the class {only!r}; expected two or more")
    return tables


def _built_in(config: DataConfig) -> Data:
    split = docstrings.build(config.classes, config.per_class, config.eval_fraction, config.test_fraction)
    names = sorted({document.package for document in split["train"]})

    def table(side: str) -> Table:
        documents = split[side]
        rows = datasets.Dataset.from_dict({name: [getattr(d, name) for d in documents] for name in ("text", "module")})
        return Table(rows, "text", [names.index(document.package) for document in documents])

    return Data(table("train"), table("eval"), table("test"), names, images=False)


# ---- reading -----------------------------------------------------------------------------------------------------


def open_splits(path: str, config: DataConfig) -> Splits:
    """Return the splits of `path`; a file has one, `train`.

    Raises:
        UserError: there is no such file or data set, or a folder has neither images nor data files, or both.
    """
    local = local_path(path)
    if local is not None and local.is_file():
        return {"train": partial(read_file, local, config)}
    if local is not None:
        return read_folder(local, config)
    return hub_splits(path, config)


def hub_splits(path: str, config: DataConfig, chat_column: str = "") -> Splits:
    """Return the splits of a data set of the hub, with the chat column if one is named.

    Raises:
        UserError: it cannot be read.
    """
    try:
        loaded = datasets.load_dataset(path, config.subset)
    except Exception as error:  # the network, the hub and every builder raise their own errors
        raise UserError(f"cannot read {path}: {one_line(error.__cause__ or error)}") from error
    return {split: partial(_hub_part, rows, split, path, config, chat_column) for split, rows in loaded.items()}


def local_path(path: str) -> Path | None:
    """Return the file or folder `path`, or None if it is a hub name.

    Raises:
        UserError: there is no such file or folder, and it cannot be a hub name.
    """
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"no such file or folder: {path}") from error
    if local.is_file() or local.is_dir():
        return local
    if local.exists() or ending(local) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"no such file or folder: {path}")
    return None


def _hub_part(rows: Any, split: str, path: str, config: DataConfig, chat_column: str) -> Part:
    names = rows.column_names
    table = rows.select_columns(wanted(names, config, path, chat_column)).with_format("arrow")[:]
    columns = dict(zip(table.column_names, table.columns, strict=True))

    def place(row: int) -> str:
        return f"row {row} (from 0) of {path}, {split}"

    chats = as_json(columns[chat_column], chat_column, place) if chat_column in columns else None
    read_lists(config, columns, place)
    return part_of(config, columns, rows.features, rows=len(rows), kind="hub", names=names, place=place, chats=chats)


def refuse_unused(config: DataConfig, kinds: set[str]) -> None:
    """Raise for an option that is given and applies to no file that is read."""
    for name, takers in OPTIONS.items():
        if getattr(config, name) is not None and not kinds.intersection(takers):
            raise UserError(f"--data.{name} applies to {listed(takers)}; the data are of another kind")


def read_split(splits: Splits, split: str, path: str) -> Part:
    """Return the rows of one split. Raises `UserError` if there is no such split, or if it has no rows."""
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}, only {listed(list(splits))}")
    part = splits[split]()
    if part.rows == 0:
        raise UserError(f"{path} has no rows in {split!r}")
    return part


def _column(rows: Part, config: DataConfig) -> tuple[str, bool]:
    names = f"the columns are {listed(rows.names)}"
    separator = ", --data.separator" if len(rows.names) == 1 and rows.kind in OPTIONS["separator"] else ""
    if rows.labels is None:
        raise UserError(f"no label column {config.label_column!r}; {names} (--data.label_column{separator})")
    if rows.texts is not None:
        return config.text_column, False
    if rows.images is not None:
        return config.image_column, True
    raise UserError(f"no text column {config.text_column!r}; {names} (--data.text_column)")
