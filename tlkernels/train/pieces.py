"""Documents as tokens, cut into pieces that fit into a row. No token is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlkernels.train.documents_files import Chat, Documents
from tlkernels.train.errors import UserError, one_line

_BATCH = 256  # documents tokenised at a time; a document may be a long file


@dataclass(frozen=True)
class Tokens:
    """The tokens of a document, or of the pieces of many, one after the other.

    Attributes:
        ids: token ids, int32.
        counted: whether the token may be a target.
        starts: whether a word starts at the token, or None if nobody asks.
    """

    ids: Tensor
    counted: Tensor
    starts: Tensor | None

    def split(self, length: int) -> list[Tokens]:
        """Return parts of `length` tokens; the last one may be shorter."""
        ids, counted = self.ids.split(length), self.counted.split(length)
        starts = [None] * len(ids) if self.starts is None else self.starts.split(length)
        return [Tokens(*part) for part in zip(ids, counted, starts, strict=True)]

    def between(self, before: Sequence[int], after: Sequence[int], count_after: bool) -> Tokens:
        """Return the tokens with special tokens around them."""
        ends = [torch.tensor(ids, dtype=torch.int32) for ids in (before, after)]
        counts = [torch.full((len(before),), False), torch.full((len(after),), count_after)]
        starts = None
        if self.starts is not None:
            starts = torch.cat([torch.ones(len(before), dtype=torch.bool), self.starts, torch.ones(len(after)).bool()])
        ids = torch.cat([ends[0], self.ids, ends[1]])
        return Tokens(ids, torch.cat([counts[0], self.counted, counts[1]]), starts)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Return the tokens of all parts, one part after the other."""
    starts = [part.starts for part in parts if part.starts is not None]
    ids, counted = torch.cat([part.ids for part in parts]), torch.cat([part.counted for part in parts])
    return Tokens(ids, counted, torch.cat(starts) if starts else None)


def cut(documents: Documents, tokenizer: Any, length: int, *, causal: bool, words: bool) -> tuple[Tokens, Tensor]:
    """Tokenise the documents and cut them into pieces; return all tokens and the length of each piece.

    Masked models get the tokenizer's special tokens around each piece; the text is counted, special tokens are not.
    Causal models get them around each document, and the end-of-sequence token at its end if there is one; all tokens
    are counted but those before the text, so that the model learns where a document ends. Chats get the tokens of the
    tokenizer's template; the assistant's answers are counted, with the special token that ends each.

    Args:
        documents: texts, or for causal models chats.
        tokenizer: a tokenizer of transformers.
        length: the largest number of tokens in a piece, special tokens included.
        causal: whether the pieces are for a causal model.
        words: whether to find out where words start.

    Raises:
        UserError: the tokenizer has no chat template or one that does not show where an answer begins, does not tell
            words apart, or adds as many special tokens as `length` allows; or there is no token at all.
    """
    if documents.chats is not None and not causal:
        raise UserError("chats are for causal models; a masked model learns from texts (--data.text_column)")
    if documents.chats is None and words:
        _check_words(tokenizer)
    before, after = _special_tokens(tokenizer, causal)
    room = length - len(before) - len(after)
    if room < 1:
        raise UserError(f"--data.length must be above {length - room}, the number of special tokens, got {length}")
    ignored = torch.tensor([] if causal else special_ids(tokenizer), dtype=torch.int32)
    batches, lengths = [], []
    for start in range(0, len(documents), _BATCH):
        numbers = range(start, min(start + _BATCH, len(documents)))
        pieces: list[Tokens] = []
        if documents.chats is not None:
            for chat in _chats(documents.chats, numbers, tokenizer, documents):
                pieces += chat.split(length)
        for text in _texts((documents.texts or [])[start : numbers.stop], tokenizer, ignored, words):
            if causal:
                ends = after[: len(after) - (after[-1:] == text.ids[-1:].tolist())]  # the text itself may have it
                pieces += text.between(before, ends, count_after=True).split(length)
            else:
                pieces += [piece.between(before, after, count_after=False) for piece in text.split(room)]
        if pieces:
            batches.append(joined(pieces))
            lengths.append(torch.tensor([len(piece.ids) for piece in pieces]))
    if not batches:
        raise UserError(f"the {len(documents)} documents have no tokens ({documents.place(0)})")
    return joined(batches), torch.cat(lengths)


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all special tokens, such as [CLS], [UNK] and the end of a chat's turn."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(added | set(tokenizer.all_special_ids))


