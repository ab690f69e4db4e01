"""The rows of contrastive training: pairs of queries and keys, or texts or images of which two views are compared."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tlkernels.train import code_search
from tlkernels.train.code_search import Pair
from tlkernels.train.columns import Columns, Part
from tlkernels.train.data import open_splits, read_split, refuse_unused
from tlkernels.train.errors import UserError, listed, shown
from tlkernels.train.files import OPTIONS
from tlkernels.train.labels import class_names, numbers
from tlkernels.train.pairs_config import PairsConfig

PAIRS = 5000  # of the built-in data
Kind = Literal["pairs", "views", "labels"]


@dataclass(frozen=True)
class Pairs:
    """The rows of one side.

    Attributes:
        queries: the texts, or a `datasets.Dataset` with one column of images.
        keys: the same of the keys, or None if the rows are no pairs.
        negatives: the hard negatives of each row, as many of each, or None.
        ids: a number of each row; rows with the same number are never negatives of each other.
        labels: the class of each row, or None.
        classes: the names of the classes.
        images: whether the queries are images, and whether the keys are.
        place: row number -> the row's place in its file.
        split: the split of `--data.path` that this is, or None if it is a share or from another path.
    """

    queries: Any
    keys: Any
    negatives: list[list[str]] | None
    ids: list[int]
    labels: list[int] | None
    classes: list[str]
    images: tuple[bool, bool]
    place: Callable[[int], str]
    split: str | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def select(self, numbers: list[int]) -> Pairs:
        """Return the rows with these numbers, in their order here."""
        chosen = sorted(numbers)

        def of(values: Any) -> Any:
            if isinstance(values, datasets.Dataset):
                return values.select(chosen, new_fingerprint="0")
            return None if values is None else [values[number] for number in chosen]

        return Pairs(
            of(self.queries),
            of(self.keys),
            of(self.negatives),
            of(self.ids),
            of(self.labels),
            self.classes,
            self.images,
            lambda row: self.place(chosen[row]),
        )


def load_pairs(config: PairsConfig, seed: int, kind: Kind) -> dict[str, Pairs]:
    """Read the rows of "train", "eval" and "test"; `seed` decides the split if none is given.

    "test" is "eval" if `test_fraction` is 0. `kind` is "pairs" (a query and a key), "views" (one text or image) or
    "labels" (a text or image, and a label).

    Raises:
        UserError: something cannot be read, a column or a value is missing, rows have different numbers of hard
            negatives, or there are too few rows.
    """
    if config.path is None:
        sides = _built_in(config, kind)
    else:
        for name, unused in (("packages", None), ("pairs", None), ("negatives", 0)):
            if getattr(config, name) != unused:
                raise UserError(f"--data.{name} applies to the built-in data; --data.path names others")
        sides = _with_shares(_sides(config.path, config, kind), config, seed)
    sides.setdefault("test", sides["eval"])
    for side, pairs in sides.items():
        if pairs.images != sides["train"].images:
            raise UserError(f"the train rows are {_named(sides['train'])}, but those of {side} are {_named(pairs)}")
    labels = sides["train"].labels
    if labels is not None and len(set(labels)) == 1:
        only = sides["train"].classes[labels[0]]
        raise UserError(f"all {len(labels)} training rows have the class {only!r}; expected two or more")
    return sides


def _named(pairs: Pairs) -> str:
    kinds = ["images" if images else "texts" for images in pairs.images]
    return kinds[0] if pairs.keys is None else " and ".join(kinds)


def _with_shares(sides: dict[str, Pairs], config: PairsConfig, seed: int) -> dict[str, Pairs]:
    """Take the sides that were not named at random from the training rows; rows with the same id stay together."""
    train = sides["train"]
    groups: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(train.ids):
        groups[number].append(row)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    for side, share in (("eval", config.eval_fraction), ("test", config.test_fraction)):
        if side not in sides and share > 0:
            rows: list[int] = []
            while order and len(rows) < max(1, round(share * len(train))):
                rows += members[order.pop()]
            sides[side] = train.select(rows)
    left = [row for number in order for row in members[number]]
    if not left or not all(len(pairs) for pairs in sides.values()):
        raise UserError(
            f"too few rows to train, evaluate and test on: {config.path} has {len(train)}, with {len(members)} "
            "different ids, queries and keys (--data.eval and --data.test name others)"
        )
    sides["train"] = replace(train.select(left), split=train.split)
    return sides


# ---- reading -----------------------------------------------------------------------------------------------------


def _sides(path: str, config: PairsConfig, kind: Kind) -> dict[str, Pairs]:
    """Return "train" and the sides that are named."""
    columns = _columns(config, kind)
    splits = open_splits(path, columns)
    parts = {"train": read_split(splits, config.split, path)}
    names = {"train": config.split}
    for side, value in (("eval", config.eval), ("test", config.test)):
        if value is not None:
            if value in splits:
                parts[side], names[side] = read_split(splits, value, path), value
            else:
                parts[side] = read_split(open_splits(value, columns), "train", value)
    refuse_unused(columns, {part.kind for part in parts.values()})
    sides = {side: _pairs(part, side, config, kind) for side, part in parts.items()}
    if kind == "labels":
        # Of all sides: two rows can be compared if no training row has their class.
        chunks = [chunk for part in parts.values() if part.labels is not None for chunk in part.labels.chunks]
        every = replace(parts["train"], labels=pa.chunked_array(chunks, pa.large_string()))
        classes = class_names(every, columns)
        sides = {s: replace(pairs, labels=numbers(parts[s], classes), classes=classes) for s, pairs in sides.items()}
    return {side: replace(pairs, split=names.get(side)) for side, pairs in sides.items()}


def _columns(config: PairsConfig, kind: Kind) -> Columns:
    """Return what to read; the texts are further columns, since the text column of an image list is the file's name."""
    pairs = kind == "pairs"
    return Columns(
        subset=config.subset,
        text_column="",
        label_column=config.label_column if kind == "labels" else "",
        image_column=config.image_column,
        encoding=config.encoding,
        separator=config.separator,
        quotes=config.quotes,
        further=(config.query_column, config.id_column, *([config.key_column] if pairs else [])),
        lists=(config.negative_column,) if pairs else (),
    )


