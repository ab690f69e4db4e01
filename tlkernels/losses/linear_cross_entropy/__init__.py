"""Cross entropy of a linear layer's output, without the whole matrix of logits in memory."""

from tlkernels.losses.linear_cross_entropy.api import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy", "linear_cross_entropy_stats"]
