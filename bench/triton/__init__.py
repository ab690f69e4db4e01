"""Calls whose Triton kernels are compiled ahead of time for every architecture: one module per loss, with `examples()`.

`bench/triton_resources.py` reads them. It fails if a kernel spills, or lacks an instruction that its example claims,
unless the example has an exception for it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """A call of a launcher with meta tensors."""

    name: str
    run: Callable[[], Any]
    claims: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Kernel -> instructions that its model of bytes or operations needs: "LDG.E.128", "STG.E.128", "HGMMA"."""
    exceptions: Mapping[tuple[str, str, str], str] = MappingProxyType({})
    """(kernel, pattern of the architecture, problem: "spills", "local" or an instruction) -> why it is accepted."""


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


SIMILARITY_CLAIMS = {name: ("HGMMA",) for name in ("statistics", "gradient", "pairs")}
"""Of sweeps over similarities of 16-bit embeddings."""
SIMILARITY_EXCEPTIONS = {
    (name, "sm_*", problem): "some values of the epilogue, once a tile, so that two programs share a multiprocessor"
    for name in ("statistics", "gradient", "pairs")
    for problem in ("spills", "local")
} | {
    (name, "gfx942", "spills"): "scalar registers, kept in lanes of vector registers: no memory"
    for name in ("statistics", "pairs")
}
"""Spills of the kernels with a register limit (`maxnreg` in `similarity.TILES`)."""
