"""Packed rows: no token is lost, no piece sees another one, and the right tokens are counted."""

import random
from collections import Counter

import pytest
import torch
import transformers
from lm_cases import CAUSAL, MODELS, TEMPLATE, WORDS, causal_tokenizer, documents, masked_tokenizer, tiny
from tokenizers import processors
from train_cases import quick

from tlkernels.train import UserError
from tlkernels.train.packed_inputs import model_inputs, position_offset, takes_additive_mask, verify_packing
from tlkernels.train.packing import Batch, PackedRows, best_fit, causal_targets

pytestmark = pytest.mark.usefixtures(quick.__name__)


def made_texts(count, seed=0, longest=60):
    """Return texts of 1 to `longest` words, most of them short."""
    draw = random.Random(seed)
    lengths = [1 + int((longest - 1) * draw.random() ** 3) for _ in range(count)]
    return [" ".join(draw.choice(WORDS) + draw.choice(["", "s", "ing"]) for _ in range(n)) for n in lengths]


def pieces_of(rows):
    """Return the pieces of all rows as tuples of ids and tuples of counted, from `batch`; checks the positions."""
    found = []
    for numbers in torch.randperm(len(rows)).split(7):
        batch = rows.batch(numbers)
        assert batch.ids.shape[1] == rows.lengths[numbers].max()
        for line, number in enumerate(numbers.tolist()):
            assert (batch.piece[line] >= 0).sum() == rows.lengths[number]
            for piece in range(int(batch.piece[line].max()) + 1):
                (places,) = torch.where(batch.piece[line] == piece)
                assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
                assert batch.position[line, places].tolist() == list(range(len(places)))
                found.append((tuple(batch.ids[line, places].tolist()), tuple(batch.counted[line, places].tolist())))
        assert not batch.counted[batch.piece < 0].any()
    return found


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "alone"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_no_token_is_lost_or_repeated(kind, pack):
    texts, length = made_texts(300), 24
    tokenizer = masked_tokenizer() if kind == "masked" else causal_tokenizer()
    expected = []
    for text in texts:
        if kind == "masked":
            ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
            for start in range(0, len(ids), length - 2):
                part = ids[start : start + length - 2]
                expected.append(((2, *part, 3), (False, *[True] * len(part), False)))
        else:
            ids = [0, *[tokenizer.convert_tokens_to_ids(character) for character in text], 1]  # <s> text </s>
            for start in range(0, len(ids), length):
                part = ids[start : start + length]
                expected.append((tuple(part), tuple(start + i > 0 for i in range(len(part)))))
    rows = PackedRows(documents(texts), tokenizer, length, causal=kind == "causal", pack=pack)
    assert Counter(pieces_of(rows)) == Counter(expected)
    assert rows.lengths.max() <= length
    assert rows.lengths.sum() == sum(len(ids) for ids, _ in expected)
    assert pack or len(rows) == len(expected)
    assert not pack or len(rows) < 1.03 * rows.lengths.sum() / length + 1


def test_little_is_padding_with_the_lengths_of_real_documents():
    """Lengths are log-normal, as of docstrings and chats; at most 0.5% of the tokens are padding."""
    lengths = torch.randn(20_000).mul(0.9).add(4.2).exp().long().clamp(3, 256).tolist()
    rows = best_fit(lengths, 256)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in row) <= 256 for row in rows)
    assert 1 - sum(lengths) / (256 * len(rows)) < 0.005


@pytest.mark.parametrize("room", [1, 10, 64, 200])
def test_pieces_are_packed_by_best_fit_in_decreasing_order(room):
    draw = random.Random(room)
    lengths = [draw.randint(1, room) for _ in range(300)]
    loads = []
    for length in sorted(lengths, reverse=True):
        fitting = [load for load in loads if load + length <= room]
        if fitting:
            loads.remove(max(fitting))
        loads.append(length + max(fitting, default=0))
    rows = best_fit(lengths, room)
    assert sorted(sum(lengths[piece] for piece in row) for row in rows) == sorted(loads)
    assert rows == best_fit(lengths, room)


