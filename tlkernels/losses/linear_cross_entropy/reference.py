"""Reference and test oracle: a linear layer, then the reference of cross entropy on the whole matrix of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.autograd import eager
from tlkernels.losses.cross_entropy import reference
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput
from tlkernels.losses.linear_cross_entropy.call import Arguments


def linear_cross_entropy(call: Arguments) -> Tensor | CrossEntropyOutput:
    """Return the loss; with `stats`, a CrossEntropyOutput."""
    rows, flat = call.input.shape[:-1], call.flat()
    output = reference.cross_entropy(flat.on(_logits(flat)))
    loss, *stats = (output,) if isinstance(output, Tensor) else output
    loss = _checked(loss, flat)
    loss = loss.reshape(rows) if call.reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(rows) for value in stats)) if stats else loss


def _checked(loss: Tensor, flat: Arguments) -> Tensor:
    """Return the loss, NaN if `num_valid` is wrong; on a CPU that raises ValueError, except within a transform."""
    if flat.num_valid is None or flat.target.is_floating_point():
        return loss
    counted = (flat.target != flat.options.ignore_index).sum()
    if counted.device.type == "cpu" and eager(counted) and int(counted) != flat.num_valid:
        raise ValueError(
            f"num_valid: expected {int(counted)}, the number of rows that are not ignored, got {flat.num_valid}"
        )
    return torch.where(counted == flat.num_valid, loss, torch.nan)


def _logits(flat: Arguments) -> Tensor:
    """Return the logits. Ignored rows add nothing to the layer's gradients, not even 0 * NaN."""
    absent = flat.on_shape().absent()
    input = flat.input if absent is None else flat.input.masked_fill(absent.unsqueeze(1), 0)
    return F.linear(input, flat.linear_weight, flat.linear_bias)
