"""Calls that launch every kernel of linear cross entropy and use every row of its tables."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels._core.triton import linear
from tlkernels.losses.linear_cross_entropy.triton import backward, forward_stats, step

_FEW = {
    ("gradient", "sm_80", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("statistics", "sm_100", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("statistics", "sm_120", "spills: 2,"): "a word in float64, whose products bound it",
    ("statistics", "sm_120", "spills: 4,"): "two words in float32 with a softcap, of 128 registers",
    ("statistics", "gfx942", "spills"): "scalar registers, kept in vector registers, not in memory",
}
_WIDE = {"statistics": ("LDG.E.128",), "gradient": ("LDG.E.128", "STG.E.128")}
_PRODUCTS = {"statistics": ("HGMMA",), "gradient": ("HGMMA",)}


def _call(
    strategy: str, dtype: torch.dtype, smoothing: float = 0.0, softcap: float | None = None, *,
    every_option: bool = False, probabilities: bool = False, tf32: bool = False,
) -> None:  # fmt: skip
    rows, features, classes = 4096, 4096, 128256
    x, w, b = meta((rows, features), dtype), meta((classes, features), dtype), meta((classes,), dtype)
    target = meta((rows, classes), dtype) if probabilities else meta((rows,), torch.int64)
    layer = (x, w, b if every_option else None)
    row_weight = meta((rows,), torch.float32) if every_option else None
    options = (b if every_option else None, -100, smoothing, 1.0, softcap, 0.0, None, row_weight, None)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with linear.forced(strategy):
            if every_option:
                g = meta((rows,), torch.float32)
                forward_stats(*layer, target, *options)
                backward(g, g, g, *layer, target, g, g, g, *options, (True, True, True))
            else:
                step(*layer, target, *options, True, (True, True, False))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for strategy, claims in (("chunks", _WIDE), ("lean", _PRODUCTS)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            claimed = claims if dtype == torch.bfloat16 else {}
            yield Example(f"{strategy}-{dtype}", partial(_call, strategy, dtype), claimed, _FEW)
        every = partial(_call, strategy, torch.bfloat16, 0.1, 30.0, every_option=True)
        yield Example(f"{strategy}-every-option", every, {}, _FEW)
        for dtype in (torch.float32, torch.float64):
            yield Example(f"{strategy}-softcap-{dtype}", partial(_call, strategy, dtype, 0.0, 30.0), {}, _FEW)
    probabilities = partial(_call, "chunks", torch.bfloat16, 0.1, probabilities=True)
    yield Example("chunks-probabilities", probabilities, {}, _FEW)
    yield Example("lean-tf32", partial(_call, "lean", torch.float32, tf32=True))
