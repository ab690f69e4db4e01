"""SigLIP's pairwise sigmoid loss on embeddings."""

from tlkernels.losses.sigmoid_contrastive.api import SigmoidContrastiveLoss, sigmoid_contrastive

__all__ = ["SigmoidContrastiveLoss", "sigmoid_contrastive"]