def test_a_row_is_the_same_in_every_batch():
    rows = PackedRows(documents(made_texts(50)), masked_tokenizer(), 30, causal=False, pack=True, words=True)
    alone = rows.batch(torch.tensor([3]))
    together = rows.batch(torch.tensor([0, 3, len(rows) - 1]))
    for name in ("ids", "piece", "position", "counted", "word"):
        assert torch.equal(getattr(together, name)[1, : rows.lengths[3]], getattr(alone, name)[0])
    assert (together.ids[together.piece < 0] == 0).all()  # [PAD]
    no_padding = PackedRows(documents(made_texts(50)), causal_tokenizer(), 30, causal=True, pack=False)
    batch = no_padding.batch(torch.arange(len(no_padding)))
    assert (batch.ids[batch.piece < 0] == 1).all() and (batch.piece < 0).any()  # </s>


def test_the_fingerprint_is_of_the_tokens_and_the_rows():
    texts = made_texts(40)
    made = {"length": 30, "pack": True, "words": False}

    def digest(texts=texts, **options):
        return PackedRows(documents(texts), masked_tokenizer(), causal=False, **(made | options)).fingerprint()

    others = [
        digest(texts[::-1]),
        digest([*texts[1:], "oven"]),
        digest(length=29),
        digest(pack=False),
        digest(words=True),
    ]
    assert digest() == digest()
    assert len({digest(), *others}) == 6


# ---- special tokens and words ------------------------------------------------------------------------------------


def ids_and_counted(text, tokenizer, causal):
    rows = PackedRows(documents([text]), tokenizer, 60, causal=causal, pack=True)
    batch = rows.batch(torch.tensor([0]))
    return tokenizer.convert_ids_to_tokens(batch.ids[0]), batch.counted[0].tolist()


def test_a_document_of_a_causal_model_ends_in_one_end_of_sequence():
    ends = (["<s>", "h", "i", "</s>"], [False, True, True, True])
    assert ids_and_counted("hi", causal_tokenizer(), True) == ends
    assert ids_and_counted("hi</s>", causal_tokenizer(), True) == ends
    assert ids_and_counted("hi", causal_tokenizer(before=None), True) == (["h", "i", "</s>"], [True] * 3)
    assert ids_and_counted("hi", causal_tokenizer(before=None, eos=None), True) == (["h", "i"], [True] * 2)


def test_special_tokens_in_the_text_of_a_masked_model_are_not_counted():
    tokens, counted = ids_and_counted("oven [MASK] zebra ovens", masked_tokenizer(), False)
    assert tokens == ["[CLS]", "oven", "[MASK]", "[UNK]", "oven", "##s", "[SEP]"]
    assert counted == [False, True, False, False, True, True, False]


def test_words_are_numbered_within_the_row():
    rows = PackedRows(
        documents(["ovens baking", "rivering boated"]), masked_tokenizer(), 20, causal=False, pack=True, words=True
    )
    batch = rows.batch(torch.tensor([0]))
    words = {}
    for token, word in zip(masked_tokenizer().convert_ids_to_tokens(batch.ids[0]), batch.word[0].tolist(), strict=True):
        words.setdefault(word, []).append(token)
    special = words.pop(-1)
    assert sorted(special) == ["[CLS]", "[CLS]", "[SEP]", "[SEP]", "[UNK]"]
    assert sorted(words.values()) == [["boat", "##ed"], ["oven", "##s"], ["river", "##ing"]]


def test_a_cut_inside_a_word_makes_two_words():
    rows = PackedRows(documents(["oven ovens"]), masked_tokenizer(), 4, causal=False, pack=False, words=True)
    assert [rows.batch(torch.tensor([row])).word[0].tolist() for row in (0, 1)] == [[-1, 1, 2, -1], [-1, 0, -1]]


def test_no_word_spans_two_pieces_without_special_tokens():
    tokenizer = masked_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    rows = PackedRows(documents(["bread", "oven ovens"]), tokenizer, 2, causal=False, pack=True, words=True)
    batch = rows.batch(torch.tensor([1]))
    assert tokenizer.convert_ids_to_tokens(batch.ids[0]) == ["bread", "##s"]
    assert batch.word.tolist() == [[0, 1]]


def test_what_does_not_fit_is_named():
    def refused(match, texts=("oven",), tokenizer=None, length=30, **options):
        with pytest.raises(UserError, match=match):
            made = {"causal": False, "pack": True} | options
            PackedRows(documents(list(texts)), tokenizer or masked_tokenizer(), length, **made)

    refused("--data.length must be above 2, the number of special tokens, got 2", length=2)
    refused(r"the 2 documents have no tokens \(document 0\)", texts=["", "\x00"])
    refused("the tokenizer does not tell words apart", tokenizer=causal_tokenizer_of_sentences(), words=True)


