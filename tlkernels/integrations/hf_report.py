"""`tlkernels doctor --host hf --model FOLDER`: what `patch` would do to a model of transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

import tlkernels as tlk
from tlkernels.integrations.head import UnreadableHead, VocabularyHead, read_head
from tlkernels.integrations.hf_check import check_loss
from tlkernels.integrations.hf_errors import UnknownLoss
from tlkernels.integrations.hf_losses import LABELS, VOCABULARY
from tlkernels.train.errors import UserError
from tlkernels.train.language import find
from tlkernels.train.model import load_from

_LINE = "one line  Trainer(model=hf.patch(model), ...)   # from tlkernels.integrations import hf"
_ROWS = 2048  # of the losses that are explained; on a GPU the choice depends on the size


def load(path: str) -> Any:
    """Return the model of a folder, a .gguf file, a hub name or "smollm2", of the class that its configuration names.

    Raises:
        UserError: it cannot be loaded.
    """
    name, extra = find(path)
    architecture = (getattr(load_from(transformers.AutoConfig, name, **extra), "architectures", None) or [None])[0]
    cls = getattr(transformers, architecture or "", None)
    if extra:  # a .gguf file names no class; all that transformers reads are causal language models
        cls = transformers.AutoModelForCausalLM
    if cls is None:
        raise UserError(f"{path}: config.json names no class of transformers in architectures, got {architecture!r}")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = load_from(cls, name, **extra)
    return model.to("cuda") if torch.cuda.is_available() else model


def report(model: Any) -> Iterator[str]:
    """Yield lines: the task, the head, which implementation serves which part, and what is refused, with the reason."""
    count = sum(parameter.numel() for parameter in model.parameters())
    yield f"model     {type(model).__name__}, {count / 1e6:.1f} M parameters, {model.dtype} on {model.device.type}"
    try:
        task, shift = check_loss(model)
    except UnknownLoss as error:
        yield f"refused   {error}"
        return
    yield f"task      {task}, with {' and '.join(LABELS[task])}{', shifted to the next token' if shift else ''}"
    if task in VOCABULARY:
        yield from _vocabulary(model)
    else:
        yield from _classifier(model, task)
    yield "without labels: as unpatched"


def _vocabulary(model: Any) -> Iterator[str]:
    try:
        head = read_head(model)
    except UnreadableHead as error:
        yield f"refused   {error}"
        yield from _served("instead, compute_loss_func(model) on the logits", tlk.cross_entropy, *_logits(model))
        yield "one line  Trainer(model=model, compute_loss_func=hf.compute_loss_func(model), ...)"
        return
    yield f"head      {_described(model, head)}"
    weight, bias = head.linear.weight, head.linear.bias
    hidden = weight.new_zeros(_ROWS, weight.shape[1]).requires_grad_()
    target = torch.zeros(_ROWS, dtype=torch.long, device=weight.device)
    how: dict[str, Any] = {"linear_bias": bias, "temperature": head.temperature, "softcap": head.softcap}
    yield from _served("training, no logits", tlk.linear_cross_entropy, hidden, weight, target, **how)
    yield from _served("evaluation, on the model's logits", tlk.cross_entropy, *_logits(model))
    yield (
        "refused   TrainingArguments.label_smoothing_factor: it takes the labels from the model, and PyTorch computes "
        "the loss of the logits; patch(model, label_smoothing=...) serves it"
    )
    yield _LINE


def _classifier(model: Any, task: str) -> Iterator[str]:
    kind = getattr(model.config, "problem_type", None)
    kind = kind or ("regression" if model.config.num_labels == 1 else "single_label_classification")
    if "Token" in task or "Question" in task or kind == "single_label_classification":
        yield from _served("training and evaluation", tlk.cross_entropy, *_logits(model))
    elif kind == "regression":
        values = torch.zeros(_ROWS, dtype=model.dtype, device=model.device)
        yield from _served("training and evaluation", tlk.mse, values.requires_grad_(), values.detach())
    else:
        yield "training and evaluation: binary_cross_entropy_with_logits of PyTorch; there is no kernel for it here"
    yield _LINE


def _described(model: Any, head: VocabularyHead) -> str:
    name = next(name for name, module in model.named_modules() if module is head.linear)
    parts = [
        f"{name}, Linear {head.linear.in_features} -> {head.linear.out_features}",
        "no bias" if head.linear.bias is None else "bias",
        *(["tied to the input embeddings"] if head.tied else []),
        f"temperature {head.temperature:g}",
        "no softcap" if head.softcap is None else f"softcap {head.softcap:g}",
    ]
    return ", ".join(parts)


def _logits(model: Any) -> tuple[Tensor, Tensor]:
    vocabulary = model.get_output_embeddings() is not None
    classes = model.config.get_text_config().vocab_size if vocabulary else getattr(model.config, "num_labels", 2)
    logits = torch.zeros(64, classes, dtype=model.dtype, device=model.device).requires_grad_()
    return logits, torch.zeros(64, dtype=torch.long, device=model.device)


def _served(when: str, loss: Callable[..., Any], *tensors: Tensor, **options: Any) -> Iterator[str]:
    yield f"{when}: {loss.__name__}"
    yield from (f"  {line}" for line in tlk.explain(loss, *tensors, **options).splitlines())
