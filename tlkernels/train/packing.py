"""Rows of language modelling: the pieces of documents, as many in a row as fit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlkernels.train.documents_files import Documents
from tlkernels.train.pieces import cut

IGNORE = -100  # the target of a token without one


@dataclass(frozen=True)
class Batch:
    """Some rows, padded on the right to the longest: tensors of shape (rows, tokens).

    Attributes:
        ids: token ids.
        piece: the number of the token's piece in its row, or -1 for padding.
        position: the token's position in its piece, or 0 for padding.
        counted: whether the token may be a target.
        word: the number of the token's word in its row, or -1 if it is not counted. None if the rows have no words.
    """

    ids: Tensor
    piece: Tensor
    position: Tensor
    counted: Tensor
    word: Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return Batch(**moved)


class PackedRows:
    """Documents as rows of at most `length` tokens.

    A document is cut into pieces of at most `length` tokens. The pieces are packed by best fit in decreasing order of
    length, with which no piece is cut to fill up a row (Ding et al. 2024, "Fewer Truncations Improve Language
    Modeling", https://arxiv.org/abs/2404.10830).

    Attributes:
        lengths: the number of tokens of each row.
        counts: the number of tokens of each row that may be targets; in a causal model, the first of a piece is none.
    """

    lengths: Tensor
    counts: Tensor

    def __init__(
        self, documents: Documents, tokenizer: Any, length: int, *, causal: bool, pack: bool, words: bool = False
    ) -> None:
        """Tokenise the documents; with `pack=False` each piece is a row. Raises as `pieces.cut` does."""
        # All tokens in one tensor: lists of Python integers would take ten times the memory.
        self.tokens, self.piece_lengths = cut(documents, tokenizer, length, causal=causal, words=words)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.padding = 0 if padding is None else padding  # any token works, since the attention mask hides it
        lengths = self.piece_lengths
        rows = best_fit(lengths.tolist(), length) if pack else [[piece] for piece in range(len(lengths))]
        self.pieces = torch.tensor([piece for row in rows for piece in row])
        self.row_sizes = torch.tensor([len(row) for row in rows])
        self.row_ends, self.piece_ends = self.row_sizes.cumsum(0), lengths.cumsum(0)
        sums, starts = torch.cat([torch.tensor([0]), self.tokens.counted.cumsum(0)]), self.piece_ends - lengths
        counts = sums[self.piece_ends] - sums[starts + 1 if causal else starts]
        row, zeros = torch.arange(len(rows)).repeat_interleave(self.row_sizes), torch.zeros(len(rows)).long()
        self.lengths = zeros.index_add(0, row, lengths[self.pieces])
        self.counts = zeros.index_add(0, row, counts[self.pieces])

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def fingerprint(self) -> str:
        """Return a digest of the tokens and of the rows' structure."""
        digest = hashlib.blake2b(digest_size=16)
        starts = [] if self.tokens.starts is None else [self.tokens.starts]
        for values in (self.pieces, self.row_ends, self.piece_ends, self.tokens.ids, self.tokens.counted, *starts):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, numbers: Tensor) -> Batch:
        """Return the rows with these numbers."""
        lengths, counts = self.lengths[numbers], self.row_sizes[numbers]
        pieces = self.pieces[_ranges(counts, self.row_ends[numbers] - counts)]
        sizes = self.piece_lengths[pieces]
        tokens = _ranges(sizes, self.piece_ends[pieces] - sizes)
        places = torch.arange(len(numbers)).repeat_interleave(lengths), _ranges(lengths)

        def padded(values: Tensor, padding: int | bool) -> Tensor:
            result = torch.full((len(numbers), int(lengths.max())), padding)
            result[places] = values.to(result.dtype)
            return result

        counted, position = padded(self.tokens.counted[tokens], False), _ranges(sizes)
        word = None
        if self.tokens.starts is not None:
            starts = padded(self.tokens.starts[tokens] | (position == 0), False)
            word = (starts.cumsum(1) - 1).masked_fill(~counted, -1)
        piece = padded(_ranges(counts).repeat_interleave(sizes), -1)
        return Batch(padded(self.tokens.ids[tokens], self.padding), piece, padded(position, 0), counted, word)


def _ranges(lengths: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return start, start + 1, ... with each of these lengths, one after the other; None: all start at 0."""
    shift = lengths - lengths.cumsum(0) + (0 if starts is None else starts)
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Return rows of piece numbers; a row has at most `room` tokens.

    The longest piece is placed first, each in the fullest row that has room for it. The rooms of the rows are bits of
    one integer, in which a shift finds the smallest that is large enough: the time grows as the number of pieces.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # room -> the rows with that much
    rooms = 0
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        large_enough = rooms >> lengths[piece]
        if large_enough:
            left = (large_enough & -large_enough).bit_length() - 1
            row = with_room[left + lengths[piece]].pop()
            if not with_room[left + lengths[piece]]:
                rooms ^= 1 << (left + lengths[piece])
        else:
            left, row = room - lengths[piece], len(rows)
            rows.append([])
        rows[row].append(piece)
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


def causal_targets(batch: Batch) -> Tensor:
    """Return the next token of each token, or `IGNORE` if that is not counted or belongs to another piece."""
    same = batch.counted[:, 1:] & (batch.piece[:, 1:] == batch.piece[:, :-1])
    targets = torch.full_like(batch.ids, IGNORE)
    targets[:, :-1] = torch.where(same, batch.ids[:, 1:], IGNORE)
    return targets
