"""NT-Xent (SimCLR) on two views of each example."""

from tlkernels.losses.nt_xent.api import NTXentLoss, nt_xent

__all__ = ["NTXentLoss", "nt_xent"]
