"""Which scale and softcap a model applies to the output of its vocabulary head, found by running it on known values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from tlkernels.integrations.dry_run import no_cache, plain_tokens, replaced_forward, unchanged
from tlkernels.integrations.hf_errors import UnreadableHead, kind

# Options of transformers' configs that multiply or divide the logits, and those that are then a softcap.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def probe(model: PreTrainedModel, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Run the model with known values in place of the layer's output; return them and the logits they become.

    The values are float32, from 0.01 to 1000 with either sign: they show a scale or a softcap whatever the weights are,
    and in a bfloat16 model too.
    """
    name, tokens, calls = type(model).__name__, plain_tokens(model, linear.out_features, linear.weight.device), []
    draws = torch.rand(2, *tokens.shape, linear.out_features, generator=torch.Generator().manual_seed(0), device="cpu")
    known = (10 ** (5 * draws[0] - 2) * (draws[1] - 0.5).sign()).to(tokens.device).requires_grad_()
    forward = linear.forward

    def replace(hidden: Tensor) -> Tensor:
        calls.append((hidden, forward(hidden), F.linear(hidden, linear.weight, linear.bias)))
        return known.clone()

    with unchanged(model), replaced_forward(linear, replace), torch.enable_grad():
        try:
            output = model(input_ids=tokens, **no_cache(model))
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
        raise UnreadableHead(f"{name} returned {kind(output)} without logits; expected a ModelOutput with logits")
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


def arguments(model: PreTrainedModel, known: Tensor, logits: Tensor) -> tuple[float, float | None]:
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
