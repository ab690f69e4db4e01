"""The proof that a peer computes the same loss: value and gradients of a small case, against eager in float64."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from tlkernels.bench.peers.peer import Adapter, Peer, Refused
from tlkernels.bench.work import Case, Loss, LossStep, Shape, Work, name_of

FLOAT32, TF32, HALF = 1e-3, 5e-3, 3e-2
"""Largest relative errors in the 2-norm. Another loss is further away; see `_bar`."""
ROUNDED = 0.3
"""The same in 16 bits for a peer that is right in float32: it may round more often, and its error is in the results."""
ROWS, SIZE, LAST = 128, 64, 512
"""Largest sizes of a proof: of the first dimension, the others and the last, which has the classes or the features.
They differ, since the auto-chunker confuses dimensions of one size."""
HINTS = ("num_valid",)
"""Entries of `Work.data` that only tell what the tensors show."""


def small(shape: Shape) -> Shape:
    """Return sizes for a proof. What a size has beyond multiples of the limit stays, so that an odd size stays odd."""
    limits = [ROWS, *(SIZE for _ in shape[2:]), LAST]
    return tuple(size if size <= limit else limit + size % limit for size, limit in zip(shape, limits, strict=True))


def adapted(adapter: Adapter, work: Work) -> Loss:
    """Return the peer's loss with the data of a work.

    Raises:
        Refused: the library lacks an option.
    """
    data = {name: value for name, value in work.data.items() if name not in HINTS}
    if unknown := data.keys() - inspect.signature(adapter).parameters.keys():
        raise Refused(f"has no option {', '.join(sorted(unknown))}")
    return adapter(**data)


def prove(peer: Peer, case: Case) -> None:
    """Compare the peer with eager, in float32, if it takes that, and in the dtype of the case.

    Raises:
        Refused: it does not run, or computes another loss. The message is one line.
    """
    case = replace(case, shape=small(case.shape), peers=False)
    proven = False
    for dtype in dict.fromkeys((torch.float32, case.dtype)):
        tried = replace(case, dtype=dtype)
        work = tried.work()
        try:
            loss = adapted(peer.losses[case.loss], work)
            got = LossStep(loss, work, case.loss in peer.fresh).results()
        except Refused:
            raise
        except Exception as error:  # other libraries raise anything
            if dtype is case.dtype:
                raise Refused(_one_line(error)) from error
            continue
        _compare(peer, tried, work, got, proven)
        proven = True


def _compare(peer: Peer, case: Case, work: Work, got: list[Tensor], proven: bool) -> None:
    wide = case.work(wide=True)
    right = LossStep(wide.eager, wide).results()
    bar = ROUNDED if proven and case.dtype.itemsize == 2 else _bar(peer, case, work, right)
    for number, (found, exact) in enumerate(zip(got, right, strict=True)):
        error = _error(found, exact)
        if not error <= bar:  # NaN too
            part = f"gradient {number}" if number else "value"
            much = f"{error:.2g} in {name_of(case.dtype)}, more than {bar:.2g}"
            raise Refused(f"computes another loss: {part} differs by {much}")


def _bar(peer: Peer, case: Case, work: Work, right: list[Tensor]) -> float:
    """Return the largest error that is rounding; in 16 bits also twice eager's, which is large for pairs."""
    if case.dtype.itemsize > 2:
        return TF32 if peer.tf32 and case.device == "cuda" else FLOAT32
    try:
        eager = LossStep(work.eager, work).results()
    except RuntimeError:  # it lacks the dtype
        return HALF
    return max(HALF, *(2 * _error(got, exact) for got, exact in zip(eager, right, strict=True)))


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def _one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
