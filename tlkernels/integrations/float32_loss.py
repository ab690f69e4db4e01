"""Losses of 16-bit tensors in float32, as the hosts have them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def float32_loss(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the loss of bfloat16 or float16 tensors is float32; their gradients keep their dtype.

    It autocasts to the dtype that all of them have, which changes no tensor. Under autocast losses are float32 already.
    """
    kind, dtypes = tensors[0].device.type, {tensor.dtype for tensor in tensors}
    narrow = dtypes in ({torch.bfloat16}, {torch.float16}) and not torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtypes.pop()) if narrow else nullcontext()
