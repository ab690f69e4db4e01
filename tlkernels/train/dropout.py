"""Turning the dropout of a transformers model off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.train.errors import UserError


def without_dropout(model: Any, name: str, option: str = "--model.dropout") -> None:
    """Turn dropout off in the modules; the saved configuration keeps it. Check that nothing random is left.

    Raises:
        UserError: two forward passes differ all the same. The message has the model's `name`, and the `option` that
            leaves dropout on.
    """
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and (
                "drop" in attribute or (isinstance(module, nn.Dropout) and attribute == "p")
            ):
                setattr(module, attribute, 0.0)
    inputs, state = probe_inputs(model), {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = (model(**inputs)[0] for _ in range(2))
    for name_of_buffer, value in model.named_buffers():  # such as the statistics of batch normalisation
        value.copy_(state[name_of_buffer])
    if not torch.equal(first, second):
        raise UserError(f"the dropout of {name} cannot be turned off; {option} true leaves it on")


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Return the arguments of a small forward pass: a few tokens, or one image."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64  # convolutions take any size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.rand(1, config.num_channels, height, width, generator=draw)
        return {"pixel_values": pixels.to(model.device)}
    ids = torch.randint(config.get_text_config().vocab_size, (2, 16), generator=draw)
    return {"input_ids": ids.to(model.device)}
