"""Whether a model's own loss is the loss of its task: compared on a few made-up inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.utils.generic import ModelOutput

from tlkernels.integrations.dry_run import no_cache, plain_tokens, replaced_forward, unchanged
from tlkernels.integrations.hf_errors import UnknownLoss
from tlkernels.integrations.hf_losses import LABELS, VOCABULARY, LossOptions, loss_of_output, router_loss

# Plain PyTorch: the result must not depend on which kernels there are.
_REFERENCE = LossOptions(impl="reference")


def task_of(model: PreTrainedModel) -> str:
    """Return the task, one of `LABELS`, by the name of the model's class or of a class that it is derived from.

    Raises:
        UnknownLoss: there is no such name, and the model has no vocabulary head.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        for task in LABELS:
            if task in name:
                return task
    if model.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]
        return "ForCausalLM"
    raise UnknownLoss(
        f"{names[0]} is no model of a task that is known here; expected a name with one of {', '.join(LABELS)}, or a "
        "vocabulary head"
    )


def check_loss(model: PreTrainedModel) -> tuple[str, bool]:
    """Return the task of a model, and whether it shifts labels to the next token. The model does not change.

    Raises:
        UnknownLoss: it does not run on made-up inputs, or its loss is another one.
    """
    name, task = type(model).__name__, task_of(model)
    if model.config.is_encoder_decoder:
        raise UnknownLoss(f"{name} is an encoder-decoder; expected only a decoder, or only an encoder")
    inputs = _inputs(model)
    as_dict = {} if model.config.return_dict else {"return_dict": True}
    problem = getattr(model.config, "problem_type", None)
    try:
        labels = _labels(model, task, len(next(iter(inputs.values()))))
        with unchanged(model), _large_logits(model, task), torch.no_grad():
            try:
                output = model(**inputs, **labels, **no_cache(model), **as_dict)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise UnknownLoss(
                    f"{name} does not run on {', '.join(inputs)} and {', '.join(labels)}: {what}"
                ) from error
        own = output.get("loss") if isinstance(output, ModelOutput) else None
        if own is None:
            raise UnknownLoss(f"{name} returned no loss for {', '.join(labels)}")
        shifts = (False, True) if task in VOCABULARY else (False,)
        ours = [_total(model, task, output, labels, shift) for shift in shifts]
        close = [torch.isclose(loss, own.float(), rtol=1e-5 + 4 * torch.finfo(own.dtype).eps, atol=0) for loss in ours]
        if sum(map(bool, close)) != 1:
            raise UnknownLoss(
                f"{name}'s loss on made-up inputs is {float(own):.6g}; expected that of {task}, "
                f"{' or '.join(f'{float(loss):.6g}' for loss in ours)}. It has another loss; train it without patch"
            )
        shift = len(shifts) == 2 and bool(close[1])
        if not shift and LOSS_MAPPING.get(model.loss_type) is LOSS_MAPPING["ForCausalLM"]:
            raise UnknownLoss(f"{name} does not shift its labels, but Trainer counts them as if it did")
        return task, shift
    finally:
        model.config.problem_type = problem  # the loss of classifiers sets it


def _total(model: Any, task: str, output: Any, labels: dict[str, Tensor], shift: bool) -> Tensor:
    return (
        loss_of_output(model.config, task, output, labels, None, _REFERENCE, shift) + router_loss(model, output)
    ).float()


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a few inputs, whatever the model's sizes are."""
    config, device = model.config, model.device
    if model.main_input_name == "input_ids":
        return {"input_ids": plain_tokens(model, config.get_text_config().vocab_size, device)}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator, device="cpu")
        return {"pixel_values": pixels.to(device, model.dtype)}
    raise UnknownLoss(f"{type(model).__name__} takes {model.main_input_name}; expected input_ids or pixel_values")


def _labels(model: PreTrainedModel, task: str, rows: int) -> dict[str, Tensor]:
    """Return labels for so many rows, of eight tokens each if they are text; one label is ignored."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if task == "ForQuestionAnswering":
        return {name: torch.tensor([2 + k, 11], device=model.device) for k, name in enumerate(LABELS[task])}
    several = task in (*VOCABULARY, "ForTokenClassification")
    classes: Any = config.get_text_config().vocab_size if task in VOCABULARY else config.num_labels
    what = "single_label_classification" if classes > 1 or several else "regression"
    if several or (getattr(config, "problem_type", None) or what) == "single_label_classification":
        labels = torch.randint(classes, (rows, 8) if several else (rows,), generator=generator, device="cpu")
        labels.view(-1)[-1] = -100
    else:
        values = torch.rand((rows,) if classes == 1 else (rows, classes), generator=generator, device="cpu")
        labels = values.round().to(model.dtype)
    return {"labels": labels.to(model.device)}


@contextlib.contextmanager
def _large_logits(model: PreTrainedModel, task: str) -> Iterator[None]:
    """Let a vocabulary head return logits that tell one position from another; those of a new model are all alike."""
    head = model.get_output_embeddings() if task in VOCABULARY else None  # type: ignore[no-untyped-call]
    if head is None:
        yield
        return
    forward = head.forward

    def replace(hidden: Tensor) -> Tensor:
        logits = forward(hidden)
        generator = torch.Generator().manual_seed(0)
        return (5 * torch.randn(logits.shape, generator=generator, device="cpu")).to(logits.device)

    with replaced_forward(head, replace):
        yield
