"""The forward pass of a patched model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tlkernels as tlk
from tlkernels.integrations.float32_loss import float32_loss
from tlkernels.integrations.head import head_layer, without_logits
from tlkernels.integrations.hf_errors import with_remedy
from tlkernels.integrations.hf_losses import (
    LABELS,
    VOCABULARY,
    LossOptions,
    loss_of_output,
    normalised,
    router_loss,
    shifted,
)
from tlkernels.integrations.lazy_logits import LazyLogits


@dataclass(frozen=True)
class Plan:
    """What was read from a model, and the options. It keeps no tensor of the model.

    Attributes:
        task: one of `LABELS`.
        shift: whether labels are shifted to the next token.
        temperature: of a vocabulary head, as its softcap.
        options: of the loss.
        logits: of `patch`.
    """

    task: str
    shift: bool
    temperature: float
    softcap: float | None
    options: LossOptions
    logits: str | None


def patched_class(base: Any, plan: Plan) -> Any:
    """Return a subclass of the same name. The plan is in the class, so that copies and replicas have it."""
    original = base.forward
    signature = inspect.signature(original)
    rest = next((name for name, its in signature.parameters.items() if its.kind is its.VAR_KEYWORD), None)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A wrapper, such as accelerate's, may still call this after unpatch. With fused_lm_head, TRL has its own loss.
        plan = getattr(type(self), "_tlkernels_plan", None)
        if plan is None or kwargs.get("fused_lm_head"):
            return original(self, *args, **kwargs)
        loss_kwargs = {key: kwargs.pop(key, None) for key in ("num_items_in_batch", "ignore_index")}
        inputs = kwargs
        if args:
            inputs = signature.bind(self, *args, **kwargs).arguments
            inputs |= inputs.pop(rest, {}) if rest else {}
            del inputs[next(iter(signature.parameters))]
        names = LABELS[plan.task]
        if any(inputs.get(name) is None for name in names):
            return original(self, **inputs)
        labels = {name: inputs.pop(name) for name in names}
        return _labelled(self, functools.partial(original, self), plan, inputs, labels, **loss_kwargs)

    return type(base.__name__, (base,), {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "forward": forward, "accepts_loss_kwargs": True, "_tlkernels_plan": plan,
        "__reduce_ex__": lambda self, protocol: (_rebuilt, (base, plan), *object.__reduce_ex__(self, protocol)[2:]),
    })  # fmt: skip


def _rebuilt(base: Any, plan: Plan) -> Any:
    """Return an empty model, for copying and unpickling."""
    patched = patched_class(base, plan)
    return patched.__new__(patched)


def _labelled(
    model: Any, forward: Callable[..., Any], plan: Plan, inputs: dict[str, Any], labels: dict[str, Tensor],
    num_items_in_batch: Tensor | int | None, ignore_index: int | None,
) -> Any:  # fmt: skip
    """Return the output of a forward pass with its loss."""
    asked = inputs.pop("return_dict", None)
    as_dict = model.config.return_dict if asked is None else asked
    if not model.config.return_dict:  # some forward passes do not have the argument
        inputs["return_dict"] = True
    ignored = -100 if ignore_index is None else ignore_index
    shift = plan.shift
    if shift and (given := inputs.pop("shift_labels", None)) is not None:
        labels, shift = {"labels": given}, False
    run = functools.partial(forward, **inputs)
    changed: dict[str, Any] = {}
    if plan.task in VOCABULARY and model.training:
        with with_remedy():
            linear = head_layer(model)
            hidden, output = without_logits(model, linear, run)
        target = shifted(labels["labels"], ignored) if shift else labels["labels"]
        rows, target = hidden.flatten(0, -2), target.flatten().to(hidden.device)
        how: dict[str, Any] = {"linear_bias": linear.bias, "temperature": plan.temperature, "softcap": plan.softcap}
        how |= {"ignore_index": ignored} | plan.options.arguments()
        with float32_loss(hidden):
            loss = normalised(
                lambda reduction: tlk.linear_cross_entropy(rows, linear.weight, target, reduction=reduction, **how),
                num_items_in_batch,
            )
        lazy = plan.logits == "lazy" and not torch.compiler.is_compiling() and not getattr(model, "_is_replica", False)
        changed["logits"] = _lazy(hidden, linear, plan, output["logits"].dtype) if lazy else None
    else:
        output = run()
        loss = loss_of_output(model.config, plan.task, output, labels, num_items_in_batch, plan.options, shift, ignored)
    output = type(output)(**{**output, **changed, "loss": loss + router_loss(model, output)})
    return output if as_dict else output.to_tuple()


def _lazy(hidden: Tensor, linear: nn.Linear, plan: Plan, dtype: torch.dtype) -> LazyLogits:
    kind = hidden.device.type
    autocast: dict[str, Any] = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    versions = [parameter._version for parameter in linear.parameters()]

    def make() -> Tensor:
        if versions != [parameter._version for parameter in linear.parameters()]:
            raise RuntimeError("logits: the head has changed since the forward pass; read them before it does")
        with torch.autocast(kind, **autocast):
            logits = F.linear(hidden, linear.weight, linear.bias)
        if plan.softcap is not None:
            logits = plan.softcap * (logits / plan.softcap).tanh()
        return logits / plan.temperature if plan.temperature != 1 else logits

    return LazyLogits(make, torch.Size((*hidden.shape[:-1], linear.out_features)), dtype, hidden.device)
