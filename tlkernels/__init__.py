"""PyTorch losses as hand-written kernels.

Each function and module replaces the PyTorch lines in its docstring. `explain` says which implementation a call uses.
"""

from tlkernels._core.dispatch import explain
from tlkernels.losses.cross_entropy import CrossEntropyLoss, CrossEntropyOutput, cross_entropy, cross_entropy_stats
from tlkernels.losses.distillation import DistillationLoss, distillation
from tlkernels.losses.info_nce import InfoNCELoss, info_nce
from tlkernels.losses.linear_cross_entropy import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)
from tlkernels.losses.linear_distillation import LinearDistillationLoss, linear_distillation
from tlkernels.losses.linear_selective_log_softmax import linear_selective_log_softmax
from tlkernels.losses.linear_topk_distillation import LinearTopkDistillationLoss, linear_topk_distillation
from tlkernels.losses.mse import MSELoss, RMSELoss, mse, rmse
from tlkernels.losses.nt_xent import NTXentLoss, nt_xent
from tlkernels.losses.selective_log_softmax import selective_log_softmax
from tlkernels.losses.sigmoid_contrastive import SigmoidContrastiveLoss, sigmoid_contrastive
from tlkernels.losses.sup_con import SupConLoss, sup_con
from tlkernels.losses.topk_distillation import TopkDistillationLoss, topk_distillation
from tlkernels.profiling import profile

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "DistillationLoss",
    "InfoNCELoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "LinearTopkDistillationLoss",
    "MSELoss",
    "NTXentLoss",
    "RMSELoss",
    "SigmoidContrastiveLoss",
    "SupConLoss",
    "TopkDistillationLoss",
    "cross_entropy",
    "cross_entropy_stats",
    "distillation",
    "explain",
    "info_nce",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_distillation",
    "linear_selective_log_softmax",
    "linear_topk_distillation",
    "mse",
    "nt_xent",
    "profile",
    "rmse",
    "selective_log_softmax",
    "sigmoid_contrastive",
    "sup_con",
    "topk_distillation",
]