# ---- texts -------------------------------------------------------------------------------------------------------


def _special_tokens(tokenizer: Any, causal: bool) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a text: what the tokenizer adds, and for causal models the end of sequence."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if at is None:
        raise UserError(f"the tokenizer changes the text between its special tokens: {text} becomes {whole}")
    before, after = whole[:at], whole[at + len(text) :]
    if causal and tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    return before, after


def _check_words(tokenizer: Any) -> None:
    ids = tokenizer("one two three", add_special_tokens=False).word_ids(0) if tokenizer.is_fast else []
    if len(set(ids)) < 3:
        raise UserError("whole words cannot be masked: the tokenizer does not tell words apart")


def _texts(texts: list[str], tokenizer: Any, ignored: Tensor, words: bool) -> Iterator[Tokens]:
    """Yield the tokens of each text that has any; `ignored` are the ids that are not counted."""
    encoded = _encode(tokenizer, texts)
    for row, tokens in enumerate(encoded["input_ids"]):
        if tokens:
            ids, starts = torch.tensor(tokens, dtype=torch.int32), None
            if words:
                word = torch.tensor([-1 if number is None else number for number in encoded.word_ids(row)])
                starts = torch.cat([torch.tensor([True]), word[1:] != word[:-1]])
            yield Tokens(ids, torch.isin(ids, ignored, invert=True), starts)


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(texts, **options, verbose=False) if texts else {"input_ids": []}


# ---- chats -------------------------------------------------------------------------------------------------------


def _chats(chats: list[Chat], numbers: range, tokenizer: Any, documents: Documents) -> Iterator[Tokens]:
    """Yield the tokens of each chat.

    An answer's tokens are those that the chat has up to it, less those up to the prompt for it. Both are tokenised as
    the model meets them when it is used: the prompt for an answer without the answer.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, which chats need; take a model for chats")
    special = set(special_ids(tokenizer))
    for number in numbers:
        chat, place = chats[number], documents.place(number)
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        try:
            texts = [tokenizer.apply_chat_template(chat, tokenize=False)]
            for i in answers:
                texts.append(tokenizer.apply_chat_template(chat[:i], tokenize=False, add_generation_prompt=True))
                texts.append(tokenizer.apply_chat_template(chat[: i + 1], tokenize=False))
        except Exception as error:  # jinja's errors, and those that templates raise, for example of roles
            raise UserError(f"the chat template does not take {place}: {one_line(error)}") from error
        whole, *parts = _encode(tokenizer, texts)["input_ids"]
        counted = torch.zeros(len(whole), dtype=torch.bool)
        for i, prompt, answered in zip(answers, parts[::2], parts[1::2], strict=True):
            if answered[: len(prompt)] != prompt or whole[: len(answered)] != answered:
                raise UserError(
                    f"message {i + 1} of {place}: its tokens cannot be told apart, since the tokens before them are "
                    "not the same without it; does the message begin with a space, or the template change messages?"
                )
            end = len(answered)
            last = max((at for at in range(len(prompt), end) if whole[at] in special), default=end - 1)
            if not tokenizer.decode(whole[last + 1 : end]).strip():
                end = last + 1  # a template's line end after the token that ends the turn is never generated
            counted[len(prompt) : end] = True
        yield Tokens(torch.tensor(whole, dtype=torch.int32), counted, None)
