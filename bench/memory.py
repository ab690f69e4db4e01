"""Peak memory above the inputs, in a process of its own: what earlier cases left behind would hide as much of it."""

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.cases import CASES, Case
from bench.contestants import Step, build

GRAIN = 16 << 20  # thread stacks and huge-page rounding move the resident size too: below this it says nothing


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return 1024 * int(found[1])


def peak(step: Step, calls: int = 3) -> int:
    """Highest resident bytes during some calls, above those just before the first; what is kept between them counts."""
    step.prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free pages that the allocator holds would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present size
    before = _resident("VmRSS")
    step()
    for _ in range(calls - 1):
        step.release()
        step.prepare()
        step()
    return _resident("VmHWM") - before


def peaks(case: Case, names: Sequence[str]) -> dict[str, int]:
    """Peak bytes of each contestant; empty for small cases, and where the system does not tell (it has to be Linux)."""
    if case.gradient_bytes < GRAIN or not Path("/proc/self/clear_refs").exists():
        return {}
    # Every large buffer gets a mapping of its own: in the heap, where glibc would come to put them, gaps count as well.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    folder = Path(__file__).parents[1]
    found = {}
    for name in names:
        command = [sys.executable, "-m", "bench.memory", case.id, name]
        found[name] = int(subprocess.check_output(command, cwd=folder, env=environment))
    return found


def main() -> None:
    case_id, name = sys.argv[1:]
    (case,) = (case for case in CASES if case.id == case_id)
    # What PyTorch and the extension load and set up on their first call is not this call's memory.
    small = replace(case, shape=tuple(min(size, 8) for size in case.shape))
    peak(build(name, small, small.data()))
    print(peak(build(name, case, case.data())))


if __name__ == "__main__":
    main()
