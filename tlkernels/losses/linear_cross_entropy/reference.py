"""Reference and test oracle: a linear layer, then the reference of cross entropy on the whole matrix of logits."""

import torch.nn.functional as F
from torch import Tensor

from tlkernels.losses.cross_entropy import reference
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput
from tlkernels.losses.linear_cross_entropy.call import Arguments


def linear_cross_entropy(call: Arguments) -> Tensor | CrossEntropyOutput:
    """Return the loss; with `stats`, a CrossEntropyOutput."""
    rows, flat = call.input.shape[:-1], call.flat()
    output = reference.cross_entropy(flat.on(_logits(flat)))
    if isinstance(output, Tensor):
        return output.reshape(rows) if call.reduction == "none" else output
    loss, *stats = output
    loss = loss.reshape(rows) if call.reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(rows) for value in stats))


def _logits(flat: Arguments) -> Tensor:
    """Return the logits. Ignored rows add nothing to the layer's gradients, not even 0 * NaN."""
    absent = flat.on_shape().absent()
    input = flat.input if absent is None else flat.input.masked_fill(absent.unsqueeze(1), 0)
    return F.linear(input, flat.linear_weight, flat.linear_bias)
