"""Arguments of the sigmoid contrastive loss, which `api.py` validates."""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of a call."""

    query: Tensor
    key: Tensor
    logit_scale: Tensor | float
    logit_bias: Tensor | float
    positive_offset: int
    """The positive of row i is column i + positive_offset."""
    dtype: torch.dtype
    """The dtype of the loss."""
