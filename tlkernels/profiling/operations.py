"""How many floating-point operations the matrix products of a step have, by dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tlkernels.bench import ceilings
from tlkernels.train.memory import out_of_memory


class Operations(FlopCounterMode):
    """PyTorch's counter, which also keeps the dtypes. What a step computes twice counts twice."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.by_dtype: Counter[torch.dtype] = Counter()

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        if more := self.get_total_flops() - before:
            floating = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            self.by_dtype[next(floating).dtype] += more
        return out


def utilisation(by_dtype: Mapping[torch.dtype, int], device: torch.device, seconds: float) -> dict[str, Any]:
    """Return the operations, the measured ceilings of their dtypes, and the share of these that a step reaches.

    Without memory for the products that measure them, there are no ceilings.
    """
    rates: dict[torch.dtype, float] = {}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            rates = {dtype: ceilings.matmul(device, dtype) for dtype in by_dtype}
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    least = sum(flops / rates[dtype] for dtype, flops in by_dtype.items()) if rates else None
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in by_dtype}
    return {
        "flops": sum(by_dtype.values()) or None,
        "flops_by_dtype": {names[dtype]: flops for dtype, flops in by_dtype.items()},
        "ceiling": {names[dtype]: rate for dtype, rate in rates.items()},
        "mfu": None if least is None else least / seconds,
    }
