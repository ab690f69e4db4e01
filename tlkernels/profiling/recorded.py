"""What a step's losses are kept as, until they are computed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlkernels.profiling.calls import Compared, Logits


@dataclass
class Recorded:
    """The calls of a loss in a step; of several, the one with the most elements."""

    call: Compared
    calls: int
    elements: int
    """Of all calls."""
    largest: int
    """Of `call`."""
    autocast: torch.dtype | None
    logits: Logits | None
    spans_processes: bool
    parts: tuple[str, ...] = ()
    """Names of the tensors that need a gradient, where their errors are told apart."""


def autocast_of(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on a tensor's device; None where it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def detached(leaf: Any) -> Any:
    """Return a tensor without its graph, in the same memory; anything else as it is."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
