"""Calls that launch every kernel of linear_selective_log_softmax."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.triton import Example, meta
from tlkernels.losses.linear_selective_log_softmax.triton import backward, forward

_FEW = {("statistics", "sm_100", "spills: 4,"): "two words in float64"}
_WIDE = {"statistics": ("LDG.E.128",), "gradient": ("LDG.E.128", "STG.E.128")}


def examples() -> Iterator[Example]:
    """Yield the calls."""
    rows, features, classes = 4096, 4096, 128256
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        layer = meta((rows, features), dtype), meta((classes, features), dtype), None
        row = meta((rows,), wide)
        for selected, softcap, entropy in ((1, None, False), (64, None, True), (64, 30.0, True)):
            index, grad = meta((rows, selected), torch.int64), meta((rows, selected), wide)
            upstreams = grad, row if entropy else None
            normaliser = row, row, row if entropy else meta((0,), wide)
            name = f"{selected}-{softcap}-{dtype}"
            claims = _WIDE if dtype == torch.bfloat16 else {}
            yield Example(f"forward-{name}", partial(forward, *layer, index, 1.0, softcap, entropy), claims, _FEW)
            call = *upstreams, *layer, index, *normaliser, 1.0, softcap, (True, True, False)
            yield Example(f"backward-{name}", partial(backward, *call), claims)
