"""Reference and test oracle: selective_log_softmax in plain PyTorch, on any device, differentiable to any order."""

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels.losses.selective_log_softmax.call import Arguments, Options


def selective_log_softmax(call: Arguments) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the entropy, which is empty where it is not asked for."""
    return selected(call.logits, call.indices, call.options)


def scaled(logits: Tensor, options: Options) -> Tensor:
    """Return the logits after softcap and temperature, in the dtype of the computation."""
    z = logits.to(compute_dtype(logits))
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z / options.temperature


def selected(logits: Tensor, index: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the entropy, which is empty where it is not asked for."""
    present = index >= 0
    absent = ~present.any(-1, keepdim=True)
    # Zeros in place of rows without a class: a logit that is not finite would make its gradient 0 * NaN.
    log_p = scaled(logits.masked_fill(absent, 0), options).log_softmax(-1)
    log_probs = log_p.gather(-1, index.clamp(min=0)).masked_fill(~present, -torch.inf)
    if not options.entropy:
        return log_probs, log_p.new_empty((0,))
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)  # before the product: its backward would turn 0 * -inf into NaN
    return log_probs, -(p * log_p).sum(-1).masked_fill(absent.squeeze(-1), 0)