def causal_tokenizer_of_sentences():
    """Return a tokenizer that does not split at spaces."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.Unigram([("a", -1.0), (" ", -1.0), ("one", -1.0), ("two", -1.0)], unk_id=0))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


# ---- models ------------------------------------------------------------------------------------------------------


def random_row(lengths, width, seed=0):
    """Return a batch of one row with pieces of these lengths, of random ids, padded to `width`."""
    ids, piece, position = torch.full((1, width), 0), torch.full((1, width), -1), torch.zeros(1, width).long()
    draw, end = torch.Generator().manual_seed(seed), 0
    for number, length in enumerate(lengths):
        here = slice(end, end := end + length)
        ids[0, here] = torch.randint(4, 40, (length,), generator=draw)
        piece[0, here], position[0, here] = number, torch.arange(length)
    return Batch(ids, piece, position, piece >= 0, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_piece_has_the_logits_and_gradients_that_it_has_alone(name, attention):
    """In float64, against the model's ordinary call for each piece; the loss is a random combination of the logits.

    Llama's and ModernBERT's eager attention compute the softmax in float32.
    """
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-5}
    model, lengths = tiny(name, attention).double(), [7, 4, 9]
    batch = random_row(lengths, 24)
    upstream = torch.randn(1, 24, 40, dtype=torch.float64)
    options = {"offset": position_offset(model), "additive": takes_additive_mask(model)}
    inputs = model_inputs(batch, causal=name in CAUSAL, packed_mask=True, **options)
    assert inputs["attention_mask"].shape == (1, 1, 24, 24)
    packed = model(**inputs).logits
    assert packed.isfinite().all()
    (packed * upstream)[batch.piece >= 0].sum().backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    for piece in range(3):
        places = batch.piece[0] == piece
        alone = model(input_ids=batch.ids[:, places]).logits
        torch.testing.assert_close(packed[:, places], alone, **tolerance)
        (alone * upstream[:, places]).sum().backward()
    for key, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(gradients[key], value.grad, msg=key, **tolerance)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_honours_the_mask_and_the_positions_is_accepted(name):
    for attention in ("sdpa", "eager"):
        model = tiny(name, attention).train()
        verify_packing(model, name, 40, causal=name in CAUSAL)
        assert model.training


class _NoMask(transformers.BertForMaskedLM):
    def forward(self, attention_mask=None, **inputs):
        return super().forward(**inputs)


class _NoPositions(transformers.BertForMaskedLM):
    def forward(self, position_ids=None, **inputs):
        return super().forward(**inputs)


class _NoFourDimensions(transformers.BertForMaskedLM):
    def forward(self, attention_mask=None, **inputs):
        _rows, _tokens = attention_mask.shape
        return super().forward(attention_mask=attention_mask, **inputs)


@pytest.mark.parametrize(
    ("model_class", "fault"),
    [
        (_NoMask, "tiny does not compute packed pieces as if they were alone; outputs differ by .*--data.pack=false"),
        (_NoPositions, "tiny does not compute packed pieces as if they were alone"),
        (_NoFourDimensions, "tiny does not take packed rows: ValueError: too many values .*--data.pack=false"),
    ],
)
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_a_model_that_does_not_is_refused(model_class, fault, std):
    torch.manual_seed(0)
    config = MODELS["bert"][1]()
    config.initializer_range = std
    with pytest.raises(UserError, match=fault):
        verify_packing(model_class._from_config(config), "tiny", 40, causal=False)


def test_packed_rows_longer_than_the_attention_window_are_refused():
    mistral = transformers.MistralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, sliding_window=16,
    )  # fmt: skip
    model = transformers.MistralForCausalLM._from_config(mistral)
    verify_packing(model, "tiny", 16, causal=True)
    with pytest.raises(UserError, match=r"tiny attends to a window of 16 .* at most 16, got 17 .*pack=false"):
        verify_packing(model, "tiny", 17, causal=True)
    verify_packing(tiny("modernbert"), "tiny", 64, causal=False)
    with pytest.raises(UserError, match="window of 64 tokens"):
        verify_packing(tiny("modernbert"), "tiny", 128, causal=False)


def test_rows_of_one_piece_take_the_ordinary_mask():
    batch = random_row([5], 8)
    inputs = model_inputs(batch, causal=True, packed_mask=False)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    inputs = model_inputs(batch, causal=True, packed_mask=True, offset=2)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert inputs["position_ids"].tolist() == [[2, 3, 4, 5, 6, 2, 2, 2]]
    with pytest.raises(ValueError, match="packed_mask: expected True"):
        model_inputs(random_row([5, 3], 8), causal=True, packed_mask=False)


# ---- targets and chats -------------------------------------------------------------------------------------------


def test_the_target_is_the_next_token_of_the_same_piece_if_it_is_counted():
    batch = Batch(
        torch.tensor([[10, 11, 12, 13, 14, 15, 0]]),
        torch.tensor([[0, 0, 0, 1, 1, 1, -1]]),
        torch.tensor([[0, 1, 2, 0, 1, 2, 0]]),
        torch.tensor([[False, True, True, True, False, True, False]]),
        None,
    )
    assert causal_targets(batch).tolist() == [[11, 12, -100, -100, 15, -100, -100]]


def test_counts_are_the_numbers_of_targets():
    rows = PackedRows(documents(made_texts(60)), causal_tokenizer(), 40, causal=True, pack=True)
    targets = causal_targets(rows.batch(torch.arange(len(rows))))
    assert rows.counts.tolist() == (targets != -100).sum(1).tolist()
    rows = PackedRows(documents(made_texts(60)), masked_tokenizer(), 40, causal=False, pack=True)
    assert rows.counts.tolist() == rows.batch(torch.arange(len(rows))).counted.sum(1).tolist()


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def test_answers_are_counted_with_the_token_that_ends_them():
    chats = [chat("hi", "yes", "so", "no <|x|>", "bye"), chat("a", "", system="be b"), chat("q", "r\n")]
    rows = PackedRows(documents(chats=chats), causal_tokenizer(), 150, causal=True, pack=False)
    for number, messages in enumerate(chats):
        batch = rows.batch(torch.tensor([number]))
        tokens, counted = ["<s>"], [False]  # the template by hand
        for message in messages:
            answer = message["role"] == "assistant"
            tokens += ["<|im_start|>", *message["role"], "\n", *message["content"], "<|im_end|>", "\n"]
            counted += [False] * (len(message["role"]) + 2) + [answer] * (len(message["content"]) + 1) + [False]
        assert causal_tokenizer().convert_ids_to_tokens(batch.ids[0]) == tokens
        assert batch.counted[0].tolist() == counted
        assert batch.ids[0].tolist() == causal_tokenizer().apply_chat_template(messages)["input_ids"]


def test_long_chats_are_cut_and_short_ones_packed():
    chats = [chat("x" * (5 * i), "y" * (7 * i)) for i in range(20)]
    whole = PackedRows(documents(chats=chats), causal_tokenizer(), 400, causal=True, pack=False)
    packed = PackedRows(documents(chats=chats), causal_tokenizer(), 50, causal=True, pack=True)
    assert packed.lengths.max() <= 50
    for name in ("ids", "counted"):
        assert torch.equal(getattr(packed.tokens, name), getattr(whole.tokens, name))
    assert sorted(value for piece in pieces_of(packed) for value in piece[0]) == sorted(whole.tokens.ids.tolist())


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (None, "the tokenizer has no chat template"),
        (
            TEMPLATE.replace("assistant\n{% endif", "model\n{% endif"),
            "message 2 of document 0: its tokens cannot be told",
        ),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}", "message 2 of document 0: its tokens"),
        (
            TEMPLATE.replace("<|im_end|>", "{{ '.' if m.role == 'assistant' and not loop.last }}<|im_end|>"),
            "message 2 of document 0: its",
        ),
        ("{{ raise_exception('no system') }}", "the chat template does not take document 0: TemplateError: no system"),
    ],
    ids=["none", "another-prompt", "changes-messages", "changes-answers", "raises"],
)
def test_a_chat_template_that_does_not_show_the_answer_is_refused(template, fault):
    with pytest.raises(UserError, match=fault):
        tokenizer = causal_tokenizer(template=template)
        PackedRows(documents(chats=[chat("hi", "yes", "so", "no")]), tokenizer, 50, causal=True, pack=True)


def test_chats_are_refused_for_masked_models():
    with pytest.raises(UserError, match="chats are for causal models"):
        PackedRows(documents(chats=[chat("hi", "yes")]), masked_tokenizer(), 50, causal=False, pack=True)
