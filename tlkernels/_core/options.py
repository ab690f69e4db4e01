"""Conversion of options to Python numbers, since kernels and compiled graphs take no numpy scalars and no tensors."""

import operator
from numbers import Real
from typing import Any

import numpy
import torch
from torch import Tensor


def integer(name: str, value: Any) -> int:
    """Return `value` as an int, as PyTorch's functions do: anything with `__index__` except a bool.

    Raises:
        TypeError: `value` has another type.
        ValueError: it does not fit into 64 bits.
    """
    if type(value) is not int:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError(f"{name}: expected an int, got bool")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """Return `value` as a float: a real number of Python or numpy but no bool, or a 0-d tensor without a gradient.

    A tensor on a GPU costs a host sync, as in PyTorch's functions.

    Raises:
        TypeError: `value` has another type.
        ValueError: it is too large for a float.
    """
    if isinstance(value, float):
        return float(value)
    plain = _item(value)
    if not isinstance(plain, Real) or isinstance(plain, bool):
        raise TypeError(f"{name}: expected a number, got {_kind(value)}")
    try:
        return float(plain)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one too large for a float") from None


def smoothing(value: Any) -> float:
    """Return `label_smoothing` as a float in [0, 1]; unlike other numbers it may be a bool, as in `F.cross_entropy`.

    Raises:
        TypeError, ValueError: `value` has another type or is out of range.
    """
    plain = value if isinstance(value, float) else _item(value)
    share = float(plain) if isinstance(plain, (float, bool)) else number("label_smoothing", value)
    if not 0 <= share <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {share}")
    return share


def flag(name: str, value: Any) -> bool:
    """Return a bool of Python or numpy as a Python bool.

    Raises:
        TypeError: `value` has another type.
    """
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected a bool, got {_kind(value)}")
    return bool(value)


def _item(value: Any) -> Any:
    """Return the Python number in a numpy scalar or in a 0-d tensor that needs no gradient; otherwise `value`."""
    if isinstance(value, numpy.generic) or (isinstance(value, Tensor) and not value.dim() and not value.requires_grad):
        return value.item()
    return value


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a Tensor of shape {tuple(value.shape)}" + (" that requires grad" if value.requires_grad else "")
