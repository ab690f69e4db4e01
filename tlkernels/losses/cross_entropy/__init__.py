"""Cross entropy on logits."""

from tlkernels.losses.cross_entropy.api import CrossEntropyLoss, cross_entropy, cross_entropy_stats
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput

__all__ = ["CrossEntropyLoss", "CrossEntropyOutput", "cross_entropy", "cross_entropy_stats"]
