"""Reference and test oracle: a linear layer, then the reference of cross entropy on the whole matrix of logits."""

import torch
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
    ignored = flat.on_shape().ignored()
    if ignored is None:
        return F.linear(*flat.layer)
    if not flat.stats:
        return _linear_without(ignored, flat)
    with torch.no_grad():
        logits = F.linear(*flat.layer)
    lse = torch.logsumexp(reference.scaled_logits(flat.on(logits)), 1, keepdim=True)
    # The other ignored rows have the gradient of their lse.
    ignored = ignored & ~(lse.isfinite() & flat.input.detach().isfinite().all(1, keepdim=True))
    return torch.where(ignored, logits, _linear_without(ignored, flat))


def _linear_without(ignored: Tensor, flat: Arguments) -> Tensor:
    return F.linear(flat.input.masked_fill(ignored, 0), flat.linear_weight, flat.linear_bias)
