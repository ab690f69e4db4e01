"""Arguments of selective_log_softmax and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.autograd import eager
from tlkernels._core.dtypes import FLOATING, INTEGER, cast
from tlkernels._core.options import flag, number


class Options(NamedTuple):
    """The options, in the order of the ops' arguments."""

    temperature: float
    softcap: float | None
    entropy: bool


class Arguments(NamedTuple):
    """The arguments of a call, with all leading dimensions flattened into rows."""

    logits: Tensor
    """(N, C)"""
    indices: Tensor
    """(N, K), int64, contiguous; -1 means no class."""
    options: Options


def plain_options(temperature: float, softcap: float | None, entropy: bool = False) -> Options:
    """Return the options as Python numbers.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """
    temperature, softcap = number("temperature", temperature), None if softcap is None else number("softcap", softcap)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a finite number above 0, got {softcap}")
    return Options(temperature, softcap, flag("return_entropy", entropy))


def check_logits(name: str, logits: Tensor) -> None:
    """Raise TypeError or ValueError unless `logits` is a Tensor of shape (..., C) and a supported dtype."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., C) with C above 0, got {tuple(logits.shape)}")


def check_index(index: Tensor, of: Tensor, classes: int) -> Tensor:
    """Return `index` as a matrix for the ops; `of` has the rows, of shape (..., any).

    Raises:
        TypeError: `index` has the wrong type or dtype.
        ValueError: its shape or device does not match.
        IndexError: see `in_range`.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a Tensor, got {type(index).__name__}")
    if index.dtype not in INTEGER:
        raise TypeError(f"index: expected an integer dtype, got {index.dtype}")
    rows = of.shape[:-1]
    if index.shape != rows and (index.dim() != of.dim() or index.shape[:-1] != rows):
        raise ValueError(f"index: expected shape {tuple(rows)} or {(*rows, 'K')}, got {tuple(index.shape)}")
    if index.device != of.device:
        raise ValueError(f"index: expected it on the device of the logits, {of.device}, got {index.device}")
    if index.shape[len(rows) :] == (0,):  # a column that `result` leaves out, for the ops skip rows without a class
        index = index.new_zeros((*rows, 1))
    index = index.reshape(-1, index.shape[-1] if index.dim() > len(rows) else 1).long()
    return in_range("index", index, classes).contiguous()


def in_range(name: str, index: Tensor, classes: int, least: int = 0) -> Tensor:
    """Return class indices for the ops, which check that they are below `classes` and where -1 means no class.

    Raises:
        IndexError: an index is below `least` or not below `classes`; only for tensors on CPU, outside of torch.compile.
    """
    if index.device.type == "cpu" and eager(index):
        if index.numel():
            smallest, largest = (int(value) for value in index.aminmax())
            if smallest < least or largest >= classes:
                wrong = smallest if smallest < least else largest
                raise IndexError(f"{name}: expected class indices in [{least}, {classes}), got {wrong}")
        return index
    return index.masked_fill(index < least, classes)  # out of range for the ops too


def shaped(
    log_probs: Tensor, entropy: Tensor, index: Tensor, of: Tensor, dtype: torch.dtype, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the results of the ops in the shape of the user's `index` and in `dtype`; `of` is as in `check_index`."""
    if log_probs.numel() != index.numel():  # K = 0
        log_probs = log_probs[:, :0]
    log_probs = cast(log_probs, dtype).reshape(index.shape)
    return (log_probs, cast(entropy, dtype).reshape(of.shape[:-1])) if options.entropy else log_probs
