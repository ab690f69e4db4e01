"""What an adapter is: a function that takes the entries of `Work.data` by name and returns another library's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from tlkernels.bench.work import Loss

Adapter = Callable[..., Loss]
"""Its keywords are the options that the library has. It imports the library."""
CPU_AND_CUDA = ("cpu", "cuda")


class Peer(NamedTuple):
    """One way to compute losses with another library."""

    name: str
    """Of the contestant."""
    package: str
    """The distribution on PyPI."""
    losses: Mapping[str, Adapter]
    """By tlkernels' loss."""
    devices: tuple[str, ...]
    """Device types on which it runs."""
    fresh: tuple[str, ...] = ()
    """Losses whose inputs it overwrites."""
    tf32: bool = False
    """Whether it multiplies float32 numbers in TF32, which has a mantissa of 10 bits."""
    compiles: bool = False
    """Whether it calls torch.compile: its first call takes seconds, as does one after `torch.compiler.reset`."""


class Refused(RuntimeError):
    """The library does not compute this; the message says why."""


def class_indices(target: Tensor) -> Tensor:
    """Return the target.

    Raises:
        Refused: it has probabilities.
    """
    if target.is_floating_point():
        raise Refused("takes class indices, not probabilities")
    return target


def beta_of(divergence: str) -> float:
    """Return the parameter of the generalised Jensen-Shannon divergence, whose ends are the two KL divergences.

    Raises:
        Refused: it is no such divergence.
    """
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
    if divergence not in betas:
        raise Refused(f"has no divergence {divergence!r}")
    return betas[divergence]


def one_class(index: Tensor) -> Tensor:
    """Return the classes without their last dimension.

    Raises:
        Refused: several classes of a row are selected.
    """
    if index.shape[-1] != 1:
        raise Refused("selects one class of a row")
    return index.squeeze(-1)
