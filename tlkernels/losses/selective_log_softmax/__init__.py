"""Log-probabilities of selected classes, and the entropy, from logits."""

from tlkernels.losses.selective_log_softmax.api import selective_log_softmax

__all__ = ["selective_log_softmax"]
