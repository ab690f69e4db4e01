"""Reference and test oracle of the sigmoid contrastive loss: plain PyTorch, differentiable to any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.embeddings import numbers
from tlkernels.losses.sigmoid_contrastive.call import Arguments


def loss(call: Arguments) -> Tensor:
    """Return the loss."""
    return loss_in_compute_dtype(call).to(call.dtype)


def loss_in_compute_dtype(call: Arguments) -> Tensor:
    """Return the loss in the dtype of the computation."""
    compute = compute_dtype(call.query, call.key)
    scale, bias = (x.to(compute) if isinstance(x, Tensor) else x for x in (call.logit_scale, call.logit_bias))
    with torch.autocast(call.query.device.type, enabled=False):
        logits = call.query.to(compute) @ call.key.to(compute).T * scale + bias
    rows, columns = logits.shape
    positive = numbers(columns, logits) == numbers(rows, logits).unsqueeze(1) + call.positive_offset
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / rows
