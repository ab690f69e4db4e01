"""Log-probabilities of selected classes, and the entropy, of a linear layer's output, whose logits are not stored."""

from tlkernels.losses.linear_selective_log_softmax.api import linear_selective_log_softmax

__all__ = ["linear_selective_log_softmax"]
