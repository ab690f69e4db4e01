"""Reading folders: the split of each file, and images in folders that have the names of their classes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa

from tlkernels.train.columns import Part, joined
from tlkernels.train.config import DataConfig
from tlkernels.train.errors import UserError, listed, one_line
from tlkernels.train.files import ENDINGS, ending, read_file
from tlkernels.train.images import image_endings

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NAMED = {word: split for split, words in _SPLITS.items() for word in words}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b.*")
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")

Splits = dict[str, Callable[[], Part]]


def read_folder(folder: Path, config: DataConfig) -> Splits:
    """Return the splits of a folder of images or data files; each is a function that reads it.

    Raises:
        UserError: the folder has neither images nor data files, or both, or some files belong to a split and others to
            none.
    """
    files = files_of(folder)
    images = [file for file in files if file.suffix.lower() in image_endings()]
    rows = [file for file in files if is_data(file)]
    lists = [file for file in rows if file.stem == "metadata"] if images else []
    rows = [file for file in rows if file not in lists]
    if images and rows:
        image, file = images[0].relative_to(folder), rows[0].relative_to(folder)
        raise UserError(f"{folder} has images ({image}) and data files ({file}); name a folder of one kind, or a file")
    if images:
        return _image_splits(folder, images, lists, config)
    if rows:
        return row_splits(folder, rows, config)
    raise UserError(f"{folder} has no images and no files with the endings {' '.join(ENDINGS)}")


def is_data(file: Path) -> bool:
    """Return whether a file has rows by its ending, and is not a description that `datasets` writes."""
    return ending(file) is not None and file.name not in _DESCRIPTIONS


def files_of(folder: Path) -> list[Path]:
    """Return all files under a folder except hidden ones, sorted by name.

    Raises:
        UserError: a subfolder cannot be read, or `datasets` wrote the folder in its own format.
    """
    files = list(_walk(folder))
    if any(file.name in ("dataset_dict.json", "state.json") for file in files):
        raise UserError(f"{folder} was written by save_to_disk, which is not supported; use to_parquet")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files under a folder except hidden ones, sorted by name; follows links, except in circles."""
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        parent = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__")) and not parent.resolve().is_relative_to((parent / name).resolve())
        )
        yield from (parent / name for name in sorted(names) if not name.startswith("."))


def _refuse(error: OSError) -> None:
    """Raise for a subfolder that cannot be read; `os.walk` would skip it."""
    raise UserError(f"cannot read {error.filename}: {one_line(error)}") from error


def split_name(*parts: str) -> str | None:
    """Return the split of the first name that has the word of exactly one split, or None."""
    for part in parts:
        if shard := _SHARD.fullmatch(part):
            return _NAMED.get(shard[1], shard[1])
        splits = {_NAMED[word] for word in re.findall("[a-z]+", part.lower()) if word in _NAMED}
        if len(splits) == 1:
            return splits.pop()
    return None


# ---- data files --------------------------------------------------------------------------------------------------


def row_splits(folder: Path, files: list[Path], config: DataConfig, chat_column: str = "") -> Splits:
    """Return the splits of data files, each named by its file or the closest folder with the name of a split.

    Raises:
        UserError: some files belong to a split and others to none, or a split has files of several formats.
    """
    splits: dict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        parts = file.relative_to(folder).parts
        splits[split_name(*reversed(parts))].append(file)
    if None in splits and len(splits) > 1:
        named = listed(sorted(filter(None, splits)))
        raise UserError(f"{splits[None][0]} belongs to no split, while other files belong to {named}")
    for split, group in splits.items():
        kinds = {"".join(file.suffixes[-2:] if file.suffix.lower() == ".gz" else [file.suffix]) for file in group}
        if len(kinds) > 1:
            raise UserError(f"{folder} has {split or 'its rows'} more than once: as {' and as '.join(sorted(kinds))}")
    read = partial(_read_all, named=str(folder), config=config, chat_column=chat_column)
    return {split or "train": partial(read, group) for split, group in splits.items()}


def _read_all(files: list[Path], named: str, config: DataConfig, chat_column: str) -> Part:
    return joined([read_file(file, config, chat_column) for file in files], named)


# ---- images ------------------------------------------------------------------------------------------------------


def _image_splits(folder: Path, images: list[Path], lists: list[Path], config: DataConfig) -> Splits:
    """Return the splits of images: one subfolder for each class, in one for each split if there are several."""
    depth = 2 if lists else 3  # parts of the paths under a split: no class's folder if a list gives the classes
    tops = {image.relative_to(folder).parts for image in images}
    in_splits = all(len(parts) >= depth and split_name(parts[0]) for parts in tops)

    def grouped(files: list[Path]) -> dict[str, list[Path]]:
        groups: dict[str, list[Path]] = defaultdict(list)
        for file in files:
            groups[(split_name(file.relative_to(folder).parts[0]) or "train") if in_splits else "train"].append(file)
        return groups

    if lists:
        return {split: partial(_read_listed, group, config) for split, group in grouped(lists).items()}
    for image in images:
        if image.parent == folder:
            raise UserError(f"{image} is not in the subfolder of a class")
        if os.fsencode(image).decode(errors="ignore") != str(image):
            raise UserError(f"the name {str(image)!r} is not UTF-8")
    return {split: partial(_read_images, group, config) for split, group in grouped(images).items()}


def _read_images(images: list[Path], config: DataConfig) -> Part:
    labels = [image.parent.name for image in images]
    return _image_part(images, pa.chunked_array([labels], pa.large_string()), [], config)


def _read_listed(lists: list[Path], config: DataConfig) -> Part:
    """Return the images that the column file_name of metadata.csv (.jsonl, .parquet) lists, and its other columns."""
    rows = joined([read_file(file, replace(config, text_column="file_name")) for file in lists], str(lists[0]))
    if rows.texts is None:
        raise UserError(f"{lists[0]} has no column 'file_name', only {listed(rows.names)}")
    images = []
    for row, name in enumerate(rows.texts.to_pylist()):
        paths = [file.parent / (name or "") for file in lists]
        image = next((path for path in paths if path.is_file()), None)
        if image is None:
            raise UserError(f"no such image: {name!r} in {rows.place(row)}")
        images.append(image)
    return replace(_image_part(images, rows.labels, rows.names, config), further=rows.further)


def _image_part(images: list[Path], labels: pa.ChunkedArray | None, names: list[str], config: DataConfig) -> Part:
    stored = datasets.Image().cast_storage(pa.array([str(image) for image in images], pa.string()))
    names = [config.image_column, *(names or filter(None, [config.label_column]))]
    return Part(len(images), "images", names, lambda row: str(images[row]), None, labels, pa.chunked_array([stored]))
