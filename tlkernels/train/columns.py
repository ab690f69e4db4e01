"""The columns that a run reads, as strings: the common form of the rows of any file or data set."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, listed

NO_LABEL = ("", "-100")  # and null; -100 is what PyTorch's losses ignore


@dataclass
class Columns(DataConfig):
    """Further columns to read; the options of a command with more columns than text, label and image name them.

    Attributes:
        further: columns that are read as strings.
        lists: columns of texts or lists, read as JSON. A value in a .csv or .tsv file is a text.
    """

    further: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """The rows of one split.

    Attributes:
        rows: the number of rows.
        kind: the file's ending, "hub", or "images".
        names: the names of all columns.
        place: row number -> the row's place, such as "line 7 of rows.csv".
        texts: the strings as they are written, or None if there is no such column. A missing value is null or empty.
        labels: the same, but a missing label is always null.
        images: what `datasets.Image` stores, or None if there is no such column.
        chats: the lists and objects of the chat column as JSON, or None if there is no such column.
        classes: the names of the classes, if the data declare them.
        further: the columns of `Columns` that exist: strings, or JSON.
    """

    rows: int
    kind: str
    names: list[str]
    place: Callable[[int], str]
    texts: pa.ChunkedArray | None
    labels: pa.ChunkedArray | None
    images: pa.ChunkedArray | None = None
    classes: list[str] | None = None
    chats: pa.ChunkedArray | None = None
    further: dict[str, pa.ChunkedArray] = field(default_factory=dict)


def further_columns(config: DataConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the further columns that are read as strings, and those that are read as JSON."""
    return (config.further, config.lists) if isinstance(config, Columns) else ((), ())


def part_of(
    config: DataConfig,
    columns: dict[str, pa.ChunkedArray],
    features: dict[str, Any],
    *,
    rows: int,
    kind: str,
    names: list[str],
    place: Callable[[int], str],
    chats: pa.ChunkedArray | None = None,
) -> Part:
    """Return the part with these Arrow columns; `features` has the types that the data declare.

    Raises:
        UserError: a text or a label is not a string, number or boolean, or a label is not a declared class.
    """
    text, label, image = columns.get(config.text_column), columns.get(config.label_column), None
    if isinstance(features.get(config.image_column), datasets.Image):
        stored = columns.get(config.image_column)
        image = stored if stored is not None and pa.types.is_struct(stored.type) else None
    declared = features.get(config.label_column)
    classes = list(declared.names) if isinstance(declared, datasets.ClassLabel) and declared.names else None
    labels = None
    if label is not None:
        labels = strings(label, config.label_column, place)
        if classes is not None and pa.types.is_integer(label.type):
            labels = _names_of(label, classes, place)
        labels = pc.if_else(pc.is_in(labels, pa.array(NO_LABEL, labels.type)), None, labels)
    texts = None if text is None else strings(text, config.text_column, place)
    others, lists = further_columns(config)
    further = {name: strings(columns[name], name, place) for name in (*others, *lists) if name in columns}
    return Part(rows, kind, names, place, texts, labels, image, classes, chats, further)


def strings(column: pa.ChunkedArray, name: str, place: Callable[[int], str]) -> pa.ChunkedArray:
    """Return the values as strings: booleans as true and false, whole floats without a point, NaN as null."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    if pa.types.is_floating(column.type):  # pandas stores integers with a missing value as floats
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"column {name!r}: expected strings or numbers, got {column.type} ({place(0)})") from error


def read_lists(config: DataConfig, columns: dict[str, pa.ChunkedArray], place: Callable[[int], str]) -> None:
    """Replace the columns of lists of `Columns` by JSON."""
    for name in further_columns(config)[1]:
        if name in columns:
            columns[name] = as_json(columns[name], name, place)


def as_json(column: pa.ChunkedArray, name: str, place: Callable[[int], str]) -> pa.ChunkedArray:
    """Return each value of a column of lists or objects as JSON."""
    try:
        chunks = [[json.dumps(value, ensure_ascii=False) for value in chunk.to_pylist()] for chunk in column.chunks]
    except TypeError as error:
        raise UserError(
            f"column {name!r}: expected lists of objects with strings, got {column.type} ({place(0)})"
        ) from error
    return pa.chunked_array(chunks, pa.large_string())


def wanted(names: Sequence[str], config: DataConfig, place: str, chat_column: str = "") -> list[str]:
    """Return the run's columns that occur in `names`; an empty name asks for no column.

    Raises:
        UserError: one of them occurs twice.
    """
    others, lists = further_columns(config)
    columns = (config.text_column, config.label_column, config.image_column, chat_column, *others, *lists)
    asked = dict.fromkeys(filter(None, columns))
    present = [name for name in asked if name in names]
    for name in present:
        if names.count(name) > 1:
            raise UserError(f"column {name!r} occurs {names.count(name)} times in {place}")
    return present


def _names_of(numbers: pa.ChunkedArray, classes: list[str], place: Callable[[int], str]) -> pa.ChunkedArray:
    """Return the declared names of class numbers; -1 in `datasets` means no label."""
    numbers = numbers.cast(pa.int64())
    none = pc.is_in(numbers, pa.array([-1, -100]))
    wrong = pc.and_not(pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, len(classes))), none)
    if (row := pc.index(wrong, True).as_py()) >= 0:
        raise UserError(f"label {numbers[row]} in {place(row)} is not one of the {len(classes)} declared classes")
    return pa.chunked_array([pa.array(classes, pa.large_string())]).take(pc.if_else(none, None, numbers))


def joined(parts: Sequence[Part], named: str) -> Part:
    """Return the rows of all parts in order. Raises `UserError` if the parts do not have the same columns."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        same = [(a is None) == (b is None) for a, b in zip(_columns(first), _columns(part), strict=True)]
        if not all(same) or part.classes != first.classes or part.further.keys() != first.further.keys():
            raise UserError(
                f"the files of {named} differ: columns {listed(first.names)} ({first.place(0)}), "
                f"but {listed(part.names)} ({part.place(0)})"
            )
    texts, labels, images, chats = (
        None if column[0] is None else pa.chunked_array([chunk for part in column for chunk in part.chunks])
        for column in zip(*map(_columns, parts), strict=True)
    )
    further = {
        name: pa.chunked_array([chunk for part in parts for chunk in part.further[name].chunks], pa.large_string())
        for name in first.further
    }
    ends = list(accumulate(part.rows for part in parts))

    def place(row: int) -> str:
        number = bisect.bisect_right(ends, row)
        return parts[number].place(row - ends[number] + parts[number].rows)

    return Part(ends[-1], first.kind, first.names, place, texts, labels, images, first.classes, chats, further)


def _columns(part: Part) -> tuple[pa.ChunkedArray | None, ...]:
    return part.texts, part.labels, part.images, part.chats
