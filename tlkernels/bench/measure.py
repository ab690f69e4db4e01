"""How a case is measured: interleaved rounds, the error against float64, memory, and other work on the machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

import tlkernels as tlk
from tlkernels.bench import busy, cost
from tlkernels.bench.clock import AHEAD, Clock
from tlkernels.bench.memory import peaks
from tlkernels.bench.tables import verdicts
from tlkernels.bench.work import OURS, Case, LossStep, Step, Work, build, drawn, name_of

LEAST_ROUNDS, MOST_ROUNDS = 7, 101
LEAST_ROUNDS_LONG = 5  # of cases that take more than 10 seconds
SAMPLE_SECONDS = 2e-3  # a call of less than half of it is repeated, so that the clock's own cost does not count
LONGEST = 10.0  # seconds of a call; a slower contestant, but for ours, is not timed
ATTEMPTS = 4  # where other processes used the cores
PAUSE_SECONDS = 2.0  # between the attempts
ERROR_ROWS = 1024  # for the error: eager in float64 needs the memory of several N x V or N x N tensors


def interleave(
    steps: Mapping[str, Step], clock: Clock, seconds: float, least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Call every contestant once a round; return the seconds of a call, by name, in the order of the rounds.

    A round starts one place further on than the last, and after a full turn the order runs backwards: no contestant
    always comes after the same neighbour. With warm caches, short calls are repeated within a sample.
    """
    loops, ahead = {}, {}
    for name, step in steps.items():
        clock.sample(step)  # compiled again, if another contestant has reset the compiler
        once = clock.sample(step)
        short = clock.evicted is None and step.repeatable and once.seconds < SAMPLE_SECONDS / 2
        loops[name] = math.ceil(SAMPLE_SECONDS / once.seconds) if short else 1
        ahead[name] = AHEAD * once.host * loops[name]
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        start = perf_counter()
        for number in range(max(least, MOST_ROUNDS)):
            if number >= least and perf_counter() - start > seconds:
                break
            turn, first = divmod(number, len(names))
            order = names[first:] + names[:first]
            for name in order[::-1] if turn % 2 else order:
                samples[name].append(clock.sample(steps[name], loops[name], ahead[name]).seconds)
    finally:
        gc.enable()
    return samples


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, median and upper quartile, in as many digits as mean anything."""
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4, method="inclusive")]


def speedups(samples: Mapping[str, Sequence[float]], ours: str) -> dict[str, list[float]]:
    """Divide each contestant's time by ours within a round; return the quartiles over the rounds."""
    return {
        name: quartiles([theirs / our for theirs, our in zip(times, samples[ours], strict=True)])
        for name, times in samples.items()
        if name != ours
    }


def errors(case: Case, names: Sequence[str], draws: int) -> dict[str, dict[str, float]]:
    """Return the relative error, in the 2-norm, of loss and gradients against the eager lines in float64.

    It is the worst of all draws and all gradients.
    """
    case = replace(case, shape=(min(ERROR_ROWS, case.shape[0]), *case.shape[1:]))
    found = {name: {"value": 0.0, "gradient": 0.0} for name in names}
    for number in range(draws):
        with drawn(number):
            work, wide = case.work(), case.work(wide=True)
        exact = LossStep(wide.eager, wide).results()
        for name, worst in found.items():
            step = build(name, work)
            assert isinstance(step, LossStep)
            value, *grads = (
                # In place: three of the largest gradients in float64 are too much memory.
                float(got.sub_(right).norm() / right.norm())
                for got, right in zip(step.results(), exact, strict=True)
            )
            worst["value"], worst["gradient"] = max(worst["value"], value), max(worst["gradient"], *grads)
    return found


