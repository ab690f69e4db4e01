"""One unit of the battery, checked against the PyTorch lines in float64 on the same card; and the list of all units.

    python -m scripts.gpu.battery plan FILE     writes the extension's build info and the units as JSON
    python -m scripts.gpu.battery UNIT          runs a unit, given as JSON, and writes its lines to a file

Environment: with GPU_FAKE=1 both work on a CPU, for a dry run with a few cases of each loss, native and the reference;
GPU_FAKE_CRASH=<loss>-<impl>-<number of the job> names a job that then ends its process.
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
FAKE_LOSSES = 2  # losses for which a dry run does more than smoke
FAKE_CRASH = os.environ.get("GPU_FAKE_CRASH", "")
DEVICE = "cpu" if FAKE else "cuda"
CASES_IN_A_UNIT = {"native": 45, "triton": 22, "reference": 150}
"""So a unit takes 20 to 40 seconds; Triton compiles."""
MOST_SECONDS = 90.0
"""Limit for one case. The first one of Triton compiles about ten kernels while eleven other processes run."""


def targets(loss: str) -> list[harness.Target]:
    """Return the targets of the loss on the GPU, and the reference."""
    every = battery.targets(loss)
    reference = harness.Target("reference")
    if FAKE:
        native_cpu = [target for target in every if target.impl == "native" and target.isa != harness.CUDA_HOST]
        return [*native_cpu[:1], reference]
    return [*(target for target in every if harness.device(target) == "cuda"), reference]


def plan() -> list[Unit]:
    """Return all units in the order of their runs: if the time runs out, a part of every loss has run."""
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
    """Return a unit's jobs: their names, and functions that raise if a result is wrong."""
    cases = list(battery.LOSSES[unit.loss].cases)[: FAKE_CASES if FAKE else None]
    first_of_dtype = list({case.dtype: case for case in reversed(cases)}.values())
    target = harness.Target(unit.impl, unit.isa)
    if unit.kind == "smoke":
        return [*_values(unit, target, first_of_dtype), *_checks(unit, cases[:1])]
    every = [*_values(unit, target, cases), *_checks(unit, first_of_dtype)]
    if not FAKE:
        every += _strategies(unit, target)
        every += _large(unit)
    return every[unit.shard :: unit.shards]


def _values(unit: Unit, target: harness.Target, cases: list[harness.LossCase]) -> Iterator[Job]:
    for case in cases:
        yield case.id, partial(_check_values, unit, target, case)


def _check_values(unit: Unit, target: harness.Target, case: harness.LossCase) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        draw = partial(battery.draw, battery.LOSSES[unit.loss], case, target)
        harness.check_budgets(case.dtype, draw, most=12, first=2)
    finally:
        torch.use_deterministic_algorithms(False)


def _checks(unit: Unit, cases: list[harness.LossCase]) -> Iterator[Job]:
    checks = {"same bits": battery.CHECKS["same bits"]} if FAKE else battery.CHECKS
    if unit.impl == "reference":  # PyTorch may wait for the device
        return
    for case in cases:
        for name, check in checks.items():
            yield f"{name}: {case.id}", partial(check, battery.LOSSES[unit.loss], case, unit.impl)


def _strategies(unit: Unit, target: harness.Target) -> Iterator[Job]:
    """Cross entropy with each row strategy; without force most of them are used only for long rows."""
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
    """Run the check in one process at a time, since it takes 20 GB."""
    with Path(tempfile.gettempdir(), "tlkernels-large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        battery.LARGE[unit.loss](unit.loss, unit.impl)
        torch.cuda.empty_cache()


def run(unit: Unit, skip: int, lines: Path, seconds: float) -> None:
    """Run the jobs of a unit, beginning with number `skip`; write a line before and after each."""
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
    """Run a job, and return its status and error."""
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
