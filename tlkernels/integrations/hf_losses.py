"""The losses of transformers' tasks, from the output of a forward pass without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tlkernels as tlk
from tlkernels._core.dispatch import NAMES
from tlkernels.integrations.float32_loss import float32_loss

# What transformers calls a task (`model.loss_type`), and the arguments of the forward pass that make a loss.
VOCABULARY = ("ForCausalLM", "ForMaskedLM")
LABELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(VOCABULARY, ("labels",)),
    "ForSequenceClassification": ("labels",),
    "ForImageClassification": ("labels",),
    "ForTokenClassification": ("labels",),
    "ForQuestionAnswering": ("start_positions", "end_positions"),
}


@dataclass(frozen=True)
class LossOptions:
    """Options of `tlkernels.cross_entropy` that a model's own loss does not have."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        # refused when they are given, not in the first training step
        tlk.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), **self.arguments() | {"impl": "auto"})
        if self.impl not in (names := ("auto", *NAMES)):
            raise ValueError(f"impl: expected one of {names}, got {self.impl!r}")

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments."""
        return dict(vars(self))


def normalised(loss: Callable[[str], Tensor], num_items: Tensor | int | None) -> Tensor:
    """Return the mean of one batch, or the sum divided by the number of items of all batches of the step."""
    if num_items is None:
        return loss("mean")
    total = loss("sum")
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return each position's next token; the last position has none."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def class_loss(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None, options: LossOptions, ignore_index: int = -100
) -> Tensor:
    """Return the cross entropy of `logits` of shape (..., C) and class indices of shape (...)."""
    rows, target = logits.flatten(0, -2), labels.flatten().to(logits.device)
    how = {"ignore_index": ignore_index} | options.arguments()
    with float32_loss(rows):
        return normalised(lambda reduction: tlk.cross_entropy(rows, target, reduction=reduction, **how), num_items)


def classification_loss(
    config: Any, logits: Tensor, labels: Tensor, num_items: Tensor | int | None, options: LossOptions
) -> Tensor:
    """Return the loss of sequence and image classification; it sets `config.problem_type` if that is None.

    Several labels for a row use PyTorch's `binary_cross_entropy_with_logits`, for which there is no kernel here.
    """
    if config.problem_type is None:
        kinds = "single_label" if labels.dtype in (torch.int64, torch.int32) else "multi_label"
        config.problem_type = "regression" if config.num_labels == 1 else f"{kinds}_classification"
    if config.problem_type == "single_label_classification":
        return class_loss(logits.view(-1, config.num_labels), labels.view(-1), num_items, options)
    labels = labels.to(logits.device)
    if config.problem_type == "regression":
        if config.num_labels == 1:
            logits, labels = logits.squeeze(), labels.squeeze()
        dtype = torch.result_type(logits, labels)
        pair = logits.to(dtype), labels.to(dtype)
        return normalised(lambda reduction: tlk.mse(*pair, reduction=reduction, impl=options.impl), num_items)
    if config.problem_type == "multi_label_classification":
        binary = F.binary_cross_entropy_with_logits
        return normalised(lambda reduction: binary(logits, labels, reduction=reduction), num_items)
    raise ValueError(
        f"config.problem_type: expected regression, single_label_classification or multi_label_classification, "
        f"got {config.problem_type!r}"
    )


def question_answering_loss(
    starts: Tensor, ends: Tensor, positions: Mapping[str, Tensor], num_items: Tensor | int | None, options: LossOptions
) -> Tensor:
    """Return the mean of the losses of both positions; one behind the last token is ignored."""
    length, losses = starts.shape[1], []
    for logits, key in ((starts, "start_positions"), (ends, "end_positions")):
        target = positions[key]
        target = target.squeeze(-1) if target.dim() > 1 else target
        losses.append(class_loss(logits, target.clamp(0, length), num_items, options, ignore_index=length))
    return (losses[0] + losses[1]) / 2


def loss_of_output(
    config: Any, task: str, output: Any, labels: Mapping[str, Tensor], num_items: Tensor | int | None,
    options: LossOptions, shift: bool = False, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """Return the loss of a task from the logits in the output; `shift` for a causal language model."""
    if task == "ForQuestionAnswering":
        return question_answering_loss(output["start_logits"], output["end_logits"], labels, num_items, options)
    logits, target = output["logits"], labels["labels"]
    if task in ("ForSequenceClassification", "ForImageClassification"):
        return classification_loss(config, logits, target, num_items, options)
    target = shifted(target, ignore_index) if shift else target
    return class_loss(logits, target, num_items, options, ignore_index)


def router_loss(model: Any, output: Any) -> Tensor | float:
    """Return the load-balancing loss that a mixture of experts adds to the loss of its labels.

    Raises:
        ValueError: the output has an additional loss that the model was not checked with.
    """
    found = [key for key, value in output.items() if key.endswith("_loss") and value is not None]
    if not found:
        return 0.0
    if found != ["aux_loss"] or not getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__} returned {', '.join(found)}; expected no other loss, or a mixture of experts with "
            "config.output_router_logits=True, set before the model is patched"
        )
    weighted: Tensor = model.router_aux_loss_coef * output["aux_loss"]
    return weighted
