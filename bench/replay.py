"""Gives pytest-benchmark the samples that the interleaved rounds have timed."""

from collections import deque
from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture

_moments: deque[float] = deque()


def clock() -> float:
    """The timer of pytest-benchmark: the two calls around a round are one sample apart."""
    return _moments.popleft()


def play(benchmark: BenchmarkFixture, times: Sequence[float]) -> None:
    """Record `times` as the rounds of `benchmark`."""
    _moments.extend(moment for time in times for moment in (0.0, time))
    benchmark.pedantic(lambda: None, rounds=len(times))  # type: ignore[no-untyped-call]
    _moments.clear()
