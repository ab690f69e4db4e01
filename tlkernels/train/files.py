"""Reading files of rows. The values of a file are the strings that it contains, unchanged.

Nothing is guessed: the ending gives the format, the header or the keys give the columns, and the options `encoding`,
`separator` and `quotes` give the rest. Nothing is cached: every run reads the file again.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from tlkernels.train.columns import Part, as_json, further_columns, part_of, read_lists, wanted
from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, one_line

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".ndjson")
# Options and the kinds of data that they apply to; "hub" is a data set of the hub.
OPTIONS: dict[str, tuple[str, ...]] = {
    "subset": ("hub",),
    "encoding": tuple(name for name in ENDINGS if name != ".parquet"),
    "separator": (".csv", ".tsv"),
    "quotes": (".csv", ".tsv"),
}
_BATCH = 4096  # rows that are Python objects at a time; so 1 GB of CSV takes little more than 1 GB of memory
_Row = tuple[int, Sequence[str | None]]  # the line on which the row begins, and its values


def ending(path: Path) -> str | None:
    """Return the file's ending if it is one of `ENDINGS`, ignoring .gz and case; otherwise None."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in ENDINGS and not name.endswith(".parquet.gz") else None


def read_file(path: Path, config: DataConfig, chat_column: str = "") -> Part:
    """Return the text, label and image columns of a file, those of `Columns`, and the chat column if one is named.

    Raises:
        UserError: the file is empty or has another format than its ending says, a row has more or fewer fields than
            the header, or a byte is not valid in the encoding. The message names the line.
    """
    kind = ending(path)
    if kind is None:
        raise UserError(f"{path}: unknown file type; supported: {' '.join(ENDINGS)} (or .csv.gz and so on)")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        read = _read_parquet if kind == ".parquet" else partial(_read_text, kind=kind)
        return read(path, config=config, chat_column=chat_column)
    except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def read_text(path: Path, encoding: str | None) -> str:
    """Return the text of a file, line ends unchanged. Raises `UserError` if it cannot be read."""
    try:
        with _open_text(path, encoding) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _read_parquet(path: Path, config: DataConfig, chat_column: str) -> Part:
    with path.open("rb") as file:
        stored = parquet.ParquetFile(file)
        names, rows = stored.schema_arrow.names, stored.metadata.num_rows
        table = stored.read(columns=wanted(names, config, str(path), chat_column))
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
    features = datasets.Features.from_dict(described) if described else {}  # `datasets` writes them next to the rows
    columns = dict(zip(table.column_names, table.columns, strict=True))

    def place(row: int) -> str:
        return f"row {row} (from 0) of {path}"

    chats = as_json(columns[chat_column], chat_column, place) if chat_column in columns else None
    read_lists(config, columns, place)
    return part_of(config, columns, features, rows=rows, kind=".parquet", names=names, place=place, chats=chats)


def _read_text(path: Path, kind: str, config: DataConfig, chat_column: str) -> Part:
    names: list[str] = []
    with _open_text(path, config.encoding) as file:
        if kind in (".csv", ".tsv"):
            quotes = config.quotes if config.quotes is not None else kind == ".csv"
            separator = config.separator or ("," if kind == ".csv" else "\t")
            rows = _separated(file, path, "\t" if separator == r"\t" else separator, quotes, config, names)
        else:
            rows = _records(file, path, kind, config, chat_column, names)
        further, lists = further_columns(config)
        asked = (config.text_column, config.label_column, *further, *lists)
        (*columns, chats), lines = _gathered(rows, len(asked) + 1, path)
    present = {name: column for name, column in zip(asked, columns, strict=True) if name in names}
    chats = chats if chat_column in names and kind not in (".csv", ".tsv") else None

    def place(row: int) -> str:
        return f"line {lines[row]} of {path}"

    return part_of(config, present, {}, rows=len(lines), kind=kind, names=names, place=place, chats=chats)


def _gathered(rows: Iterator[_Row], columns: int, path: Path) -> tuple[list[pa.ChunkedArray], array[int]]:
    """Return the columns of the rows, and the line on which each row begins."""
    chunks: list[list[pa.Array]] = [[] for _ in range(columns)]
    lines = array("q")
    while batch := list(islice(rows, _BATCH)):
        lines.extend(line for line, _ in batch)
        for number, column in enumerate(chunks):
            try:
                column.append(pa.array([values[number] for _, values in batch], pa.large_string()))
            except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write as \ud800
                line = next(line for line, values in batch if values[number] == error.object)
                half = error.object[error.start]
                raise UserError(f"line {line} of {path} has half a surrogate pair, {half!r}") from error
    return [pa.chunked_array(column, pa.large_string()) for column in chunks], lines


# ---- characters --------------------------------------------------------------------------------------------------


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        yield file


@contextmanager
def _open_text(path: Path, encoding: str | None) -> Iterator[io.TextIOWrapper]:
    """Open a file for reading text, line ends unchanged; a byte order mark gives the encoding and is skipped."""
    with _open_bytes(path) as raw:
        if encoding is None:
            utf16 = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            encoding = "utf-16" if utf16 else "utf-8"
            raw.seek(0)
        file = io.TextIOWrapper(raw, encoding=encoding, newline="")
        try:
            if file.read(1) != "\ufeff":
                file.seek(0)
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {path}: {_undecodable(path, encoding)}") from error
        except UnicodeError as error:  # UTF-16 without its byte order mark
            raise UserError(f"cannot read {path} as {encoding}: {error} (--data.encoding)") from error


