"""How much of the cores other processes use while something is timed."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Self

STAT = Path("/proc/stat")
BUSY = 0.05
"""The most of the cores that other processes may use in the timed rounds of a run.

With two cores that is a tenth of one: a thread on that core takes a tenth longer, which is less than the quartiles of
most cases are apart (10 to 30 %). An idle machine shows 0.002 to 0.003.
"""
BUSY_CASE = 0.1
"""The most in one case: the rounds of a small case last 0.3 s, and the kernel tells hundredths of a second."""


class Watch:
    """Measures `share`, the part of the cores that other processes used inside the block, and `wall`, in seconds.

    It is the time that is neither idle (in /proc/stat) nor used by this process or by children that have ended; time
    stolen by a hypervisor counts. It may be slightly below zero, and is None where there is no /proc/stat.
    """

    share: float | None = None
    wall = 0.0

    def __enter__(self) -> Self:
        self._start = perf_counter(), _idle(), _own()
        return self

    def __exit__(self, *_: object) -> None:
        start, idle, own = self._start
        self.wall = perf_counter() - start
        now = _idle()
        if idle is not None and now is not None:
            cores = self.wall * (os.cpu_count() or 1)
            self.share = 1 - (now - idle + _own() - own) / cores


def of_run(cases: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share over the timed rounds of all cases."""
    if not cases or any(case["busy"] is None for case in cases):
        return None
    wall = sum(case["wall"] for case in cases)
    other = sum(case["busy"] * case["wall"] for case in cases)
    return max(0.0, float(round(other / wall, 4)))


def _idle() -> float | None:
    """Return the seconds that the cores were idle since the machine started, all together."""
    if not STAT.exists():
        return None
    idle, iowait = STAT.read_text().split(maxsplit=6)[4:6]
    return (int(idle) + int(iowait)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
