"""The vocabulary head of a transformers model, as arguments of `tlkernels.linear_cross_entropy`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

# Options of transformers' configs that multiply or divide the logits, and those that are then a softcap.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UnreadableHead(ValueError):
    """The logits of a model are not known to be those of `linear_cross_entropy`. Train it with its own loss."""


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
    linear: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if linear is None:
        raise UnreadableHead(f"{name}.get_output_embeddings() is None; expected a model with a vocabulary head")
    if type(linear) is not nn.Linear:
        raise UnreadableHead(f"{name}'s head is {_kind(linear)}; expected torch.nn.Linear, not adapted or quantised")
    _check_tensors(name, linear)
    temperature, softcap = _arguments(model, *_probe(model, linear))
    tied = getattr(model.get_input_embeddings(), "weight", None) is linear.weight
    return VocabularyHead(linear, temperature, softcap, tied=tied)


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
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden.new_empty(*hidden.shape[:-1], 0)

    with _replaced_forward(head.linear, capture):
        model(**(_no_cache(model) | inputs))
    if len(captured) != 1:
        raise UnreadableHead(f"{name} called its head {len(captured)} times; expected once")
    _check_tensors(name, head.linear)
    return captured[0]


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _check_tensors(name: str, linear: nn.Linear) -> None:
    """Raise `UnreadableHead` unless weight and bias are plain, whole and of a dtype that the kernels have."""
    shapes = {"weight": (linear.out_features, linear.in_features), "bias": (linear.out_features,)}
    for key, shape in shapes.items():
        tensor = getattr(linear, key)
        if tensor is None:
            continue  # no bias
        found = f"{_kind(tensor)} {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UnreadableHead(f"{name}'s head.{key} is {found}; expected a plain tensor, not sharded or quantised")
        if tensor.is_meta or tensor.dtype not in _DTYPES or tensor.shape != shape:
            raise UnreadableHead(f"{name}'s head.{key} is {found}; expected a whole floating tensor {shape}")


@contextmanager
def _replaced_forward(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    attributes = vars(linear)
    previous = {"forward": attributes["forward"]} if "forward" in attributes else {}  # accelerate sets one
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(previous)


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
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


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return `use_cache=False` if the model accepts it, itself or for the network that it passes its options to."""
    own = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    inner = inspect.signature(model.base_model.forward).parameters if passes_on else {}
    return {"use_cache": False} if "use_cache" in own or "use_cache" in inner else {}


def _tokens(model: PreTrainedModel, linear: nn.Linear) -> Tensor:
    """Return two rows of eight tokens, none of them one of the config's, such as padding or an image's place."""
    options = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    special = {str(value) for key, value in options.items() if key.endswith(("token_id", "token_index"))}
    plain = (token for token in range(linear.out_features) if str(token) not in special)
    return torch.tensor(list(islice(cycle(plain), 16)), device=linear.weight.device).view(2, 8)


def _probe(model: PreTrainedModel, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Run the model with known values in place of the layer's output; return them and the logits they become.

    The values are float32, from 0.01 to 1000 with either sign: they show a scale or a softcap whatever the weights are,
    and in a bfloat16 model too.
    """
    name, tokens, calls = type(model).__name__, _tokens(model, linear), []
    draws = torch.rand(2, *tokens.shape, linear.out_features, generator=torch.Generator().manual_seed(0), device="cpu")
    known = (10 ** (5 * draws[0] - 2) * (draws[1] - 0.5).sign()).to(tokens.device).requires_grad_()
    forward = linear.forward

    def replace(hidden: Tensor) -> Tensor:
        calls.append((hidden, forward(hidden), F.linear(hidden, linear.weight, linear.bias)))
        return known.clone()

    with _unchanged(model), _replaced_forward(linear, replace), torch.enable_grad():
        try:
            output = model(input_ids=tokens, **_no_cache(model))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise UnreadableHead(f"{name} does not run on input_ids {tuple(tokens.shape)} alone: {what}") from error
    if len(calls) != 1 or calls[0][0].shape != (*tokens.shape, linear.in_features):
        found = [tuple(hidden.shape) for hidden, _, _ in calls]
        expected = [(*tokens.shape, linear.in_features)]
        raise UnreadableHead(f"{name} called its head on tensors of shapes {found}; expected one call: {expected}")
    if not torch.allclose(calls[0][1], calls[0][2], rtol=0, atol=0, equal_nan=True):
        raise UnreadableHead(f"{name}'s head does not return F.linear(hidden, weight, bias): its forward was changed")
    logits = output.get("logits") if isinstance(output, ModelOutput) else None
    if logits is None:
        raise UnreadableHead(f"{name} returned {_kind(output)} without logits; expected a ModelOutput with logits")
    if logits.shape != known.shape:
        shapes = f"{tuple(logits.shape)}; expected its head's, {tuple(known.shape)}"
        raise UnreadableHead(f"{name}'s logits are of shape {shapes}")
    others = [key for key in output if key.endswith("_logits") and key != "router_logits"]
    if others:
        raise UnreadableHead(f"{name} has several heads: its output has {', '.join(others)}; expected logits alone")
    _check_graph(model, known, logits)
    return known.detach(), logits.detach()


def _check_graph(model: PreTrainedModel, known: Tensor, logits: Tensor) -> None:
    """Raise `UnreadableHead` if the logits depend on a parameter. A bias that is still zero shows only here."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads: tuple[Tensor | None, ...] = (None,)
    if logits.requires_grad:
        grads = torch.autograd.grad(logits.sum(), (known, *named.values()), allow_unused=True)
    others = [name for name, grad in zip(named, grads[1:], strict=False) if grad is not None]
    if others or grads[0] is None:
        found = f"also depend on {', '.join(others[:3])}" if others else "have no gradient"
        raise UnreadableHead(
            f"{type(model).__name__}'s logits {found}; expected them to depend on its head's output only"
        )


def _arguments(model: PreTrainedModel, known: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Return the temperature and the softcap, from the values in the config, that turn `known` into the logits."""
    options = {
        name: float(value)
        for config in (model.config, model.config.get_text_config())
        for name in _SCALES + _SOFTCAPS
        if isinstance(value := getattr(config, name, None), int | float) and value > 0
    }
    scales = [options[name] for name in _SCALES if name in options]
    temperatures = {1.0, *scales, *(1 / scale for scale in scales)}
    softcaps = {None, *(options[name] for name in _SOFTCAPS if name in options)}
    known, logits, eps = known.cpu().double(), logits.cpu().double(), torch.finfo(logits.dtype).eps
    matches = []
    for temperature in temperatures:
        for softcap in softcaps:
            expected = known / temperature
            if softcap is not None:
                expected = softcap * (expected / softcap).tanh()
            if torch.allclose(logits, expected, rtol=1e-5 + 4 * eps, atol=0):
                matches.append((temperature, softcap and softcap * temperature))
    if len(matches) != 1:
        tried = ", ".join(f"{name}={value}" for name, value in options.items()) or "no options for it"
        raise UnreadableHead(
            f"{type(model).__name__}'s forward does something else to the logits: {len(matches)} combinations of a "
            f"scale and a softcap from its config ({tried}) reproduce them; expected exactly one"
        )
    return matches[0]
