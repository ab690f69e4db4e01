"""Reference and test oracle: squared errors in plain PyTorch, on any device, differentiable to any order."""

import torch.nn.functional as F
from torch import Tensor

from tlkernels.losses.mse.call import Arguments


def squared(call: Arguments) -> Tensor:
    """Return the squared errors, reduced, in the dtype of the computation."""
    input, target, weight = call.expanded(call.compute)
    if weight is None and call.reduction != "mean":
        return F.mse_loss(input, target, reduction=call.reduction)
    if weight is None:  # "mean" of a DTensor is the mean of the ranks' means, wrong for uneven shards
        return F.mse_loss(input, target, reduction="sum") / call.denominator()
    errors = (input - target).square() * weight
    if call.reduction == "none":
        return errors
    return errors.sum() / call.denominator() if call.reduction == "mean" else errors.sum()


def mse(call: Arguments) -> Tensor:
    """Return the loss of mse or rmse."""
    return call.finished(squared(call))
