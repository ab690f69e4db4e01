"""TRL's loss functions, computed by tlkernels. Each gets TRL's function and the arguments of a call, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import tlkernels as tlk
from tlkernels.integrations.float32_loss import float32_loss

Loss = Callable[[Any, dict[str, Any]], Any]

_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@cache
def tell(what: str) -> None:
    """Warn, once, that TRL's own code computes something."""
    warnings.warn(f"tlkernels: TRL's own code computes {what}", stacklevel=3)


def fused_head(theirs: Any, call: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """Serve `ChunkedLogProbFunction.apply`: statistics of the softmax of a head's logits, one for each row.

    Raises:
        NotImplementedError: an output that TRL 1.16 does not have.
    """
    hidden, weight, bias, targets, temperature, _, softcap, scale, outputs = call.values()
    if unknown := set(outputs).difference(_OUTPUTS):
        raise NotImplementedError(f"outputs: expected a part of {_OUTPUTS}, got {unknown} too; call unpatch()")
    layer = _layer(hidden, weight, bias, scale)
    with float32_loss(hidden):
        loss, lse, entropy, top = _stats(layer, targets, temperature, softcap)
        found: dict[str, Any] = {"log_probs": -loss, "entropy": entropy, "is_top1": top}
        if "log_sum_sq_probs" in outputs:
            with torch.no_grad():  # of softmax(z), it is lse(2 z) - 2 lse(z)
                found["log_sum_sq_probs"] = _stats(layer, targets, temperature / 2, softcap).lse - 2 * lse
    if "mean_logits" in outputs:
        with torch.no_grad():
            if softcap is None:
                found["mean_logits"] = _mean(*layer) / temperature
            else:
                tell("the mean logits of a head with a softcap, a metric, in one more product with the head")
                found["mean_logits"] = theirs(*[*call.values()][:-1], ("mean_logits",))[3]
    return tuple(found[name] if name in (*outputs, "log_probs") else None for name in _OUTPUTS)


def of_logits(theirs: Any, call: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """Serve `selective_log_softmax`, `selective_log_softmax_and_entropy` and `entropy_from_logits`."""
    logits, mask, temperature = call["logits"], call.get("row_mask"), call.get("temperature", 1.0)
    index = call["index"] if "index" in call else logits.new_zeros(logits.shape[:-1], dtype=torch.long)
    one = index.dim() < logits.dim()
    with float32_loss(logits) if logits.is_cuda and one else nullcontext():  # TRL's kernel for GPUs returns float32
        if mask is not None and one:  # an ignored row is not read
            rows, target = logits.reshape(-1, logits.shape[-1]), index.masked_fill(mask == 0, -100).flatten()
            loss, _, entropy, _ = tlk.cross_entropy_stats(rows, target, reduction="none", temperature=temperature)
            log_probs, entropy = -loss.view(index.shape), entropy.view(index.shape)
        else:
            both: Any = tlk.selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)
            log_probs, entropy = both[0] if mask is None else both[0].masked_fill(mask == 0, 0.0), both[1]
    if not call.get("entropy_requires_grad", True):
        entropy = entropy.detach()
    results = {"selective_log_softmax": log_probs, "entropy_from_logits": entropy}
    return results.get(theirs.__name__, (log_probs, entropy))


def generalized_jsd(theirs: Any, call: dict[str, Any]) -> Any:
    """Serve `GKDTrainer.generalized_jsd_loss`."""
    student, teacher, labels, beta, temperature, reduction, items = call.values()
    if items is None and reduction not in ("batchmean", "sum", "mean"):
        tell(f"generalized_jsd_loss with reduction={reduction!r}, which keeps a value for each class")
        return theirs(**call)
    target = None if labels is None else torch.where(labels == -100, -100, 0)
    with float32_loss(student, teacher):
        loss = tlk.distillation(student, teacher, target, **_divergence(beta, temperature)) / temperature**2
    rows = student[..., 0].numel() if target is None else (target == 0).sum()
    if items is None and reduction == "mean":
        items = rows * student.shape[-1]
    elif items is None and reduction == "batchmean":  # without labels TRL divides by the size of the first dimension
        items = max(student.shape[0], 1) if target is None else rows.clamp(min=1)
    return loss if items is None else loss / torch.as_tensor(items, device=loss.device)


def chunked_divergence(theirs: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Serve `_chunked_divergence_loss` of DistillationTrainer: the loss, the sum of entropies, the number of rows."""
    temperature, items, valid = call["temperature"], call["num_items_in_batch"], call["completion_mask"] != 0
    layers: list[Any] = []
    softcaps: list[float | None] = []
    for side in ("student", "teacher"):
        head = [call[f"{side}_{name}"] for name in ("lm_head_weight", "lm_head_bias", "logit_scale")]
        layers.append(_layer(call[f"{side}_hidden_states"][valid], *head))
        softcaps.append(call[f"{side}_final_logit_softcapping"])
    hidden, weight, bias = layers[0]
    teacher: list[Any] = [None if tensor is None else tensor.detach() for tensor in layers[1]]
    options: dict[str, Any] = {"student_bias": bias, "teacher_bias": teacher[2], "softcap": tuple(softcaps)}
    options |= _divergence(call["beta"], temperature)
    with float32_loss(hidden, layers[1][0]):
        loss = tlk.linear_distillation(hidden, weight, *teacher[:2], **options) / temperature**2
    with torch.no_grad(), float32_loss(hidden):  # a metric, the same for any targets
        targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        entropy = _stats(layers[0], targets, temperature, softcaps[0]).entropy.sum()
    items = valid.sum().clamp(min=1) if items is None else items
    return loss / torch.as_tensor(items, device=loss.device), entropy, valid.sum()


def _layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a layer in the dtype of `hidden` whose output is `scale` times as large."""
    weight = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(hidden.dtype)
    if bias is not None:
        bias = (bias.full_tensor() if isinstance(bias, DTensor) else bias).to(hidden.dtype)
        bias = bias if scale == 1 else bias * scale
    return hidden if scale == 1 else hidden * scale, weight, bias


def _mean(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean over the classes of a layer's output, which is a layer of one output."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = (hidden.to(wide) * weight.mean(0, dtype=wide)).sum(-1)
    return mean if bias is None else mean + bias.mean(dtype=wide)


def _stats(layer: Any, targets: Tensor, temperature: float, softcap: float | None) -> tlk.CrossEntropyOutput:
    hidden, weight, bias = layer
    return tlk.linear_cross_entropy_stats(
        hidden, weight, targets, linear_bias=bias, reduction="none", temperature=temperature, softcap=softcap
    )


def _divergence(beta: float, temperature: float) -> dict[str, Any]:
    """Return options of `distillation` for TRL's beta: 0 is KL(teacher || student), 1 is KL(student || teacher)."""
    end = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta))
    options = {"divergence": end} if end else {"divergence": "js", "beta": float(beta)}
    return {**options, "temperature": temperature, "reduction": "sum"}
