"""The oracle: a linear layer and then the reference of cross entropy, with all logits at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels.losses.cross_entropy import reference
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput
from tlkernels.losses.linear_cross_entropy.call import Call


def linear_cross_entropy(call: Call) -> Tensor | CrossEntropyOutput:
    """Return the loss, or the loss and statistics."""
    rows, flat = call.input.shape[:-1], call.flat()
    output = reference.cross_entropy(flat.on(_logits(flat)))
    if isinstance(output, Tensor):
        return output.reshape(rows) if call.reduction == "none" else output
    loss, *stats = output
    loss = loss.reshape(rows) if call.reduction == "none" else loss
    return CrossEntropyOutput(loss, *(value.reshape(rows) for value in stats))


def _logits(flat: Call) -> Tensor:
    """Return the logits. In the layer's gradients ignored features have no part, not even 0 * NaN."""
    absent = flat.on_shape().ignored()
    if absent is None:
        return F.linear(*flat.layer)
    if not flat.stats:
        return _linear_without(absent, flat)
    with torch.no_grad():
        given = F.linear(*flat.layer)
    lse = torch.logsumexp(reference.scaled_logits(flat.on(given)), 1, keepdim=True)
    absent = absent & ~(lse.isfinite() & flat.input.detach().isfinite().all(1, keepdim=True))  # others have lse's own
    return torch.where(absent, given, _linear_without(absent, flat))


def _linear_without(absent: Tensor, flat: Call) -> Tensor:
    return F.linear(flat.input.masked_fill(absent, 0), flat.linear_weight, flat.linear_bias)
