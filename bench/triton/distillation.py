"""Calls that launch every kernel of distillation and use every row of its table."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels.losses.distillation.call import DIVERGENCES
from tlkernels.losses.distillation.triton import backward, forward, second, step

_OF_SECOND = {
    ("second", "sm_100", "LDG.E.128"): "half as wide: what it reads is in L2, and registers are what is short",
    ("second", "gfx942", "spills"): "scalar registers, kept in lanes of vector registers: no memory",
}


def examples() -> Iterator[Example]:
    """Yield the calls."""
    wide = {"distillation": ("LDG.E.128", "STG.E.128")}
    plain = (None, None, 2.0, "forward_kl", 0.5, 0.0, -100, 0.0, None, None)
    for dtype, *sizes in (
        (torch.bfloat16, 1024, 2048, 4096, 8192, 32000),
        (torch.float32, 8192, 32000),
        (torch.float64, 4096, 32000),
    ):
        for classes in sizes:
            x = meta((4096, classes), dtype)
            yield Example(f"step-{classes}-{dtype}", partial(step, x, x, *plain, True, (True, False)), wide)
    target, rows = meta((4096,), torch.int64), meta((4096,), torch.float32)
    x = meta((4096, 32000), torch.bfloat16)
    for divergence in DIVERGENCES:
        options = (target, rows, 2.0, divergence, 0.3, 0.5, -100, 0.1, None, None)
        capped = *options[:-2], 30.0, 50.0
        for z in (meta((4096, 8192), torch.bfloat16), x):
            for name, given in (("", options), ("-softcap", capped)):
                run = partial(backward, rows, z, z, *given, (True, True))
                yield Example(f"{divergence}-{z.shape[1]}{name}", run, wide)
        for name, given in (("", options), ("-softcap", capped)):
            yield Example(
                f"second-{divergence}{name}", partial(second, x, x, rows, x, x, *given, (True, True)),
                {"second": wide["distillation"]}, _OF_SECOND,
            )  # fmt: skip
    yield Example("losses", partial(forward, x, x, *plain), {"distillation": ("LDG.E.128",)})
