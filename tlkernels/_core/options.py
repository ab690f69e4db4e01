"""Options as plain Python numbers, which is what kernels and compiled graphs hold: numpy scalars and tensors do not
reach them."""

import operator
from numbers import Real
from typing import Any

import numpy
import torch
from torch import Tensor


def integer(name: str, value: Any) -> int:
    """Return an integer that PyTorch's functions take as an int: all that has `__index__`, but no bool.

    Raises:
        TypeError: it is none.
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
        raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """Return a real number as a float: Python's, numpy's, or a 0-d tensor that needs no gradient; no bool.

    Raises:
        TypeError: it is none.
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
    """Return `label_smoothing`, in [0, 1]; `F.cross_entropy` takes a bool, too.

    Raises:
        TypeError, ValueError: it is none.
    """
    plain = _item(value)
    share = float(plain) if isinstance(plain, bool) else number("label_smoothing", value)
    if not 0 <= share <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {share}")
    return share


def flag(name: str, value: Any) -> bool:
    """Return a bool, Python's or numpy's.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected a bool, got {_kind(value)}")
    return bool(value)


def _item(value: Any) -> Any:
    """Return the Python number that a numpy scalar or a 0-d tensor without gradient holds; all else as it is."""
    if isinstance(value, numpy.generic) or (isinstance(value, Tensor) and not value.dim() and not value.requires_grad):
        return value.item()
    return value


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a Tensor of shape {tuple(value.shape)}" + (" that requires grad" if value.requires_grad else "")
