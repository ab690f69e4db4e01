"""Why a model of transformers cannot be served."""

from __future__ import annotations


class UnreadableHead(ValueError):
    """The logits of a model are not known to be those of `linear_cross_entropy`. Train it with its own loss."""


class UnknownLoss(ValueError):
    """The loss of a model is not known to be one of those that tlkernels computes. Train it with its own loss."""


def kind(thing: object) -> str:
    """Return the full name of a type."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
