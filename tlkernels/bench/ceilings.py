"""The limits of this machine, measured: bandwidth of a copy, rate of a matrix product, overhead of a call."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tlkernels.bench.work import name_of

COPIED = 256 << 20  # bytes: several times the caches of a processor
SIDE = {"cpu": 2048, "cuda": 8192}  # of a product that runs at the full rate
LONG = 0.1  # seconds of a product that is long enough: PyTorch multiplies some dtypes slowly on some processors
ROUNDS = 7
CALLS = 200
BEHIND = {"cpu": 1, "cuda": 8}  # calls between two waits: a GPU tells the end of one some 10 µs late


def _seconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the least seconds of a call: a limit is what the machine can do when nothing disturbs it."""

    def once() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return (time.perf_counter() - start) / calls

    once()
    return min(once() for _ in range(ROUNDS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def copy(device: torch.device) -> float:
    """Return the bandwidth of `copy_` in bytes per second; bytes read and bytes written both count."""
    source = torch.ones(COPIED // 4, device=device)
    out = torch.empty_like(source).copy_(source)  # the pages exist before the clock starts
    return 2 * COPIED / _seconds(lambda: out.copy_(source), device, BEHIND[device.type])


@functools.cache
def matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large square matrix product in floating-point operations per second.

    Float32 runs at the precision that `torch.set_float32_matmul_precision` chose.
    """
    side = SIDE[device.type] // 8
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=a.new_empty(side, side))
        start = time.perf_counter()
        product()
        _wait(device)
        if side == SIDE[device.type] or time.perf_counter() - start > LONG:
            return 2 * side**3 / _seconds(product, device, BEHIND[device.type])
        side *= 2


@functools.cache
def call(device: torch.device) -> float:
    """Return the seconds of a forward and a backward through one operation on one number."""
    x = torch.ones((), device=device, requires_grad=True)
    return float(statistics.median(_seconds(lambda: torch.autograd.grad(x.neg(), x), device, CALLS) for _ in range(3)))


def measured(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Return all limits, as the result file has them."""
    rates = {name_of(dtype): float(f"{matmul(device, dtype):.4g}") for dtype in dtypes}
    return {"copy": float(f"{copy(device):.4g}"), "matmul": rates, "call": float(f"{call(device):.4g}")}


def add_roofs(result: dict[str, Any], device: torch.device) -> None:
    """Measure the limits, unless this process has; add them to a result, and to each of its cases its roof.

    `roof` is the least seconds of a case whose data come from memory, and `limit` what sets it: "memory", "compute" or
    "call".
    """
    names = dict.fromkeys(case["dtype"] for case in result["cases"])
    result["ceilings"] = found = measured(device, [getattr(torch, name) for name in names])
    for case in result["cases"]:
        limits = {
            "memory": case["bytes"] / found["copy"],
            "compute": case["flops"] / found["matmul"][case["dtype"]],
            "call": found["call"],
        }
        case["limit"] = max(limits, key=lambda name: limits[name])
        case["roof"] = float(f"{limits[case['limit']]:.4g}")
