"""Calls that launch every kernel of selective_log_softmax and use every row of its table."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels.losses.selective_log_softmax.triton import backward, forward

_FEW = {("sweep", "sm_120", "spills"): "a few words in float64, which is slow there"}


def examples() -> Iterator[Example]:
    """Yield the calls."""
    for dtype, *sizes in ((torch.bfloat16, 8192, 151936), (torch.float32, 32000), (torch.float64, 32000)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for classes in sizes:
            for selected in (1, 8, 64):
                for softcap in (None, 30.0):
                    x, index = meta((8192, classes), dtype), meta((8192, selected), torch.int64)
                    g, row = meta((8192, selected), wide), meta((8192,), wide)
                    name = f"{classes}-{selected}-{softcap}-{dtype}"
                    call = x, index, 1.0, softcap
                    yield Example(f"forward-{name}", partial(forward, *call, False), {"sweep": ("LDG.E.128",)})
                    entropy = partial(forward, *call, True)
                    yield Example(f"entropy-{name}", entropy, {"sweep": ("LDG.E.128",)}, _FEW)
                    yield Example(
                        f"backward-{name}", partial(backward, g, row, x, index, row, row, row, 1.0, softcap),
                        {"sweep": ("LDG.E.128", "STG.E.128")},
                    )  # fmt: skip
