"""Masks of masked language modelling, as in BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1).

The masks of a row depend on the seed, the step and the row's number alone: not on the other rows of its micro-batch,
nor on padding, processes or device. So a resumed run has the same masks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlkernels.train.errors import UserError
from tlkernels.train.packing import IGNORE, Batch
from tlkernels.train.pieces import special_ids

_MASKED, _RANDOM = 0.8, 0.1  # shares of the chosen tokens; the others stay as they are


@dataclass(frozen=True)
class MaskTokens:
    """The mask token of a tokenizer, and the tokens that are not special, of which a random one is drawn."""

    mask: int
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> MaskTokens:
        """Return those of a tokenizer. Raises `UserError` if it has no mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token, so the model is not a masked language model")
        ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
        ordinary[torch.tensor(special_ids(tokenizer))] = False
        return cls(int(tokenizer.mask_token_id), ordinary.nonzero().flatten())


def masked(
    batch: Batch,
    numbers: Tensor,
    tokens: MaskTokens,
    *,
    seed: int,
    step: int | None,
    probability: float = 0.15,
    whole_words: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the token ids with masks, and the targets: the original ids of the chosen tokens, elsewhere `IGNORE`.

    Of a row's n counted tokens, `round(probability * n)` are chosen, but at least one. Of these, 80% become the mask
    token, 10% a random token, and 10% stay. A fixed number, as in BERT's code, and no draw for each token: every row
    has a target, and the number of targets varies less between steps.

    Args:
        batch: rows on the CPU.
        numbers: the number of each row.
        tokens: the tokens that take the place of the chosen ones.
        seed: the run's seed.
        step: the optimiser step; None for the masks of evaluations, which are always the same.
        probability: share of the counted tokens.
        whole_words: choose words, with all their tokens, until the number is reached; the last one may exceed it.

    Raises:
        ValueError: `whole_words` is true, but the rows have no words.
    """
    if whole_words and batch.word is None:
        raise ValueError("whole_words: expected rows made with words=True, got a batch without words")
    ids, targets = batch.ids.clone(), torch.full_like(batch.ids, IGNORE)
    for line, number in enumerate(numbers.tolist()):
        places = batch.counted[line].nonzero().flatten()
        if len(places) == 0:
            continue  # a row of nothing but special tokens
        draw = _generator(seed, step, number)
        count = max(1, round(probability * len(places)))
        if whole_words and batch.word is not None:
            chosen = places[_words(batch.word[line, places], count, draw)]
        else:
            chosen = places[torch.randperm(len(places), generator=draw)[:count]]
        targets[line, chosen] = batch.ids[line, chosen]
        share = torch.rand(len(chosen), generator=draw)
        random = tokens.ordinary[torch.randint(len(tokens.ordinary), (len(chosen),), generator=draw)]
        changed = torch.where(share < _MASKED + _RANDOM, random, batch.ids[line, chosen])
        ids[line, chosen] = torch.where(share < _MASKED, tokens.mask, changed)
    return ids, targets


def _generator(seed: int, step: int | None, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _words(words: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Return the indices of the tokens of randomly chosen words, `count` tokens or those that complete a word."""
    numbers, word, sizes = words.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(numbers), generator=draw)
    before = sizes[order].cumsum(0) - sizes[order]
    chosen = torch.zeros(len(numbers), dtype=torch.bool)
    chosen[order[before < count]] = True
    return chosen[word].nonzero().flatten()