def _pairs(part: Part, side: str, config: PairsConfig, kind: Kind) -> Pairs:
    """Return the rows of a part, without classes."""
    query, key = part.further.get(config.query_column), part.further.get(config.key_column)
    images = (kind != "pairs" and query is None, kind == "pairs" and key is None)
    if kind == "pairs" and query is None:
        raise _missing(part, side, "query", config)
    if any(images) and part.images is None:
        raise _missing(part, side, "key" if kind == "pairs" else "query", config, image=True)
    if kind == "labels":
        if part.labels is None:
            raise _missing(part, side, "label", config)
        if (row := pc.index(pc.is_null(part.labels), True).as_py()) >= 0:
            raise UserError(f"{part.place(row)} has no label in column {config.label_column!r}")
    queries = _images(part, config) if images[0] else _texts(query, part, config.query_column)
    keys = None
    if kind == "pairs":
        keys = _images(part, config) if images[1] else _texts(key, part, config.key_column)
    negatives = _negatives(part, config)
    if negatives is not None and images[1]:
        raise UserError(
            f"the hard negatives in column {config.negative_column!r} are texts, but the keys are images "
            f"({part.place(0)}; --data.negative_column)"
        )
    pictures = _digests(part.images) if any(images) else None
    values = (part.further.get(config.id_column), pictures if images[0] else query, pictures if images[1] else key)
    ids = _connected([column for column in values if column is not None], part.rows)
    return Pairs(queries, keys, negatives, ids, None, [], images, part.place)