def checked_errors(case: Case, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the errors of one draw, or of ten where ours is over: a loss is one number, and eager may be lucky."""
    found = errors(case, names, draws=1)
    mine = [name for name in names if name in (*OURS, "eager")]
    return found | errors(case, mine, draws=10) if excess(case, found) else found


def excess(case: Case, error: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Return which of our implementations have an error over the bar, and how large it is."""
    eager = error.get("eager", {})  # eager lacks a dtype here and there
    found = {}
    for name in error.keys() & {*OURS}:
        over = [
            f"{part}: relative error {ours:.2e}, eager's {eager.get(part, 0.0):.2e}"
            for part, ours in error[name].items()
            if not ours <= error_bar(eager.get(part, 0.0), case.dtype)  # NaN too
        ]
        if over:
            found[name] = ", ".join(over)
    return found


def error_bar(eager: float, dtype: torch.dtype) -> float:
    """Return twice eager's error and one rounding of the result; in float64 eager is the oracle itself."""
    return 1e-12 if dtype is torch.float64 else 2 * eager + torch.finfo(dtype).eps / 2


def watched(
    steps: Mapping[str, Step], clock: Clock, seconds: float, least: int, attempts: int = ATTEMPTS
) -> tuple[dict[str, list[float]], busy.Watch]:
    """Interleave, and do it again where other processes used too much of the cores."""
    for attempt in range(attempts):
        time.sleep(PAUSE_SECONDS if attempt else 0.0)
        with busy.Watch() as watch:
            samples = interleave(steps, clock, seconds, least)
        if watch.share is None or watch.share <= busy.BUSY_CASE:
            break
    return samples, watch


def prepared(
    work: Work, names: Sequence[str], clock: Clock
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """Return the steps that run, the seconds until each had run once, and why the others do not take part."""
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name in names:
        start = perf_counter()
        try:
            step = build(name, work)
            clock.sample(step)
        # No compiler for torch.compile; a dtype that eager lacks; an impl that refuses. Other libraries raise anything.
        except Exception as error:
            absent[name] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        first[name] = float(f"{perf_counter() - start:.3g}")
        if name not in OURS and first[name] > LONGEST:
            # The first call may have compiled for seconds.
            seconds = first[name] if first[name] > 3 * LONGEST else clock.sample(step).seconds
            if seconds > LONGEST:
                absent[name] = f"a call takes {seconds:.0f} s, too long to repeat"
                continue
        steps[name] = step
    return steps, first, absent


def measure(
    case: Case, ours: str, others: Sequence[str] = (), *, quick: bool = False
) -> tuple[dict[str, Any], list[float]]:
    """Return what the result file says of a case, and the seconds of our calls. `quick`: one attempt, a second long.

    Raises:
        RuntimeError: ours does not run.
    """
    work = case.work()
    clock = Clock(torch.device(case.device), case.cold)
    steps, first, absent = prepared(work, list(dict.fromkeys((ours, *case.contestants, *work.peers, *others))), clock)
    if ours not in steps:
        raise RuntimeError(f"{case.id}, {ours}: {absent[ours]}")
    losses = [name for name, step in steps.items() if isinstance(step, LossStep)]
    error = checked_errors(case, losses)
    wrong = excess(case, error)
    info: dict[str, Any] = {
        "id": case.id,
        "group": case.group,
        "loss": case.loss,
        "shape": case.shape,
        "dims": cost.dims(case.loss, case.shape),
        "dtype": name_of(case.dtype),
        "device": case.device,
        "options": case.options,
        "cold": case.cold,
        "bars": case.bars,
        "ours": ours,
        "served": served(work, ours),
        "absent": absent | dict(work.absent),
        "wrong": wrong,
        "first": first,
        "memory": peaks(case, losses),
        "error": error,
        "flops": cost.flops(case.loss, case.shape, case.options),
        "bytes": cost.nbytes(case.loss, case.shape, case.options, case.dtype.itemsize),
    }
    seconds = min(case.seconds, 1.0) if quick else case.seconds
    least = LEAST_ROUNDS if case.seconds <= 10 else LEAST_ROUNDS_LONG
    # With hundreds of cases in the grid, a few miss a bar by chance: those are measured again, longer, and that counts.
    for effort in (1, 4) if case.group == "grid" else (1,):
        samples, watch = watched(steps, clock, effort * seconds, effort * least, 1 if quick else ATTEMPTS)
        info["rounds"] = len(samples[ours])
        info["seconds"] = {name: quartiles(times) for name, times in samples.items()}
        right = {name: times for name, times in samples.items() if name == ours or name not in wrong}
        info["speedup"] = {} if ours in wrong else speedups(right, ours)
        info["verdicts"] = verdicts(info)
        info["wall"] = round(watch.wall, 3)
        info["busy"] = None if watch.share is None else round(watch.share, 4)
        if info["verdicts"].get("eager") == "met":
            break
    return info, samples[ours]


def served(work: Work, ours: str) -> str:
    """Return which implementation serves our call."""
    return tlk.explain(work.ours, *work.inputs, impl=ours).partition("served by ")[2].partition("\n")[0]
