"""Peak memory above the inputs; on a CPU in a new process each, since memory left by earlier cases would hide some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from tlkernels.bench.cost import COSTS
from tlkernels.bench.work import Case, Step, build, name_of
from tlkernels.train.memory import RESET, reset_resident, resident

SLACK = 4 << 20  # thread stacks and huge-page rounding move the resident size too
GRAIN = 32 << 20  # where eager's peak is lower, SLACK is too much of it
ELEMENTS = 2 << 20  # smaller cases are not tried: a process takes seconds, and the grid has hundreds of cases


def peak(step: Step, calls: int = 2) -> int:
    """Return the highest resident bytes during the calls, less those before the first.

    A buffer that stays allocated between the calls counts.
    """
    step.prepare()
    reset_resident()
    before = resident("VmRSS")
    _run(step, calls)
    return resident("VmHWM") - before


def peak_on_gpu(step: Step, calls: int = 2) -> int:
    """Return the most bytes that PyTorch had allocated on the GPU during the calls, less those before the first."""
    step.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(step, calls)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    step.release()
    return most - before


def _run(step: Step, calls: int) -> None:
    step()
    for _ in range(calls - 1):
        step.release()
        step.prepare()
        step()


def peaks(case: Case, names: Sequence[str]) -> dict[str, int]:
    """Return the peak bytes of each contestant; nothing for small cases and where the system is not Linux.

    A contestant whose process fails, for example for want of memory, is left out.
    """
    if case.device == "cuda":
        work = case.work()
        return {name: peak_on_gpu(build(name, work)) for name in names}
    if _elements(case) < ELEMENTS or not RESET.exists():
        return {}
    # Every large buffer gets a mapping of its own: in the heap, where glibc would come to put them, gaps count as well.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    measured = {name: _in_a_process(case, name, environment) for name in names}
    found = {name: most for name, most in measured.items() if most is not None}
    return found if max(found.values(), default=0) >= GRAIN else {}


def _elements(case: Case) -> int:
    """Return the numbers in the largest tensor that a contestant might make."""
    pairs = case.loss in COSTS and COSTS[case.loss].dims == ("N", "D") and COSTS[case.loss].products(case.shape) > 0
    return max(case.shape[0] ** 2 if pairs else 0, prod(case.shape))


def _in_a_process(case: Case, name: str, environment: dict[str, str]) -> int | None:
    described = json.dumps([case.loss, case.make.__name__, case.shape, name_of(case.dtype), dict(case.options)])
    command = [sys.executable, "-m", "tlkernels.bench.memory", described, name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(run.stdout.split()[-1]) if run.returncode == 0 else None


def main() -> None:
    """Print the peak of one contestant of a case."""
    from tlkernels.bench import losses
    from tlkernels.bench.peers import PEERS, with_peer
    from tlkernels.bench.peers.proof import small

    (loss, make, shape, dtype, options), name = json.loads(sys.argv[1]), sys.argv[2]
    case = Case(loss, tuple(shape), getattr(torch, dtype), getattr(losses, make), options=options)
    peer = next((peer for peer in PEERS if peer.name == name), None)

    def step(case: Case) -> Step:
        work = case.work()
        return build(name, work if peer is None else with_peer(name, case, work))

    # What PyTorch and the extension load and set up on their first call is not this call's memory, nor is a compiler's.
    peak(step(replace(case, shape=small(case.shape))))
    one = step(case)
    if peer is not None and peer.compiles:
        peak(one, calls=1)
        one.release()
    print(peak(one))


if __name__ == "__main__":
    main()
