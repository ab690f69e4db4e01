"""Reference and test oracle: linear distillation in plain PyTorch, on any device, differentiable to any order."""

import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.reduction import reduce
from tlkernels.losses.distillation import reference
from tlkernels.losses.distillation.call import Options, absent_rows
from tlkernels.losses.linear_distillation.call import Arguments, Layers


def linear_distillation(call: Arguments) -> Tensor:
    """Return the loss."""
    mean = call.reduction in ("mean", "batchmean")
    rows = losses(call.layers, call.options)
    return reduce(rows, call.denominator(), "mean" if mean else call.reduction).to(call.dtype)


def losses(layers: Layers, options: Options) -> Tensor:
    """Return the loss of each row, in the dtype of the computation."""
    absent = absent_rows(options)
    if absent is not None:  # they add nothing to the layers' gradients, not even 0 * NaN
        layers = layers._replace(
            student_input=layers.student_input.masked_fill(absent.unsqueeze(-1), 0),
            teacher_input=layers.teacher_input.masked_fill(absent.unsqueeze(-1), 0),
        )
    return reference.losses(F.linear(*layers.student), F.linear(*layers.teacher), options)
