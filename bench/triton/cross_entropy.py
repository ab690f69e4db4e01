"""Calls that launch every kernel of cross entropy and use every row of its tables."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.triton import Example, meta
from tlkernels.losses.cross_entropy.triton import backward, backward_, directional, forward_stats, step

_WIDE = {"sweep": ("LDG.E.128", "STG.E.128")}
_PLAIN = (None, -100, 0.0, 1.0, None, 0.0, None)
_SMOOTH = (None, -100, 0.1, 2.0, 30.0, 1e-4, None)
_FEW = "8 to 32 bytes of a thread, once a row of which it holds 128 bytes: of 16 warps, each thread has 128 registers"
_SPILLS = {
    ("sweep", "sm_80", "spills: 46,"): _FEW,
    ("sweep", "sm_90", "spills: 4,"): _FEW,
    ("sweep", "sm_100", "spills: 18,"): _FEW,
}
_WITH_OPTIONS = {("sweep", "sm_120", "spills: 30,"): "of a row in registers with every option at once"}
_SCALARS = {
    (kernel, "gfx942", "spills"): "scalar registers, kept in lanes of vector registers: no memory"
    for kernel in ("sweep", "directional")
}


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for dtype, *sizes in (
        (torch.bfloat16, 1024, 4096, 8192, 32000, 128256),
        (torch.float32, 1024, 16384, 32000, 128256),
        (torch.float64, 4096, 8192, 32000),
    ):
        for classes in sizes:
            x, y = meta((4096, classes), dtype), meta((4096,), torch.int64)
            spills = _SPILLS if (dtype, classes) == (torch.float32, 16384) else {}
            yield Example(f"step-{classes}-{dtype}", partial(step, x, y, *_PLAIN, None, True), _WIDE, spills)
    x, y, rows = meta((4096, 32000), torch.bfloat16), meta((4096,), torch.int64), meta((4096,), torch.float32)
    for classes in (8192, 32000):
        z, weight = meta((4096, classes), torch.bfloat16), meta((classes,), torch.bfloat16)
        every = (weight, *_SMOOTH[1:], rows, True)
        yield Example(f"step-weighted-{classes}", partial(step, z, y, *every), _WIDE, _WITH_OPTIONS)
        yield Example(f"step-probabilities-{classes}", partial(step, z, z, *every), _WIDE)
        yield Example(f"stats-{classes}", partial(forward_stats, z, y, *_PLAIN), {"sweep": ("LDG.E.128",)})
    for dtype, *sizes in (
        (torch.bfloat16, 8192, 32000, 128256),
        (torch.float32, 16384, 32000, 128256),
        (torch.float64, 8192, 32000),
    ):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for classes in sizes:
            z, rows = meta((4096, classes), dtype), meta((4096,), wide)
            normaliser = rows, rows, rows
            call: tuple[Any, ...] = rows, None, None, z, y, *normaliser, *_PLAIN
            yield Example(f"backward-{classes}-{dtype}", partial(backward, *call), _WIDE)
            call = rows, rows, rows, z, y, *normaliser, *_SMOOTH[:-1], 2 * classes
            yield Example(f"backward-part-{classes}-{dtype}", partial(backward, *call), _WIDE)
    rows = meta((4096,), torch.float32)
    normaliser = rows, rows, rows
    yield Example("backward-in-place", partial(backward_, rows, rows, rows, x, y, *normaliser, *_PLAIN), _WIDE)
    for options in (_PLAIN, _SMOOTH):
        for classes in (8192, 32000):
            z = x[:, :classes]
            for upstreams in ((rows, rows, None), (rows, rows, rows)):
                entropy = "" if upstreams[2] is None else "-entropy"
                yield Example(
                    f"directional-{classes}-{options}{entropy}", partial(directional, z, *upstreams, z, y, *options),
                    {"directional": ("LDG.E.128", "STG.E.128")}, _SCALARS,
                )  # fmt: skip
    yield Example("step-odd", partial(step, meta((4096, 50257), torch.bfloat16), y, *_PLAIN, None, True))
    for classes in (21, 300):
        x, y = meta((8, classes, 512, 512), torch.bfloat16), meta((8, 512, 512), torch.int64)
        yield Example(f"columns-{classes}", partial(step, x, y, *_PLAIN, None, True), _WIDE, _SCALARS)
