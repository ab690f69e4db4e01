"""Cross entropy of a linear layer's output, whose logits are never held whole."""

from tlkernels.losses.linear_cross_entropy.api import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy", "linear_cross_entropy_stats"]
