"""What a call of the sigmoid contrastive loss is: its tensors, checked by `api.py`."""

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One checked call."""

    query: Tensor
    key: Tensor
    logit_scale: Tensor | float
    logit_bias: Tensor | float
    own: int
    """The column of row 0's positive, and so on along the rows."""
    dtype: torch.dtype
    """Of the loss."""
