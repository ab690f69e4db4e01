"""timm: criteria and distillation tasks for its training script, its tasks and your own loop."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import timm.loss
import timm.task
import torch
from timm.loss import _loss_factory
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy as _TimmLabelSmoothing
from timm.loss.cross_entropy import SoftTargetCrossEntropy as _TimmSoftTarget
from timm.task import classification
from timm.task.distillation import LogitDistillationTask as _TimmLogitTask
from timm.task.token_distillation import TokenDistillationTask as _TimmTokenTask
from torch import Tensor

import tlkernels as tlk

_timm_create = _loss_factory.create_classification_loss
_NOTHING_IGNORED = torch.iinfo(torch.int64).min  # timm's losses ignore no class index, so -100 raises as in timm


class LabelSmoothingCrossEntropy(_TimmLabelSmoothing):  # type: ignore[misc]
    """Cross entropy with label smoothing, a subclass of timm's.

    Replaces::

        timm.loss.LabelSmoothingCrossEntropy(smoothing=0.1)

    Args:
        smoothing: in [0, 1); the share of the uniform distribution in the target.

    Shape:
        `x` (N, C), logits; `target` (N,), class indices in [0, C). The result is a scalar, the mean.

    Raises:
        ValueError: a shape or an attribute that timm's formula `confidence * nll + smoothing * uniform` does not share
            with label smoothing: `confidence` must be 1 - `smoothing`.
        IndexError: a target is out of range, on a GPU only with `TLKERNELS_CHECK=1`.
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        if self.confidence != 1.0 - self.smoothing:
            raise ValueError(f"confidence: expected 1 - smoothing = {1.0 - self.smoothing}, got {self.confidence}")
        _check_matrix("x", x)
        return tlk.cross_entropy(x, target, label_smoothing=self.smoothing, ignore_index=_NOTHING_IGNORED)


class SoftTargetCrossEntropy(_TimmSoftTarget):  # type: ignore[misc]
    """Cross entropy with soft targets, as mixup and CutMix make them; a subclass of timm's.

    Replaces::

        timm.loss.SoftTargetCrossEntropy()

    Shape:
        `x` (..., C), logits; `target` of the same shape, a weight for each class that need not sum to 1. The result is
        a scalar, the mean over the leading dimensions, in the dtype of `x`.

    Raises:
        TypeError: `target` is not of a floating dtype.
        ValueError: `target` has another shape than `x`; timm's would broadcast.
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        if not target.is_floating_point():
            raise TypeError(f"target: expected class probabilities of a floating dtype, got {target.dtype}")
        if target.shape != x.shape or x.dim() == 0:
            raise ValueError(f"target: expected the logits' shape {tuple(x.shape)}, got {tuple(target.shape)}")
        if x.dim() > 2:
            x, target = x.flatten(0, -2), target.flatten(0, -2)
        return tlk.cross_entropy(x, target)


class LogitDistillationTask(_TimmLogitTask):  # type: ignore[misc]
    """Distillation of logits: `timm.task.LogitDistillationTask` with a fused divergence, and the same constructor.

    The divergence and its gradient take one pass over both logits, and no log-probabilities are stored. The criterion
    is the one that is given; timm makes it if there is none, and ours after `patch()`.

    Raises:
        ValueError: `temperature` is not above 0, or logits are not of shape (N, C).
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return 'loss', 'output' (the student's logits), 'task_loss' and 'kd_loss', as timm's task does."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        kd_loss = _divergence(self, output, _teacher_logits(self, input))
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


class TokenDistillationTask(_TimmTokenTask):  # type: ignore[misc]
    """Distillation through a token (DeiT): `timm.task.TokenDistillationTask` with fused losses and its constructor.

    Raises:
        ValueError: as `LogitDistillationTask`.
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return 'loss', 'output' (the main head's logits), 'task_loss' and 'distill_loss', as timm's task does."""
        output, student = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        teacher = _teacher_logits(self, input)
        if self.distill_type == "soft":
            distill_loss = _divergence(self, student, teacher)
        else:
            _check_matrix("dist_logits", student)
            distill_loss = tlk.cross_entropy(student, teacher.argmax(-1))
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * distill_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "distill_loss": distill_loss}


def create_classification_loss(*args: Any, **kwargs: Any) -> torch.nn.Module:
    """Return the criterion of `timm.loss.create_classification_loss`, which takes the same arguments; 'ce' is ours.

    Replaces::

        timm.loss.create_classification_loss(loss_type="ce", smoothing=..., soft_targets=...)

    Every other `loss_type` ('bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db') gives timm's own module, unchanged.
    """
    criterion = _timm_create(*args, **kwargs)
    if type(criterion) is _TimmLabelSmoothing:
        return LabelSmoothingCrossEntropy(criterion.smoothing)
    if type(criterion) is _TimmSoftTarget:
        return SoftTargetCrossEntropy()
    if type(criterion) is torch.nn.CrossEntropyLoss:
        return tlk.CrossEntropyLoss()
    return criterion  # type: ignore[no-any-return]


_PLACES: dict[str, tuple[Any, Any, tuple[ModuleType, ...]]] = {
    "LabelSmoothingCrossEntropy": (_TimmLabelSmoothing, LabelSmoothingCrossEntropy, (timm.loss,)),
    "SoftTargetCrossEntropy": (_TimmSoftTarget, SoftTargetCrossEntropy, (timm.loss,)),
    "LogitDistillationTask": (_TimmLogitTask, LogitDistillationTask, (timm.task,)),
    "TokenDistillationTask": (_TimmTokenTask, TokenDistillationTask, (timm.task,)),
    "create_classification_loss": (
        _timm_create,
        create_classification_loss,
        (timm.loss, _loss_factory, timm.task, classification),
    ),
}


def patch() -> None:
    """Put the names of this module in place of timm's, in `timm.loss` and `timm.task`. Doing it again does nothing.

    Call it in the first line of a training script, above its `from timm.loss import ...`.

    Raises:
        RuntimeError: a module has already imported one of the names from timm, and would go on with timm's.
    """
    for name, (theirs, _, _) in _PLACES.items():
        for module in list(sys.modules.values()):
            where = getattr(module, "__name__", "")
            if where.split(".")[0] != "timm" and getattr(module, "__dict__", {}).get(name) is theirs:
                raise RuntimeError(f"{where} has imported {name} from timm; expected patch() to be called before that")
    _set(ours=True)


def unpatch() -> None:
    """Undo `patch()`. Modules that have imported the names in between keep ours."""
    _set(ours=False)


def _set(ours: bool) -> None:
    for name, (timms, replacement, modules) in _PLACES.items():
        for module in modules:
            getattr(module, name)  # raises if timm has moved it
            setattr(module, name, replacement if ours else timms)


def _teacher_logits(task: Any, input: Tensor) -> Tensor:
    with torch.no_grad():
        normalized = task.teacher.normalize_input(input, task.student_mean, task.student_std)
        logits: Tensor = task.teacher(normalized.detach())
    return logits


def _divergence(task: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """Return temperature**2 times the mean over rows of KL(teacher || student)."""
    _check_matrix("student logits", student)
    return tlk.distillation(student, teacher, temperature=task.temperature)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape (N, C), got {tuple(tensor.shape)}")