def _undecodable(path: Path, encoding: str) -> str:
    """Return a message with the first byte that is not valid in the encoding, and its line."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = offset = 0
    hint = "(--data.encoding names another encoding)"
    with _open_bytes(path) as file:
        while piece := file.read(1 << 16):
            before = decoder.getstate()
            try:
                line += decoder.decode(piece).count("\n")
            except UnicodeDecodeError:
                decoder.setstate(before)
                for number in range(len(piece)):
                    try:
                        line += decoder.decode(piece[number : number + 1]).count("\n")
                    except UnicodeDecodeError as error:
                        at = offset + number + 1 - len(error.object) + error.start
                        value = error.object[error.start]
                        return f"byte {at} (0x{value:02x}, line {line + 1}) is not valid {encoding} {hint}"
            offset += len(piece)
    return f"it ends in the middle of a character of {encoding} {hint}"


# ---- separated values --------------------------------------------------------------------------------------------


def _separated(
    file: io.TextIOWrapper, path: Path, separator: str, quotes: bool, config: DataConfig, names: list[str]
) -> Iterator[_Row]:
    """Yield rows of text, label, further columns, lists and no chat; appends the header to `names`."""
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
    rows = _lines(reader, path)
    line, header = next(rows, (0, []))
    if not header:
        raise UserError(f"cannot read {path}: it has no header")
    if "\0" in "".join(header):
        raise UserError(f"the header of {path} has NUL characters: is it UTF-16? (--data.encoding utf-16-le)")
    names += header
    wanted(names, config, f"the header of {path}")
    further, lists = further_columns(config)
    asked = (config.text_column, config.label_column, *further)
    places, list_places = (
        [names.index(name) if name in names else None for name in columns] for columns in (asked, lists)
    )
    for line, row in rows:
        if len(row) != len(header):
            hint = "" if quotes else "; quotation marks are read as text (--data.quotes true)"
            raise UserError(f"line {line} of {path} has {len(row)} fields, the header has {len(header)}{hint}")
        values = [None if place is None else row[place] for place in places]
        texts = [None if place is None else _as_json(row[place]) for place in list_places]
        yield line, [*values, *texts, None]


def _lines(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield every row that is not blank, and the line on which it begins; a quoted row may span several lines."""
    before = 0
    limit = csv.field_size_limit(2**31 - 1)  # a setting of the whole process; the default is 131072
    try:
        for row in reader:
            if row:
                yield before + 1, row
            before = reader.line_num
    except csv.Error as error:
        open_quote = "unexpected end" in str(error)
        fault = "a quotation mark is never closed" if open_quote else str(error)
        raise UserError(f"cannot read {path}: in the row on line {before + 1}, {fault}") from error
    finally:
        csv.field_size_limit(limit)


# ---- JSON --------------------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of an object; in a dict a repeated key would replace the first one."""


# Numbers stay strings. NaN is not JSON, but Python writes it; it is a missing value.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_Pairs,
    parse_int=str,
    parse_float=str,
    parse_constant=lambda name: None if name == "NaN" else name,
)
_SPACE = re.compile(r"[ \t\r\n]*")


def _records(
    file: io.TextIOWrapper, path: Path, kind: str, config: DataConfig, chat_column: str, names: list[str]
) -> Iterator[_Row]:
    """Yield rows of text, label, further columns, lists and chat; appends every key that occurs to `names`."""
    further, lists = further_columns(config)
    asked = (config.text_column, config.label_column, *further)
    known: dict[str, None] = {}
    start, first = file.tell(), " "
    while first and first.isspace():
        first = file.read(1)
    file.seek(start)
    values = _document(file.read(), path) if kind == ".json" or first == "[" else _each_line(file, path)
    for line, record in values:
        if not isinstance(record, _Pairs):
            raise UserError(f"cannot read {path}: line {line} is not an object with a key for each column")
        row = dict(record)
        if len(row) < len(record):
            wanted([key for key, _ in record], config, f"line {line} of {path}", chat_column)
        known.update(dict.fromkeys(row))
        nested = [_as_json(row[name]) if name in row else None for name in (*lists, chat_column)]
        yield line, [*(_string(row.get(name), name, line, path) for name in asked), *nested]
    names += known


def _string(value: Any, column: str, line: int, path: Path) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, str):
        return value
    kind = "an object" if isinstance(value, _Pairs) else "a list"
    raise UserError(f"line {line} of {path}, column {column!r}: expected a string or a number, got {kind}")


def _as_json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return a value with objects as dicts; of a repeated key, the last value counts, as in Python's `json`."""
    if isinstance(value, _Pairs):
        return {key: _plain(item) for key, item in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _each_line(file: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, start=1):
        if text.isspace():
            continue
        try:
            value = _DECODER.decode(text.rstrip())
        except (json.JSONDecodeError, RecursionError) as error:
            raise _json_fault(path, line, error) from error
        yield line, value


def _document(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the values of an array, or values that follow one another, and the line on which each begins."""
    line, counted, at = 1, 0, _skip(text, 0)
    array = text.startswith("[", at)
    if array:
        at = _skip(text, at + 1)
    more = at < len(text) and not (array and text[at] == "]")
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _json_fault(path, line, error) from error
        yield line, value
        at = _skip(text, at)
        more = text.startswith(",", at) if array else at < len(text)
        if array and more:
            at = _skip(text, at + 1)
    if array and text[at:].rstrip() != "]":
        fault = json.JSONDecodeError("expected a comma or the array's end, and no more", text, at)
        raise _json_fault(path, line, fault)


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _json_fault(path: Path, line: int, error: json.JSONDecodeError | RecursionError) -> UserError:
    """Return the error; `line` is where the value begins, `error.lineno` is 1 if the value was parsed alone."""
    if isinstance(error, RecursionError):
        return UserError(f"cannot read {path}: the value on line {line} is nested too deeply")
    return UserError(f"cannot read {path}: line {max(line, error.lineno)}, column {error.colno}: {error.msg}")
