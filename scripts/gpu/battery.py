"""One unit of the battery, against the eager lines in float64 on the same card; and the list of all units.

    python -m scripts.gpu.battery plan FILE     what the extension was built with, and the units, as JSON
    python -m scripts.gpu.battery UNIT          runs one; its lines go to the file that UNIT names

With GPU_FAKE=1 both work on a CPU, to try the script: the native kernels and the reference, a few cases of each loss.
"""

import faulthandler
import fcntl
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import battery
import harness
import torch
from cross_entropy_cases import STRATEGY_CASES

from scripts.gpu.units import BEGUN, DIED, FAILED, PASSED, REFUSED, Unit
from tlkernels._core import native

Job = tuple[str, Callable[[], None]]

FAKE = os.environ.get("GPU_FAKE") == "1"
FAKE_CASES = 4
FAKE_LOSSES = 2  # are more than smoke
FAKE_CRASH = os.environ.get("GPU_FAKE_CRASH", "")
"""Of a dry run: <loss>-<impl>-<number of the job>, which ends its process."""
DEVICE = "cpu" if FAKE else "cuda"
CASES_IN_A_UNIT = {"native": 45, "triton": 22, "reference": 150}
"""Each a unit of 20 to 40 seconds; Triton compiles."""
MOST_SECONDS = 90.0
"""Of one case; with the first of Triton's it compiles some ten kernels beside eleven other processes."""


def targets(loss: str) -> list[harness.Target]:
    """Return what runs the loss on the GPU; PyTorch's own lines among them, as the reference."""
    found = battery.targets(loss)
    reference = harness.Target("reference")
    if FAKE:
        native_cpu = [target for target in found if target.impl == "native" and target.isa != harness.CUDA_HOST]
        return [*native_cpu[:1], reference]
    return [*(target for target in found if harness.device(target) == "cuda"), reference]


def plan() -> list[Unit]:
    """Return all units, in the order in which they are to run: every loss has run in part when the time ends."""
    units = []
    for number, (loss, entry) in enumerate(battery.LOSSES.items()):
        for target in targets(loss):
            shards = 1 if FAKE else -(-len(entry.cases) // CASES_IN_A_UNIT[target.impl])
            units.append(Unit("smoke", loss, target.impl, target.isa))
            if FAKE and number >= FAKE_LOSSES:
                continue
            units += [Unit("battery", loss, target.impl, target.isa, shard, shards) for shard in range(shards)]
    return sorted(units, key=_place)


def _place(unit: Unit) -> tuple[Any, ...]:
    return unit.kind != "smoke", unit.impl == "reference", unit.shard, list(CASES_IN_A_UNIT).index(unit.impl)


def jobs(unit: Unit) -> list[Job]:
    """Return the names of a unit's jobs, and the functions that raise where something is wrong."""
    cases = list(battery.LOSSES[unit.loss].cases)[: FAKE_CASES if FAKE else None]
    first_of_dtype = list({case.dtype: case for case in reversed(cases)}.values())
    target = harness.Target(unit.impl, unit.isa)
    if unit.kind == "smoke":
        return [*_values(unit, target, first_of_dtype), *_checks(unit, cases[:1])]
    found = [*_values(unit, target, cases), *_checks(unit, first_of_dtype)]
    if not FAKE:
        found += _strategies(unit, target)
        found += _large(unit)
    return found[unit.shard :: unit.shards]


def _values(unit: Unit, target: harness.Target, cases: list[harness.LossCase]) -> Iterator[Job]:
    for case in cases:
        yield case.id, partial(_check_values, unit, target, case)


def _check_values(unit: Unit, target: harness.Target, case: harness.LossCase) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is allocated and not written is NaN
    try:
        draw = partial(battery.draw, battery.LOSSES[unit.loss], case, target)
        harness.check_budgets(case.dtype, draw, most=12, first=2)
    finally:
        torch.use_deterministic_algorithms(False)


def _checks(unit: Unit, cases: list[harness.LossCase]) -> Iterator[Job]:
    checks = {"same bits": battery.CHECKS["same bits"]} if FAKE else battery.CHECKS
    if unit.impl == "reference":  # it is not ours to say what PyTorch waits for
        return
    for case in cases:
        for name, check in checks.items():
            yield f"{name}: {case.id}", partial(check, battery.LOSSES[unit.loss], case, unit.impl)


def _strategies(unit: Unit, target: harness.Target) -> Iterator[Job]:
    """Every way in which cross entropy's own kernels keep a row; the table takes most of them for large rows alone."""
    if (unit.loss, unit.impl) == ("cross_entropy", "native"):
        for strategy, case in STRATEGY_CASES:
            yield f"{strategy}: {case.id}", partial(_check_strategy, strategy, unit, target, case)


def _check_strategy(strategy: str, unit: Unit, target: harness.Target, case: harness.LossCase) -> None:
    with harness.cross_entropy_strategy(strategy):
        _check_values(unit, target, case)


def _large(unit: Unit) -> Iterator[Job]:
    if unit.loss in battery.LARGE and unit.impl != "reference":
        yield "2**31", partial(_check_large, unit)


def _check_large(unit: Unit) -> None:
    """One process at a time: each takes 20 GB."""
    with Path(tempfile.gettempdir(), "tlkernels-large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        battery.LARGE[unit.loss](unit.loss, unit.impl)
        torch.cuda.empty_cache()


def run(unit: Unit, skip: int, lines: Path, seconds: float) -> None:
    """Run the jobs of a unit from number `skip` on; a line is written before each and after it."""
    start = time.monotonic()
    with lines.open("a", buffering=1) as file:
        for number, (name, job) in enumerate(jobs(unit)):
            if number < skip:
                continue
            if time.monotonic() - start > seconds:
                return
            line = {**asdict(unit), "job": number, "case": name}
            file.write(json.dumps({**line, "status": BEGUN}) + "\n")
            if f"{unit.loss}-{unit.impl}-{number}" == FAKE_CRASH:
                os.abort()
            begun = time.monotonic()
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
            status, error = attempt(job)
            faulthandler.cancel_dump_traceback_later()
            line |= {"status": status, "error": error, "seconds": round(time.monotonic() - begun, 3)}
            file.write(json.dumps(line) + "\n")
            if status == DIED:
                os._exit(harness.CONTEXT_LOST)


def attempt(job: Callable[[], None]) -> tuple[str, str]:
    """Run a job, and return its status and what went wrong."""
    torch.manual_seed(0)
    try:
        with torch.device(DEVICE):
            job()
        if not FAKE:
            torch.cuda.synchronize()
    except NotImplementedError as error:
        return REFUSED, str(error)
    except Exception as error:
        text = "".join(traceback.format_exception(error))[-2500:]
        return DIED if harness.context_lost(text) else FAILED, text
    return PASSED, ""


def main(order: str, file: str = "") -> None:
    """Write the plan to a file, or run a unit."""
    if order == "plan":
        units = [asdict(unit) for unit in plan()]
        Path(file).write_text(json.dumps({"build": native.build_info(), "units": units}))
        return
    warnings.filterwarnings("ignore")
    fields = json.loads(order)
    skip, lines, seconds = (fields.pop(name) for name in ("skip", "lines", "seconds"))
    run(Unit(**fields), skip, Path(lines), seconds)


if __name__ == "__main__":
    faulthandler.enable()
    main(*sys.argv[1:])
