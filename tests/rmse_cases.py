"""Cases of rmse, and the PyTorch line that it replaces, which in float64 is the oracle."""

import harness
import mse_cases
import torch
from module_case import SUM, A, B, ModuleCase

import tlkernels as tlk


def pytorch(input, target, *, weight=None, reduction="mean", eps=0.0):
    """The PyTorch line of the docstring."""
    return torch.sqrt(mse_cases.pytorch(input, target, weight=weight, reduction=reduction) + eps)


CASES = mse_cases.cases([(), (7, 37), (4097,)], eps=0.25) + [
    mse_cases.case((7, 37), dtype, reduction="sum") for dtype in (mse_cases.F64, mse_cases.F32, mse_cases.BF16)
]
LOSS = harness.Loss(tlk.rmse, pytorch, CASES, tlk.RMSELoss)
MODULE = ModuleCase(tlk.RMSELoss, tlk.rmse, (A, B), {"eps": 0.5, **SUM})
