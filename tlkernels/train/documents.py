"""The documents of language modelling on their sides: a held-out side has whole documents, such as whole files."""

from __future__ import annotations

from dataclasses import replace

import torch

from tlkernels.train import docstrings
from tlkernels.train.documents_config import CorpusConfig
from tlkernels.train.documents_files import Documents, DocumentSplits, open_documents
from tlkernels.train.errors import UserError, listed
from tlkernels.train.files import OPTIONS

SOURCES = 40  # files of the built-in data for causal models: an epoch is some minutes on two cores
_TAKERS = {"subset": OPTIONS["subset"], "encoding": ("text", *OPTIONS["encoding"])}  # options and kinds of data


def load_documents(config: CorpusConfig, seed: int, causal: bool, sources: int = SOURCES) -> dict[str, Documents]:
    """Read the documents of "train", "eval" and "test"; `seed` decides the split if none is given.

    `causal` selects the built-in documents, of which there are `sources` files if no number is given. "test" is "eval"
    if `test_fraction` is 0.

    Raises:
        UserError: something cannot be read, a column is missing, a text is empty, a chat is not a list of messages, or
            there are too few documents.
    """
    if config.path is None:
        _refuse_unused(config, set())
        sides = _built_in_sources(config, sources) if causal else _built_in_docstrings(config)
    else:
        if config.documents is not None:
            raise UserError("--data.documents applies to the built-in data; --data.path names others")
        sides = _sides(config.path, config)
        _refuse_unused(config, {documents.kind for documents in sides.values()})
        order = torch.randperm(len(sides["train"]), generator=torch.Generator().manual_seed(seed))
        sides = _with_shares(sides, order.tolist(), config)
    sides.setdefault("test", sides["eval"])
    for side, documents in sides.items():
        if (documents.texts is None) != (sides["train"].texts is None):
            kinds = ("texts", "chats") if documents.texts is None else ("chats", "texts")
            raise UserError(f"the train documents are {kinds[0]}, but those of {side} are {kinds[1]}")
    return sides


def _sides(path: str, config: CorpusConfig) -> dict[str, Documents]:
    """Return "train" and the sides that are named."""
    splits = open_documents(path, config)
    sides = {"train": _read(splits, config.split, path)}
    for side, value in (("eval", config.eval), ("test", config.test)):
        if value is not None:
            if value in splits:
                sides[side] = replace(_read(splits, value, path), split=value)
            else:
                sides[side] = _read(open_documents(value, config), "train", value)
    return sides


def _with_shares(sides: dict[str, Documents], order: list[int], config: CorpusConfig) -> dict[str, Documents]:
    """Take the sides that were not named from the training documents, in this order."""
    train = sides["train"]
    for side, share in (("eval", config.eval_fraction), ("test", config.test_fraction)):
        if side not in sides and share > 0:
            count = max(1, round(share * len(train)))
            sides[side], order = train.select(order[:count]), order[count:]
    sides["train"] = train.select(order)
    if not order or not all(len(documents) for documents in sides.values()):
        name = config.path or "the built-in data"
        raise UserError(
            f"too few documents to train, evaluate and test on: {name} has {len(train)}; a text file is one document "
            "(--data.eval and --data.test name others)"
        )
    return sides


def _read(splits: DocumentSplits, split: str, path: str) -> Documents:
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}, only {listed(list(splits))}")
    documents = splits[split]()
    if len(documents) == 0:
        raise UserError(f"{path} has no documents in {split!r}")
    return documents


def _refuse_unused(config: CorpusConfig, kinds: set[str]) -> None:
    """Raise for an option that is given and applies to no file that is read."""
    for name, takers in _TAKERS.items():
        if getattr(config, name) is not None and not kinds.intersection(takers):
            raise UserError(f"--data.{name} applies to {listed(takers)}; the data are of another kind")


# ---- the built-in documents --------------------------------------------------------------------------------------


def _built_in_docstrings(config: CorpusConfig) -> dict[str, Documents]:
    """Return the texts of the built-in data of `finetune`, each on the same side as there."""
    split = docstrings.build()
    total = sum(map(len, split.values()))
    wanted = config.documents or total
    if wanted > total:
        raise UserError(f"--data.documents must be at most {total}, the number of docstrings, got {wanted}")
    counts = {side: max(1, round(len(rows) * wanted / total)) for side, rows in split.items()}
    return {
        side: _built_in([row.text for row in rows[: counts[side]]], [row.module for row in rows])
        for side, rows in split.items()
    }


def _built_in_sources(config: CorpusConfig, usual: int) -> dict[str, Documents]:
    files = docstrings.sources(config.documents or usual)
    train = _built_in(list(files.values()), list(files))
    least = min(2, (len(files) - 1) // 2) / len(files)  # one short file would say little
    of_test = max(config.test_fraction, least) if config.test_fraction else 0.0
    config = replace(config, eval_fraction=max(config.eval_fraction, least), test_fraction=of_test)
    return _with_shares({"train": train}, list(range(len(files))), config)


def _built_in(texts: list[str], modules: list[str]) -> Documents:
    return Documents(texts, None, lambda row: modules[row], "built-in")
