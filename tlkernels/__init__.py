"""tlkernels: the loss layer of fine-tuning.

PyTorch losses as hand-written kernels. Each function and module replaces the PyTorch lines that its docstring shows.
"""

from tlkernels._core.dispatch import explain
from tlkernels.losses.cross_entropy import CrossEntropyLoss, CrossEntropyOutput, cross_entropy, cross_entropy_stats
from tlkernels.losses.info_nce import InfoNCELoss, info_nce
from tlkernels.losses.nt_xent import NTXentLoss, nt_xent
from tlkernels.losses.sigmoid_contrastive import SigmoidContrastiveLoss, sigmoid_contrastive
from tlkernels.losses.sup_con import SupConLoss, sup_con

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "InfoNCELoss",
    "NTXentLoss",
    "SigmoidContrastiveLoss",
    "SupConLoss",
    "cross_entropy",
    "cross_entropy_stats",
    "explain",
    "info_nce",
    "nt_xent",
    "sigmoid_contrastive",
    "sup_con",
]
