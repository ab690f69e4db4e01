"""Comparing the speed of functions by calling them in turns, since a machine's speed changes over time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(ways: Mapping[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, float]:
    """Return the median seconds of a call of each function, called in turns for `seconds` and at least `least` times.

    On a GPU a call ends when the device is done.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, way in ways.items():
            wait()
            started = time.perf_counter()
            way()
            wait()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in times.items()}


def wait() -> None:
    """Wait until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
