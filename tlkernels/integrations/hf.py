"""Models of transformers that compute their loss with tlkernels: `Trainer(model=patch(model), ...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from tlkernels.integrations.head import UnreadableHead, read_head
from tlkernels.integrations.hf_check import check_loss
from tlkernels.integrations.hf_errors import UnknownLoss, with_remedy
from tlkernels.integrations.hf_forward import Plan, patched_class
from tlkernels.integrations.hf_losses import LABELS, VOCABULARY, LossOptions, loss_of_output
from tlkernels.integrations.lazy_logits import LazyLogits

__all__ = ["LazyLogits", "UnknownLoss", "UnreadableHead", "compute_loss_func", "patch", "unpatch"]

Model = TypeVar("Model", bound=PreTrainedModel)


def patch(
    model: Model,
    *,
    logits: str | None = "lazy",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Model:
    """Let a model compute its loss with tlkernels; everything else about it stays the same.

    Replaces::

        trainer = Trainer(model=model, ...)        # by Trainer(model=patch(model), ...)

    With labels, a causal or masked language model in training gives its hidden states and its own head to
    `linear_cross_entropy` and makes no logits. In evaluation it makes them, and without labels nothing changes.
    Classifiers of sequences, tokens and images, and models for question answering, use `cross_entropy` (`mse` for
    regression). The loss is that of the model, with one difference: `num_items_in_batch` is honoured by every model, so
    that the gradient of several micro-batches is that of the whole batch, also where transformers multiplies it by
    their number. The loss of a model in 16 bits is float32.

    Call it before the model is sharded, compiled or given to a trainer. The model's class becomes a subclass of the
    same name; `isinstance`, saving, copying and PEFT work as before.

    Args:
        model: a `transformers.PreTrainedModel`. Of a PEFT model, patch the model inside it.
        logits: what the output of a training step with labels has in place of logits. "lazy": a `LazyLogits`, which
            computes them if somebody looks at them; None: nothing. Under torch.compile and in
            `torch.nn.DataParallel`: nothing.
        label_smoothing: in [0, 1]; takes the place of `TrainingArguments.label_smoothing_factor`, which makes logits.
            Not for regression and several labels.
        z_loss: at least 0; as in `tlkernels.cross_entropy`. Not for regression and several labels.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The same model.

    Raises:
        UnreadableHead: the vocabulary head is adapted (LoRA), quantised, sharded or a module of another kind, or the
            logits are not a scaled and capped `F.linear`. Later, in a training step: the head has become so.
        UnknownLoss: the task is another one, or the model's own loss on a few made-up inputs is not the task's.
        TypeError: it is not a `PreTrainedModel`.
        ValueError: an option is out of range.
    """
    if logits not in ("lazy", None):
        raise ValueError(f"logits: expected 'lazy' or None, got {logits!r}")
    options = LossOptions(label_smoothing, z_loss, impl)
    if not isinstance(model, PreTrainedModel):
        hint = "; patch the model inside it" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}{hint}")
    if "forward" in vars(model):
        raise UnknownLoss(
            f"{type(model).__name__}.forward has been replaced on this object, as accelerate and TRL do; "
            "patch the model before it is given to a trainer"
        )
    model = unpatch(model)
    task, shift = check_loss(model)
    temperature, softcap = 1.0, None
    if task in VOCABULARY:
        with with_remedy():
            head = read_head(model)
        temperature, softcap = head.temperature, head.softcap
    model.__class__ = patched_class(type(model), Plan(task, shift, temperature, softcap, options, logits))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; a model that is not patched stays as it is.

    Raises:
        ValueError: the class was changed again afterwards, as FSDP2 does.
    """
    if "_tlkernels_plan" in vars(type(model)):
        model.__class__ = type(model).__bases__[0]
    elif hasattr(model, "_tlkernels_plan"):
        raise ValueError(f"model: {type(model).__name__} was patched and then sharded; unpatch it before that")
    return model


def compute_loss_func(
    model: PreTrainedModel, *, label_smoothing: float = 0.0, z_loss: float = 0.0, impl: str = "auto"
) -> Callable[..., Tensor]:
    """Return a loss for `Trainer(model=model, compute_loss_func=compute_loss_func(model), ...)`.

    It is the task's loss of the logits, as those of `patch`, and leaves the model alone. Logits are made. Use it where
    `patch` refuses the head, such as one with LoRA. Arguments and errors are those of `patch`; a model for
    question answering raises ValueError, since the Trainer passes its labels to the model alone.

    Returns:
        `function(outputs, labels, num_items_in_batch=None)`, which returns the sum of the losses divided by
        `num_items_in_batch`, or their mean.
    """
    options = LossOptions(label_smoothing, z_loss, impl)
    task, shift = check_loss(model)
    if LABELS[task] != ("labels",):
        raise ValueError(f"model: Trainer passes no labels of {type(model).__name__} to compute_loss_func; use patch")

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels: expected a tensor, got None; the batch has no labels")
        return loss_of_output(model.config, task, outputs, {"labels": labels}, num_items_in_batch, options, shift)

    return loss
