"""Calls that launch every kernel of mse and use every row of its table; and `scale_`, which several losses use."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels._core.triton.kernels import scale_
from tlkernels.losses.mse.triton import backward, forward, step

_WIDE = {"squares": ("LDG.E.128", "STG.E.128")}
_WIDE_SCALE = {"scale": _WIDE["squares"]}


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = meta((2**20,), dtype)
        for weight in (None, x):
            run = partial(step, x, x, weight, None, 1.0, (True, True))
            yield Example(f"step-{dtype}-{weight is not None}", run, _WIDE)
        yield Example(f"scale-{dtype}", partial(scale_, x, meta((), dtype)), _WIDE_SCALE)
    x = meta((2**20,), torch.bfloat16)
    yield Example("forward", partial(forward, x, x, x), _WIDE)
    yield Example("backward", partial(backward, x, x, x, x, (True, False)), _WIDE)
