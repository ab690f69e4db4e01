"""InfoNCE (CLIP) on embeddings."""

from tlkernels.losses.info_nce.api import InfoNCELoss, info_nce

__all__ = ["InfoNCELoss", "info_nce"]
