"""A forward pass of a transformers model on made-up inputs, which leaves the model as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def replaced_forward(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the layer compute `forward` instead."""
    attributes = vars(linear)
    previous = {"forward": attributes["forward"]} if "forward" in attributes else {}  # accelerate sets one
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(previous)


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; afterwards the training flags and the random number generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return `use_cache=False` if the model accepts it, itself or for the network that it passes its options to."""
    own = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    inner = inspect.signature(model.base_model.forward).parameters if passes_on else {}
    return {"use_cache": False} if "use_cache" in own or "use_cache" in inner else {}


def plain_tokens(model: PreTrainedModel, classes: int, device: torch.device) -> Tensor:
    """Return two rows of eight tokens, none of them one of the config's, such as padding or an image's place."""
    options = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    special = {str(value) for key, value in options.items() if key.endswith(("token_id", "token_index"))}
    plain = (token for token in range(classes) if str(token) not in special)
    return torch.tensor(list(islice(cycle(plain), 16)), device=device).view(2, 8)
