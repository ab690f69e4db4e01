"""Calls that launch every kernel of the sigmoid contrastive loss and use every row of its tables."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.triton import SIMILARITY_CLAIMS, SIMILARITY_EXCEPTIONS, Example, meta
from tlkernels.losses.sigmoid_contrastive.triton import forward, step


def _run(function: Any, n: int, dtype: torch.dtype) -> Any:
    x, number = meta((n, 768), dtype), meta((), torch.float32)
    if function is forward:
        return partial(forward, x, x, number, number, 0)
    return partial(step, number, x, x, number, number, 0, [True] * 4)


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for function, n, dtype in (
        (step, 512, torch.bfloat16),
        (step, 32768, torch.bfloat16),
        (forward, 32768, torch.bfloat16),
        (step, 32768, torch.float16),
        (step, 32768, torch.float32),
        (step, 32768, torch.float64),
    ):
        claims = SIMILARITY_CLAIMS if dtype.itemsize == 2 else {}
        name = f"{function.__name__}-{n}-{str(dtype).removeprefix('torch.')}"
        yield Example(name, _run(function, n, dtype), claims, SIMILARITY_EXCEPTIONS)
