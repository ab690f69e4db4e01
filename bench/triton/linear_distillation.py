"""Calls that launch every kernel of linear distillation and use every row of its tables."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels._core.triton import linear
from tlkernels.losses.distillation.call import DIVERGENCES, Options
from tlkernels.losses.linear_distillation.triton import backward, step

_FEW = {
    ("average", "sm_100", "spills: 2,"): "two words of 255 registers in float32, whose products bound it",
    ("gradient", "sm_100", "spills: 2,"): "a word of 255 registers, with all options at once",
    ("normalise", "gfx942", "spills"): "scalar registers, kept in vector registers, not in memory",
    ("average", "gfx942", "spills"): "scalar registers, kept in vector registers, not in memory",
}
_CAPPED = _FEW | {
    (kernel, "sm_*", "spills"): "lean with a softcap, up to 400 words with every option at once: slow, and unmeasured"
    for kernel in ("average", "gradient")
}
_WIDE = {"normalise": ("LDG.E.128",), "average": ("LDG.E.128",), "gradient": ("LDG.E.128", "STG.E.128")}
_PRODUCTS = {kernel: ("HGMMA",) for kernel in _WIDE}


def _call(
    strategy: str, dtype: torch.dtype, divergence: str, hard_weight: float = 0.0, both: bool = False,
    softcap: float | None = None,
) -> None:  # fmt: skip
    rows, features, classes = 4096, 4096, 128256
    x, w, b = meta((rows, features), dtype), meta((classes, features), dtype), meta((classes,), dtype)
    y, g = meta((rows,), torch.int64), meta((rows,), torch.float32)
    layer = (x, w, b) if both else (x, w, None)
    options = Options(
        y if both else None, g if both else None, 2.0, divergence, 0.5, hard_weight, -100, 0.1, softcap, softcap
    )
    needs = [True, True, both, both, both, both]
    with linear.forced(strategy):
        if both:
            backward(g, *layer, *layer, *options, needs)
        else:
            step(*layer, *layer, *options, True, needs)


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for strategy, claims in (("chunks", _WIDE), ("lean", _PRODUCTS)):
        for divergence in DIVERGENCES if strategy == "chunks" else ("forward_kl", "tv"):
            run = partial(_call, strategy, torch.bfloat16, divergence)
            yield Example(f"{strategy}-{divergence}", run, claims, _FEW)
        for dtype in (torch.float32, torch.float64):
            yield Example(f"{strategy}-{dtype}", partial(_call, strategy, dtype, "js"), {}, _FEW)
        hard = partial(_call, strategy, torch.bfloat16, "js", hard_weight=0.5, both=True)
        yield Example(f"{strategy}-every-option", hard, claims, _FEW)
        for divergence in ("forward_kl", "js"):
            capped = partial(_call, strategy, torch.bfloat16, divergence, softcap=30.0)
            yield Example(f"{strategy}-softcap-{divergence}", capped, claims, _CAPPED)
        capped = partial(_call, strategy, torch.bfloat16, "js", hard_weight=0.5, both=True, softcap=30.0)
        yield Example(f"{strategy}-every-option-softcap", capped, claims, _CAPPED)
