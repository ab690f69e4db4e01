"""Distillation on logits."""

from tlkernels.losses.distillation.api import DistillationLoss, distillation

__all__ = ["DistillationLoss", "distillation"]
