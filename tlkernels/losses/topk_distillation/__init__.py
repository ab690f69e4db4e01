"""Distillation from the K classes that a teacher kept."""

from tlkernels.losses.topk_distillation.api import TopkDistillationLoss, topk_distillation

__all__ = ["TopkDistillationLoss", "topk_distillation"]
