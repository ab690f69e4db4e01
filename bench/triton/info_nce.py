"""Calls that launch every kernel of InfoNCE, use every row of its tables, and the options that cost a kernel most."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.triton import SIMILARITY_CLAIMS, SIMILARITY_EXCEPTIONS, Example, meta
from tlkernels.losses.info_nce.triton import backward, forward

_OF_LABELS = {
    ("gradient", "sm_100", "spills: 6,"): "six words once a tile, where all 255 registers are in use",
    ("statistics", "gfx942", "spills: 12"): "twelve words once a tile",
}


def _arguments(
    n: int, d: int, dtype: torch.dtype, *, negatives: tuple[int, ...] | None = None, paired: bool = False,
    target: bool = False, mask: bool = False, ids: bool = False, self_column: int = -1, by_label: bool = False,
    symmetric: bool = False, normalize: bool = False, label_smoothing: float = 0.0,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the arguments of `forward`."""
    numbers = meta((n,), torch.int64)
    return (
        meta((n, d), dtype), None if paired else meta((n, d), dtype), negatives and meta(negatives, dtype),
        meta((), torch.float32), numbers if target else None, meta((n, n), torch.bool) if mask else None,
        numbers if ids else None, None, self_column, by_label, symmetric, normalize, label_smoothing,
    )  # fmt: skip


def _both(arguments: tuple[Any, ...]) -> None:
    loss, state = forward(*arguments)
    backward(loss, state, *arguments, [True] * 4)


def examples() -> Iterator[Example]:
    """Yield the calls."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    views = {"paired": True, "self_column": 0, "normalize": True}
    everything = {"mask": True, "symmetric": True, "normalize": True, "label_smoothing": 0.1}
    calls: tuple[tuple[str, int, int, torch.dtype, dict[str, Any]], ...] = (
        ("clip", 65536, 1024, bf16, {"symmetric": True}),
        ("clip-small", 512, 512, bf16, {"symmetric": True}),
        ("clip", 65536, 1024, f16, {"symmetric": True}),
        ("clip", 8192, 384, f32, {"symmetric": True}),
        ("clip", 8192, 384, f64, {"symmetric": True, "normalize": True}),
        ("nt_xent", 8192, 128, bf16, {**views, "target": True}),
        ("sup_con", 8192, 128, bf16, {**views, "ids": True, "by_label": True}),
        ("everything", 8192, 384, bf16, {**everything, "negatives": (4096, 384)}),
        ("everything", 8192, 384, f32, {**everything, "negatives": (8192, 64, 384)}),
        ("per-query-negatives", 8192, 384, bf16, {"negatives": (8192, 64, 384)}),
    )
    for name, n, d, dtype, options in calls:
        # Negatives of each query are read, not multiplied.
        claims = SIMILARITY_CLAIMS if dtype in (bf16, f16) and name != "per-query-negatives" else {}
        exceptions = SIMILARITY_EXCEPTIONS if name in ("clip", "per-query-negatives") else _OF_LABELS
        run = partial(_both, _arguments(n, d, dtype, **options))
        yield Example(f"{name}-{str(dtype).removeprefix('torch.')}", run, claims, exceptions)
