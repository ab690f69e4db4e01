"""The rows as inputs of the model: tokenised texts, or decoded images."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from tlkernels.train.data import Table
from tlkernels.train.errors import UserError, one_line
from tlkernels.train.images import to_rgb
from tlkernels.train.task import Rows

_BATCH = 4096  # texts tokenised at a time


class LabelledRows(Rows, Protocol):
    """Rows with a class each.

    Attributes:
        labels: the class of each row, or `IGNORE`.
        classes: the number of classes.
    """

    labels: Tensor
    classes: int

    def inputs(self, numbers: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """Return the model's arguments for the rows with these numbers."""
        ...


class TextRows(LabelledRows):
    """Texts, tokenised once, and padded to the longest row of each batch."""

    def __init__(self, table: Table, tokenizer: Any, max_length: int, classes: int) -> None:
        """Tokenise `table`; a text is cut to `max_length` tokens."""
        self.labels, self.classes, self.tokenizer = torch.tensor(table.labels), classes, tokenizer
        # The tokens of all rows in one tensor: lists of Python integers would take ten times the memory.
        ids, lengths = [], []
        for start in range(0, len(table.labels), _BATCH):
            texts = list(table.rows[start : start + _BATCH][table.column])
            encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
            ids.append(torch.tensor([number for row in encoded for number in row], dtype=torch.int32))
            lengths.append(torch.tensor([len(row) for row in encoded]))
        self.ids, self.lengths = torch.cat(ids), torch.cat(lengths)
        self.ends = self.lengths.cumsum(0)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def inputs(self, numbers: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """Return token ids and the attention mask."""
        spans = zip((self.ends - self.lengths)[numbers].tolist(), self.ends[numbers].tolist(), strict=True)
        chosen = {"input_ids": [self.ids[start:end].tolist() for start, end in spans]}
        padded = self.tokenizer.pad(chosen, return_tensors="pt")
        return {"input_ids": padded["input_ids"].to(device), "attention_mask": padded["attention_mask"].to(device)}

    def fingerprint(self) -> str:
        """Return a digest of the labels and the token ids."""
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16)
        for ids in self.ids.split(1 << 20):
            digest.update(ids.long().numpy().tobytes())
        return digest.hexdigest()


class ImageRows(LabelledRows):
    """Images, decoded and scaled for each batch."""

    def __init__(self, table: Table, processor: Any, classes: int) -> None:
        """Take the rows of `table` as they are."""
        self.table, self.processor, self.classes = table, processor, classes
        self.labels = torch.tensor(table.labels)
        self.lengths = torch.zeros(len(table.labels), dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def inputs(self, numbers: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """Return pixel values. Raises `UserError` for an image that cannot be read."""
        images = [self._image(number) for number in numbers.tolist()]
        return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"].to(device)}

    def _image(self, number: int) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about metadata; an image that cannot be read raises
                return to_rgb(self.table.rows[number][self.table.column])
        except Exception as error:  # for a bad file Pillow raises OSError, SyntaxError, struct.error and others
            raise UserError(f"the image in {self.table.place(number)} cannot be read: {one_line(error)}") from error

    def fingerprint(self) -> str:
        """Return a digest of the labels."""
        return hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=16).hexdigest()
