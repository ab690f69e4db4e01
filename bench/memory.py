"""Peak memory above the inputs, each time in a new process: memory left by earlier cases would hide a part of it."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from bench.work import Case, Step, build
from tlkernels.train.memory import resident

SLACK = 4 << 20  # thread stacks and huge-page rounding move the resident size too
GRAIN = 32 << 20  # where eager's peak is lower, SLACK is too much of it
ELEMENTS = 2 << 20  # smaller cases are not tried: a process takes seconds, and the grid has hundreds of cases


def peak(step: Step, calls: int = 2) -> int:
    """Return the highest resident bytes during the calls, less those before the first.

    A buffer that stays allocated between the calls counts.
    """
    step.prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free pages that the allocator holds would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = resident("VmRSS")
    step()
    for _ in range(calls - 1):
        step.release()
        step.prepare()
        step()
    return resident("VmHWM") - before


def peaks(case: Case, names: Sequence[str]) -> dict[str, int]:
    """Return the peak bytes of each contestant; nothing for small cases and where the system is not Linux."""
    if prod(case.shape) < ELEMENTS or not Path("/proc/self/clear_refs").exists():
        return {}
    # Every large buffer gets a mapping of its own: in the heap, where glibc would come to put them, gaps count as well.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    folder = Path(__file__).parents[1]
    found = {}
    for name in names:
        command = [sys.executable, "-m", "bench.memory", case.id, name]
        found[name] = int(subprocess.check_output(command, cwd=folder, env=environment))
    return found if max(found.values(), default=0) >= GRAIN else {}


def main() -> None:
    from bench.cases import CASES

    case_id, name = sys.argv[1:]
    (case,) = (case for case in CASES if case.id == case_id)
    # What PyTorch and the extension load and set up on their first call is not this call's memory.
    small = replace(case, shape=tuple(min(size, 8) for size in case.shape))
    peak(build(name, small.work()))
    print(peak(build(name, case.work())))


if __name__ == "__main__":
    main()
