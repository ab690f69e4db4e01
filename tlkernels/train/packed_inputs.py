"""Packed rows as a model's arguments, and whether a model computes each piece as if it were alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tlkernels.train.errors import UserError, one_line
from tlkernels.train.model import position_offset
from tlkernels.train.packing import Batch

# Share of what the attention to other pieces would change. A model that takes the mask and the positions is off by
# rounding, 1e-5 to 1e-3 of it; one that ignores either, by about all of it.
_ROUNDING = 1e-2


def model_inputs(
    batch: Batch, *, causal: bool, packed_mask: bool, offset: int = 0, additive: bool = False
) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and, with `packed_mask`, position_ids.

    The mask is that of the padding, (rows, tokens), unless a row has several pieces. Then it is (rows, 1, tokens,
    tokens): a token attends to its own piece, with `causal` to itself and what is before it there. Padding attends to
    padding, since a softmax over no token is NaN.

    Args:
        batch: the rows, best on the CPU: whether a row has several pieces decides the arguments.
        causal: whether the model is causal.
        packed_mask: whether rows may have several pieces.
        offset: the model's first position, see `position_offset`.
        additive: whether the mask is added to the scores, see `takes_additive_mask`; otherwise it is boolean.

    Raises:
        ValueError: a row has several pieces, but `packed_mask` is false.
    """
    piece, several = batch.piece, bool((batch.piece > 0).any())
    inputs = {"input_ids": batch.ids, "attention_mask": (piece >= 0).long()}
    if not packed_mask:
        if several:
            raise ValueError("packed_mask: expected True for rows of several pieces, got False")
        return inputs
    inputs["position_ids"] = batch.position + offset
    if several:
        mask = piece[:, None, :, None] == piece[:, None, None, :]
        if causal:
            mask = mask.tril()
        if additive:
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
        inputs["attention_mask"] = mask
    return inputs


def takes_additive_mask(model: Any) -> bool:
    """Return whether the model adds its mask to the scores, as transformers' eager attention does."""
    return bool(model.config._attn_implementation == "eager")


@torch.no_grad()
def verify_packing(model: Any, name: str, length: int, *, causal: bool) -> None:
    """Check in float32 that two short pieces in one row have the outputs that they have alone.

    Args:
        model: a model of transformers, before autocast is applied to it; its first output is compared.
        name: the model's name, for the message.
        length: the number of tokens of the longest row.
        causal: whether the model is causal.

    Raises:
        UserError: the outputs differ, or `length` is larger than the model's attention window, which a mask of packed
            rows replaces.
    """
    window = attention_window(model.config)
    hint = "(--data.pack=false makes each piece a row)"
    if window is not None and length > window:
        raise UserError(
            f"{name} attends to a window of {window} tokens, which the mask of packed rows would replace; "
            f"--data.length must be at most {window}, got {length} {hint}"
        )
    offset, additive, training = position_offset(model), takes_additive_mask(model), model.training
    device = next(model.parameters()).device
    vocabulary = [number for number in range(model.config.get_text_config().vocab_size) if number != _padding(model)]
    drawn = torch.randint(len(vocabulary), (1, 13), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(vocabulary)[drawn].to(device)

    def output(ids: Tensor, lengths: list[int], packed_mask: bool, masked: bool = True) -> Tensor:
        piece = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        position = torch.cat([torch.arange(length) for length in lengths])
        batch = Batch(ids, piece[None].to(device), position[None].to(device), torch.ones_like(ids).bool(), None)
        inputs = model_inputs(batch, causal=causal, packed_mask=packed_mask, offset=offset, additive=additive)
        if not masked:
            inputs["attention_mask"] = torch.ones_like(ids)
        result: Tensor = model(**inputs)[0].float()
        return result

    try:
        model.eval()
        alone = torch.cat([output(ids[:, :5], [5], False), output(ids[:, 5:], [8], False)], 1)
        packed, unmasked = output(ids, [5, 8], True), output(ids, [5, 8], True, masked=False)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # an argument or a mask that it does not take
        raise UserError(f"{name} does not take packed rows: {one_line(error)} {hint}") from error
    finally:
        model.train(training)
    difference, leak = ((other - alone).abs().max().item() for other in (packed, unmasked))
    if not difference <= max(_ROUNDING * leak, 1e-6 * alone.abs().max().item()):
        raise UserError(
            f"{name} does not compute packed pieces as if they were alone; outputs differ by {difference:.1e} {hint}"
        )


def attention_window(config: Any) -> int | None:
    """Return the largest row that a model's sliding window or chunk does not restrict, or None if it has none."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return None
    for name in ("sliding_window", "attention_window", "attention_chunk_size"):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):  # Longformer has one for each layer
            value = min(value, default=None)
        if isinstance(value, int):
            return value
    return None


def _padding(model: Any) -> int | None:
    """Return the id that RoBERTa counts no position for."""
    number: int | None = model.config.get_text_config().pad_token_id
    return number