def _missing(part: Part, side: str, option: str, config: PairsConfig, image: bool = False) -> UserError:
    """Return the error that a column is missing, and the image column that could stand in for it."""
    other = f" and no image column {config.image_column!r}" if image else ""
    separator = ", --data.separator" if len(part.names) == 1 and part.kind in OPTIONS["separator"] else ""
    return UserError(
        f"the {side} rows have no {option} column {getattr(config, f'{option}_column')!r}{other}; the columns are "
        f"{listed(part.names)} (--data.{option}_column{separator}; {part.place(0)})"
    )


def _texts(column: Any, part: Part, name: str) -> list[str]:
    texts: list[str] = column.to_pylist()
    for row, text in enumerate(texts):
        if not (text or "").strip():
            raise UserError(f"{part.place(row)} has no text in column {name!r}")
    return texts


def _images(part: Part, config: PairsConfig) -> Any:
    if (row := pc.index(pc.is_null(part.images), True).as_py()) >= 0:
        raise UserError(f"{part.place(row)} has no image in column {config.image_column!r}")
    table = datasets.table.InMemoryTable(pa.table({config.image_column: part.images}))
    return datasets.Dataset(table, fingerprint="0").cast_column(config.image_column, datasets.Image())


def _negatives(part: Part, config: PairsConfig) -> list[list[str]] | None:
    column = part.further.get(config.negative_column)
    if column is None:
        return None
    in_json = part.kind in OPTIONS["separator"]  # there, a list is a text
    rows: list[list[str]] = []
    for row, text in enumerate(column.to_pylist()):
        place = f"{part.place(row)}, column {config.negative_column!r}"
        texts = _list(json.loads(text or "null"), in_json)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}: expected a text or a list of texts, got {shown(texts)}")
        if not texts or not all(text.strip() for text in texts):
            raise UserError(f"{place}: no text")
        if len(texts) != len(rows[0] if rows else texts):
            raise UserError(f"{place}: {len(texts)} hard negatives, but {part.place(0)} has {len(rows[0])}")
        rows.append(texts)
    return rows


def _list(value: Any, in_json: bool) -> Any:
    if isinstance(value, str) and in_json and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return [value]  # a text that begins with a bracket
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _digests(images: Any) -> Iterator[str]:
    """Yield the path of each image, or a hash of its bytes if it has none."""
    for image in images:
        stored = image.as_py()
        data = stored["bytes"]
        yield stored["path"] if data is None else hashlib.blake2b(data, digest_size=16).hexdigest()


def _connected(columns: list[Any], rows: int) -> list[int]:
    """Return the smallest number of the rows that share a value with a row, or with a row that does, and so on."""
    parent = list(range(rows))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for column in columns:
        first: dict[str, int] = {}
        for row, value in enumerate(column if isinstance(column, Iterator) else column.to_pylist()):
            if value is not None and value != "":
                one, other = sorted((root(row), root(first.setdefault(value, row))))
                parent[other] = one
    return [root(row) for row in range(rows)]


# ---- the built-in pairs ------------------------------------------------------------------------------------------


def _built_in(config: PairsConfig, kind: Kind) -> dict[str, Pairs]:
    refuse_unused(_columns(config, kind), set())
    if kind == "labels":
        raise UserError("the built-in data have no labels: give --data.path")
    if kind == "views" and config.negatives:
        raise UserError("--data.negatives applies to pairs; the rows are single texts")
    shares = (config.eval_fraction, config.test_fraction)
    split = code_search.build(config.pairs or PAIRS, *shares, config.negatives, config.packages)
    return {side: _of_code(rows, kind) for side, rows in split.items() if rows}


def _of_code(rows: list[Pair], kind: Kind) -> Pairs:
    pairs = kind == "pairs"
    keys = [row.key for row in rows] if pairs else None
    negatives = [list(row.negatives) for row in rows] if pairs and rows[0].negatives else None
    numbers = list(range(len(rows)))  # no two rows have the same query or key
    return Pairs(
        [row.query for row in rows], keys, negatives, numbers, None, [], (False, False), lambda row: rows[row].place
    )
