"""Reference and test oracle: a linear layer, then the reference of selective_log_softmax on all logits."""

import torch.nn.functional as F
from torch import Tensor

from tlkernels.losses.linear_selective_log_softmax.call import Arguments
from tlkernels.losses.selective_log_softmax import reference


def linear_selective_log_softmax(call: Arguments) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the entropy, which is empty where it is not asked for."""
    # Rows without a class add nothing to the layer's gradients, not even 0 * NaN.
    absent = (call.indices < 0).all(-1, keepdim=True)
    layer = call.layer._replace(input=call.layer.input.masked_fill(absent, 0))
    return reference.selected(F.linear(*layer), call.indices, call.options)
