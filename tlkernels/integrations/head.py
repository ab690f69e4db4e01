"""The vocabulary head of a transformers model, as arguments of `tlkernels.linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlkernels.integrations.dry_run import no_cache, replaced_forward
from tlkernels.integrations.head_probe import arguments, probe
from tlkernels.integrations.hf_errors import UnreadableHead, kind

__all__ = ["UnreadableHead", "VocabularyHead", "head_layer", "hidden_states", "read_head", "without_logits"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VocabularyHead:
    """The last layer of a model, and the arguments of `linear_cross_entropy` that reproduce the model's logits.

    `linear` is the model's own layer, not a copy; `tied` says whether its weight is also that of the input embedding.
    """

    linear: nn.Linear
    temperature: float = 1.0
    softcap: float | None = None
    tied: bool = field(kw_only=True)


def read_head(model: PreTrainedModel) -> VocabularyHead:
    """Read the head of a model, and check it in a forward pass on a few tokens, which does not change the model.

    Call it before the model is sharded. Pass the model itself, not a wrapper such as DistributedDataParallel.

    Raises:
        UnreadableHead: the head is not a plain `nn.Linear`, or the model's logits are not
            `softcap * tanh(F.linear(hidden, weight, bias) / softcap) / temperature` for values from its config.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnreadableHead(f"model: expected a transformers.PreTrainedModel, got {name}; pass the model inside it")
    if model.config.is_encoder_decoder:
        raise UnreadableHead(f"{name} is an encoder-decoder; expected only a decoder, or only an encoder")
    linear = head_layer(model)
    temperature, softcap = arguments(model, *probe(model, linear))
    tied = getattr(model.get_input_embeddings(), "weight", None) is linear.weight
    return VocabularyHead(linear, temperature, softcap, tied=tied)


def head_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that makes the logits. Its forward pass is not checked, as `read_head` does.

    Raises:
        UnreadableHead: it is not a plain `nn.Linear` with whole tensors of a dtype that the kernels have.
    """
    name, linear = type(model).__name__, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if linear is None:
        raise UnreadableHead(f"{name}.get_output_embeddings() is None; expected a model with a vocabulary head")
    if type(linear) is not nn.Linear:
        raise UnreadableHead(f"{name}'s head is {kind(linear)}; expected torch.nn.Linear, not adapted or quantised")
    _check_tensors(name, linear)
    return linear


def hidden_states(model: PreTrainedModel, head: VocabularyHead, **inputs: Any) -> Tensor:
    """Return what the head's layer receives in a forward pass of the model, `(batch, length, width)`, with autograd.

    The layer is called but multiplies nothing, so no logits are made. The model gets `inputs` and, where it accepts it,
    `use_cache=False`. If it is sharded or autocasts, compute the loss there too: in the forward pass of the outermost
    module, under the same autocast.

    Raises:
        UnreadableHead: the model's head is not `head.linear`, was not called exactly once, or is sharded afterwards.
        ValueError: `inputs` has labels.
    """
    name = type(model).__name__
    if inputs.get("labels") is not None:
        raise ValueError("labels: expected none, since no logits are made; give them to linear_cross_entropy")
    if model.get_output_embeddings() is not head.linear:  # type: ignore[no-untyped-call]
        raise UnreadableHead(f"{name}'s head is not the layer that was read; call read_head again")
    return without_logits(model, head.linear, lambda: model(**(no_cache(model) | inputs)))[0]


def without_logits(model: PreTrainedModel, linear: nn.Linear, run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Return what the head's layer receives in `run()`, which is a forward pass of the model, and what `run` returns.

    The layer multiplies nothing: its output, and so the model's logits, have no columns.

    Raises:
        UnreadableHead: the layer was not called exactly once, or is sharded afterwards.
    """
    name, captured = type(model).__name__, []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        kind, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        return hidden.new_empty(*hidden.shape[:-1], 0, dtype=dtype)

    with replaced_forward(linear, capture):
        output = run()
    if len(captured) != 1:
        raise UnreadableHead(f"{name} called its head {len(captured)} times; expected once")
    _check_tensors(name, linear)
    return captured[0], output


def _check_tensors(name: str, linear: nn.Linear) -> None:
    """Raise `UnreadableHead` unless weight and bias are plain, whole and of a dtype that the kernels have."""
    shapes = {"weight": (linear.out_features, linear.in_features), "bias": (linear.out_features,)}
    for key, shape in shapes.items():
        tensor = getattr(linear, key)
        if tensor is None:
            continue  # no bias
        found = f"{kind(tensor)} {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UnreadableHead(f"{name}'s head.{key} is {found}; expected a plain tensor, not sharded or quantised")
        if tensor.is_meta or tensor.dtype not in _DTYPES or tensor.shape != shape:
            raise UnreadableHead(f"{name}'s head.{key} is {found}; expected a whole floating tensor {shape}")
