"""Timing one sample of a step on the CPU or on a GPU, with the caches emptied before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels.bench.work import Step

CACHES = Path("/sys/devices/system/cpu")
LEAST_EVICTED, MOST_EVICTED = 32 << 20, 256 << 20  # bytes; virtual machines often name no cache, or that of the host
GPU_CACHE = 256 << 20  # bytes; more than the second-level cache of any GPU
CYCLES_OF_A_US = 2000  # of the fastest clock; a slower one sleeps longer
AHEAD = 1.5  # times the host's time


class Sample(NamedTuple):
    """Seconds of one call on the device, and the seconds that the host took to launch it (on a CPU the same)."""

    seconds: float
    host: float


class Clock:
    """Times samples on one device. With `cold`, each sample begins with its inputs in memory, not in a cache."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.device = device
        size = (GPU_CACHE if device.type == "cuda" else _evicted()) if cold else 0
        self.evicted: Tensor | None = torch.zeros(size // 4, device=device) if size else None

    def sample(self, step: Step, calls: int = 1, ahead: float = 0.0) -> Sample:
        """Return the mean of `calls` calls, which follow one another with warm caches.

        On a GPU the device sleeps for `ahead` seconds until the host has launched everything: else a call whose kernels
        are faster than the host would be timed with the host's gaps, which `host` has.
        """
        step.prepare()
        if self.evicted is not None:
            self.evicted.add_(1)
        found = self._on_gpu(step, calls, ahead) if self.device.type == "cuda" else self._on_cpu(step, calls)
        step.release()
        return found

    def _on_cpu(self, step: Step, calls: int) -> Sample:
        start = perf_counter()
        for _ in range(calls):
            step()
        seconds = (perf_counter() - start) / calls
        return Sample(seconds, seconds)

    def _on_gpu(self, step: Step, calls: int, ahead: float) -> Sample:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(1e6 * ahead * CYCLES_OF_A_US))
        start = perf_counter()
        before.record()
        for _ in range(calls):
            step()
        after.record()
        host = (perf_counter() - start) / calls
        torch.cuda.synchronize(self.device)
        return Sample(before.elapsed_time(after) / 1e3 / calls, host)


def _evicted() -> int:
    """Return the bytes to write so that nothing else is left in the processor's caches."""
    return min(max(2 * max(_cache_sizes(), default=0), LEAST_EVICTED), MOST_EVICTED)


def _cache_sizes() -> Iterator[int]:
    for file in CACHES.glob("cpu0/cache/index*/size"):
        if found := re.fullmatch(r"(\d+)([KM])", file.read_text(encoding="ascii").strip()):
            yield int(found[1]) << (10 if found[2] == "K" else 20)
