"""Supervised contrastive loss on labelled embeddings."""

from tlkernels.losses.sup_con.api import SupConLoss, sup_con

__all__ = ["SupConLoss", "sup_con"]
