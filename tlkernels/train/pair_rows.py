"""The rows of contrastive training as inputs of the encoders."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor

from tlkernels.train.data import Table
from tlkernels.train.pairs import Pairs
from tlkernels.train.rows import ImageRows, TextRows
from tlkernels.train.task import Rows

Inputs = dict[str, Tensor]
SMALLEST = 0.5  # share of an image's area in an augmented view
_RATIO = 4 / 3  # the largest stretch of a view


class PairRows(Rows):
    """Queries, keys and hard negatives: texts, tokenised once, or images, decoded for each batch.

    Attributes:
        lengths: the tokens of each row, together; 0 for images.
        negatives: the number of hard negatives of each row.
    """

    def __init__(
        self,
        pairs: Pairs,
        query_processor: Any,
        key_processor: Any,
        query_length: int,
        key_length: int,
        augment: bool | None = None,
    ) -> None:
        """Tokenise the texts of `pairs`; a query or a key is cut to its number of tokens.

        `augment` says whether `inputs` augments images if it gets a seed. None: if the rows have neither keys nor
        labels, so that two views of each are compared.
        """
        self.views = pairs.keys is None and pairs.labels is None
        self.augment = self.views if augment is None else augment
        self.ids = torch.tensor(pairs.ids)
        self.labels = None if pairs.labels is None else torch.tensor(pairs.labels)
        self.negatives = len(pairs.negatives[0]) if pairs.negatives else 0
        self.queries = _side(pairs.queries, pairs, query_processor, query_length)
        self.keys = None if pairs.keys is None else _side(pairs.keys, pairs, key_processor, key_length)
        self.negative_rows: TextRows | None = None
        self.lengths = self.queries.lengths.clone()
        if self.keys is not None:
            self.lengths += self.keys.lengths
        if pairs.negatives:
            texts = [text for row in pairs.negatives for text in row]
            self.negative_rows = _texts(texts, pairs, key_processor, key_length)
            self.lengths += self.negative_rows.lengths.view(-1, self.negatives).sum(1)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def inputs(self, numbers: Tensor, device: torch.device | str, seed: int | None = None) -> dict[str, Any]:
        """Return the arguments of the encoders, the ids and the labels of the rows with these numbers.

        Args:
            numbers: the rows.
            device: the device of the tensors.
            seed: with the row's number, decides the augmentation of an image; None: no augmentation.

        Returns:
            "query", "key" and "negatives" are an encoder's arguments, or None. The hard negatives are those of the
            first row, of the second, and so on. Without keys and labels, "key" is a second view of "query": another
            augmentation of each image, or the same tokens. "ids" and "labels" are tensors; "labels" may be None.

        Raises:
            UserError: an image cannot be read.
        """
        views = 2 if self.views else 1
        query, *others = _inputs(self.queries, numbers, device, seed if self.augment else None, views)
        key = others[0] if others else None
        if self.keys is not None:
            [key] = _inputs(self.keys, numbers, device, seed if self.augment else None, 1)
        negatives = None
        if self.negative_rows is not None:
            chosen = numbers[:, None] * self.negatives + torch.arange(self.negatives)
            negatives = self.negative_rows.inputs(chosen.flatten(), device)
        labels = None if self.labels is None else self.labels[numbers].to(device)
        return {
            "query": query,
            "key": key,
            "negatives": negatives,
            "ids": self.ids[numbers].to(device),
            "labels": labels,
        }

    def fingerprint(self) -> str:
        """Return a digest of the ids, the labels and the token ids."""
        digest = hashlib.blake2b(self.ids.numpy().tobytes(), digest_size=16)
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        for rows in (self.queries, self.keys, self.negative_rows):
            digest.update((rows.fingerprint() if rows is not None else "").encode())
        return digest.hexdigest()


def _side(values: Any, pairs: Pairs, processor: Any, length: int) -> TextRows | _Images:
    if isinstance(values, datasets.Dataset):
        return _Images(Table(values, values.column_names[0], [0] * len(pairs), pairs.place), processor, classes=1)
    return _texts(values, pairs, processor, length)


def _texts(texts: list[str], pairs: Pairs, tokenizer: Any, length: int) -> TextRows:
    table = datasets.table.InMemoryTable(pa.table({"text": pa.array(texts, pa.large_string())}))
    rows = datasets.Dataset(table, fingerprint="0")
    return TextRows(Table(rows, "text", [0] * len(texts), pairs.place), tokenizer, length, classes=1)


def _inputs(
    rows: TextRows | _Images, numbers: Tensor, device: torch.device | str, seed: int | None, views: int
) -> list[Inputs]:
    """Return as many views of the rows: different ones of images if there is a seed, otherwise the same."""
    if isinstance(rows, TextRows) or seed is None:
        return [rows.inputs(numbers, device)] * views
    return rows.augmented(numbers, device, seed, views)


class _Images(ImageRows):
    def augmented(self, numbers: Tensor, device: torch.device | str, seed: int, views: int) -> list[Inputs]:
        """Return the pixel values of different views of each image."""
        images = [self._image(number) for number in numbers.tolist()]
        results = []
        for view in range(views):
            draws = (random.Random(f"{seed} {number} {view}") for number in numbers.tolist())
            chosen = [random_view(image, draw) for image, draw in zip(images, draws, strict=True)]
            pixels = self.processor(images=chosen, return_tensors="pt")["pixel_values"]
            results.append({"pixel_values": pixels.to(device)})
        return results


def random_view(image: Any, draw: random.Random) -> Any:
    """Return a random part of a PIL image, at least `SMALLEST` of its area, at the image's size, perhaps mirrored."""
    from PIL import Image

    area = draw.uniform(SMALLEST, 1)
    most = min(math.log(_RATIO), -math.log(area))  # with a larger stretch, the part would not fit in the image
    stretch = math.exp(draw.uniform(-most, most))
    width, height = image.width * math.sqrt(area * stretch), image.height * math.sqrt(area / stretch)
    left, top = draw.uniform(0, image.width - width), draw.uniform(0, image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    part = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part
