"""tlkernels: the loss layer of fine-tuning.

PyTorch losses as hand-written kernels. Each function and module replaces the PyTorch lines that its docstring shows.
"""

from tlkernels._core.dispatch import explain
from tlkernels.losses.cross_entropy import CrossEntropyLoss, CrossEntropyOutput, cross_entropy, cross_entropy_stats
from tlkernels.losses.distillation import DistillationLoss, distillation
from tlkernels.losses.linear_cross_entropy import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)
from tlkernels.losses.linear_distillation import LinearDistillationLoss, linear_distillation
from tlkernels.losses.mse import MSELoss, RMSELoss, mse, rmse

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "DistillationLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "MSELoss",
    "RMSELoss",
    "cross_entropy",
    "cross_entropy_stats",
    "distillation",
    "explain",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_distillation",
    "mse",
    "rmse",
]
