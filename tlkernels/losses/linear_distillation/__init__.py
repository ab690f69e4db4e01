"""Distillation between logits that are products of features and weights."""

from tlkernels.losses.linear_distillation.api import LinearDistillationLoss, linear_distillation

__all__ = ["LinearDistillationLoss", "linear_distillation"]
