"""Distillation of a linear layer from the K classes that a teacher kept, without all logits in memory."""

from tlkernels.losses.linear_topk_distillation.api import LinearTopkDistillationLoss, linear_topk_distillation

__all__ = ["LinearTopkDistillationLoss", "linear_topk_distillation"]
