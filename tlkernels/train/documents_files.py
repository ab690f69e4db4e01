"""Reading documents from text files, files of records, folders and hub data sets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tlkernels.train.columns import Part
from tlkernels.train.config import DataConfig
from tlkernels.train.data import hub_splits, local_path
from tlkernels.train.documents_config import CorpusConfig
from tlkernels.train.errors import UserError, listed, shown
from tlkernels.train.files import ENDINGS, read_file, read_text
from tlkernels.train.folders import files_of, is_data, row_splits, split_name

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
ROLES = ("system", "user", "assistant", "tool")
Chat = list[dict[str, str]]  # messages with the keys role and content


@dataclass(frozen=True)
class Documents:
    """The documents of one side: texts or chats, of which the other is None.

    Attributes:
        texts: the text of each document.
        chats: the messages of each document.
        place: document number -> its file, or its place there.
        kind: "text", the ending of a file of records, "hub" or "built-in".
        split: the split of `--data.path` that this is, or None if it is a share or from another path.
    """

    texts: list[str] | None
    chats: list[Chat] | None
    place: Callable[[int], str]
    kind: str
    split: str | None = None

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._all)

    @property
    def _all(self) -> Sequence[Any]:
        return self.texts if self.texts is not None else self.chats or ()

    def select(self, numbers: list[int]) -> Documents:
        """Return the documents with these numbers, in their order here."""
        chosen = sorted(numbers)
        texts = None if self.texts is None else [self.texts[number] for number in chosen]
        chats = None if self.chats is None else [self.chats[number] for number in chosen]
        return Documents(texts, chats, lambda row: self.place(chosen[row]), self.kind)


DocumentSplits = dict[str, Callable[[], Documents]]


def open_documents(path: str, config: CorpusConfig) -> DocumentSplits:
    """Return the splits of `path`, each a function that reads it; a file has one, `train`.

    Raises:
        UserError: there is no such file or data set, or a folder has files of both kinds or of none.
    """
    if Path(path).suffix.lower() in TEXT_ENDINGS and not Path(path).expanduser().exists():
        raise UserError(f"no such file or folder: {path}")
    local = local_path(path)
    # An empty name asks for no column.
    columns = DataConfig(
        subset=config.subset,
        text_column=config.text_column,
        label_column="",
        image_column="",
        encoding=config.encoding,
    )
    rows: dict[str, Callable[[], Part]]
    if local is None:
        rows = hub_splits(path, columns, config.chat_column)
    elif local.is_file():
        if local.suffix.lower() in TEXT_ENDINGS:
            return {"train": partial(_read_texts, [local], config)}
        rows = {"train": partial(read_file, local, columns, config.chat_column)}
    else:
        texts, data = _by_kind(local)
        if texts:
            return _text_splits(local, texts, config)
        rows = row_splits(local, data, columns, config.chat_column)
    return {split: partial(_of_rows, read, config) for split, read in rows.items()}


def _by_kind(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the text files or the data files of a folder, and an empty list."""
    files = files_of(folder)
    data = [file for file in files if is_data(file)]
    texts = [file for file in files if file.suffix.lower() in TEXT_ENDINGS]
    if data:  # a data set's README.md describes it
        texts = [file for file in texts if not (file.parent == folder and file.name.lower() == "readme.md")]
    if texts and data:
        text, file = texts[0].relative_to(folder), data[0].relative_to(folder)
        raise UserError(
            f"{folder} has text files ({text}) and data files ({file}); name a folder of one kind, or a file"
        )
    if not texts and not data:
        raise UserError(f"{folder} has no files with the endings {' '.join((*TEXT_ENDINGS, *ENDINGS))}")
    return texts, data


def _text_splits(folder: Path, files: list[Path], config: CorpusConfig) -> DocumentSplits:
    """Return the splits of text files: subfolders with the names of splits, if each file is in one."""
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        parts = file.relative_to(folder).parts
        splits[(split_name(parts[0]) if len(parts) > 1 else None) or ""].append(file)
    if "" in splits:
        splits = {"train": files}
    return {split: partial(_read_texts, group, config) for split, group in splits.items()}


def _read_texts(files: list[Path], config: CorpusConfig) -> Documents:
    """Return the text of each file; a file without text, such as many an __init__.py, is no document."""
    texts = {str(file): read_text(file, config.encoding) for file in files}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise UserError(f"{files[0]} is empty" if len(files) == 1 else f"all {len(files)} text files are empty")
    names = list(texts)
    return Documents(list(texts.values()), None, lambda row: names[row], "text")


# ---- records -----------------------------------------------------------------------------------------------------


def _of_rows(read: Callable[[], Part], config: CorpusConfig) -> Documents:
    part = read()
    if part.texts is not None:
        texts = part.texts.to_pylist()
        for row, text in enumerate(texts):
            if not (text or "").strip():
                raise UserError(f"{part.place(row)} has no text in column {config.text_column!r}")
        return Documents(texts, None, part.place, part.kind)
    if part.chats is not None:
        values = map(json.loads, part.chats.to_pylist())
        chats = [_chat(value, f"{part.place(row)}, column {config.chat_column!r}") for row, value in enumerate(values)]
        return Documents(None, chats, part.place, part.kind)
    if config.chat_column in part.names:
        raise UserError(f"column {config.chat_column!r}: chats are read from JSON and Parquet, not from {part.kind}")
    raise UserError(
        f"no text column {config.text_column!r} and no chat column {config.chat_column!r}; the columns are "
        f"{listed(part.names)} (--data.text_column, --data.chat_column)"
    )


def _chat(value: Any, place: str) -> Chat:
    """Return the messages of a chat, checked. In Parquet, a key that a message does not have is null."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: expected a list of messages, got {shown(value)}")
    chat: Chat = []
    for number, given in enumerate(value, start=1):
        at = f"{place}, message {number}"
        if not isinstance(given, dict):
            raise UserError(f"{at}: expected an object with role and content, got {shown(given)}")
        message = {key: item for key, item in given.items() if item is not None}
        if unknown := sorted(message.keys() - {"role", "content"}):
            raise UserError(f"{at}: expected the keys role and content, got also {listed(unknown)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{at}: expected a role of {listed(ROLES)}, got {shown(role)}")
        if not isinstance(content, str):
            raise UserError(f"{at}: expected a string as content, got {shown(content)}")
        chat.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in chat):
        raise UserError(f"{place}: no message of the role assistant, so nothing to train on")
    return chat
