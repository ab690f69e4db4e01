"""Why a model of transformers cannot be served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UnreadableHead(ValueError):
    """The logits of a model are not known to be those of `linear_cross_entropy`. Train it with its own loss."""


class UnknownLoss(ValueError):
    """The loss of a model is not known to be one of those that tlkernels computes. Train it with its own loss."""


def kind(thing: object) -> str:
    """Return the full name of a type."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


@contextmanager
def with_remedy() -> Iterator[None]:
    """Add to an `UnreadableHead` what its user can do."""
    try:
        yield
    except UnreadableHead as error:
        raise UnreadableHead(
            f"{error}. Keep adapters, quantisation and sharding off the head, or leave the model unpatched and give "
            "the Trainer compute_loss_func=hf.compute_loss_func(model)"
        ) from error
