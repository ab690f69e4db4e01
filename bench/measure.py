"""How a case is measured: interleaved rounds, the error against float64, memory, and other work on the machine."""

import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from bench import busy
from bench.memory import peaks
from bench.report import verdicts
from bench.work import Case, LossStep, Step, build, drawn, name_of

LEAST_ROUNDS, MOST_ROUNDS = 7, 101
LEAST_ROUNDS_LONG = 5  # of cases that take more than 10 seconds
SAMPLE_SECONDS = 2e-3  # a call of less than half of it is repeated, so that the clock's own cost does not count
ATTEMPTS = 4  # where other processes used the cores
PAUSE_SECONDS = 2.0  # between the attempts
ERROR_ROWS = 1024  # for the error: eager in float64 needs the memory of several N x V or N x N tensors


def sample(step: Step, loops: int) -> float:
    """Return the seconds of one call, the mean of `loops`."""
    step.prepare()
    start = perf_counter()
    for _ in range(loops):
        step()
    seconds = perf_counter() - start
    step.release()
    return seconds / loops


def interleave(steps: Mapping[str, Step], seconds: float, least: int = LEAST_ROUNDS) -> dict[str, list[float]]:
    """Call every contestant once a round; return the seconds of a call, by name, in the order of the rounds.

    A round starts one place further on than the last, and after a full turn the order runs backwards: no contestant
    always comes after the same neighbour, whose data would still be in the cache.
    """
    loops = {}
    for name, step in steps.items():
        once = sample(step, 1)
        short = step.repeatable and once < SAMPLE_SECONDS / 2
        loops[name] = math.ceil(SAMPLE_SECONDS / once) if short else 1
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
                samples[name].append(sample(steps[name], loops[name]))
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
    return errors(case, names, draws=10) if excess(case, found) else found


def excess(case: Case, error: Mapping[str, Mapping[str, float]]) -> str:
    """Return which errors of ours are over the bar, or an empty string."""
    eager = error.get("eager", {})  # eager lacks a dtype here and there
    return ", ".join(
        f"{name}, {part}: relative error {ours:.2e}, eager's {eager.get(part, 0.0):.2e}"
        for name in error.keys() - {"eager"}
        for part, ours in error[name].items()
        if ours > error_bar(eager.get(part, 0.0), case.dtype)
    )


def error_bar(eager: float, dtype: torch.dtype) -> float:
    """Return twice eager's error and one rounding of the result; in float64 eager is the oracle itself."""
    return 1e-12 if dtype is torch.float64 else 2 * eager + torch.finfo(dtype).eps / 2


def watched(
    steps: Mapping[str, Step], seconds: float, least: int, attempts: int = ATTEMPTS
) -> tuple[dict[str, list[float]], busy.Watch]:
    """Interleave, and do it again where other processes used too much of the cores."""
    for attempt in range(attempts):
        time.sleep(PAUSE_SECONDS if attempt else 0.0)
        with busy.Watch() as watch:
            samples = interleave(steps, seconds, least)
        if watch.share is None or watch.share <= busy.BUSY_CASE:
            break
    return samples, watch


def measure(
    case: Case, ours: str, others: Sequence[str] = (), *, quick: bool = False
) -> tuple[dict[str, Any], list[float]]:
    """Return what the result file says of a case, and the seconds of our calls. `quick`: one attempt, a second long."""
    work = case.work()
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys((ours, *case.contestants, *work.peers, *others)):
        try:
            steps[name] = build(name, work)
            sample(steps[name], 1)
        except RuntimeError as error:  # no compiler for torch.compile; a dtype that eager lacks; an impl that refuses
            if name == ours:
                raise
            steps.pop(name, None)
            absent[name] = str(error).strip().partition("\n")[0]
    checked = [name for name in (ours, "eager") if name in steps]
    info: dict[str, Any] = {
        "id": case.id,
        "group": case.group,
        "loss": case.loss,
        "shape": case.shape,
        "dtype": name_of(case.dtype),
        "options": case.options,
        "bars": case.bars,
        "ours": ours,
        "absent": absent,
        "memory": peaks(case, checked),
        "error": checked_errors(case, checked),
    }
    seconds = min(case.seconds, 1.0) if quick else case.seconds
    least = LEAST_ROUNDS if case.seconds <= 10 else LEAST_ROUNDS_LONG
    # With hundreds of cases in the grid, a few miss a bar by chance: those are measured again, longer, and that counts.
    for effort in (1, 4) if case.group == "grid" else (1,):
        samples, watch = watched(steps, effort * seconds, effort * least, 1 if quick else ATTEMPTS)
        info["rounds"] = len(samples[ours])
        info["seconds"] = {name: quartiles(times) for name, times in samples.items()}
        info["speedup"] = speedups(samples, ours)
        info["verdicts"] = verdicts(info)
        info["wall"] = round(watch.wall, 3)
        info["busy"] = None if watch.share is None else round(watch.share, 4)
        if info["verdicts"].get("eager") == "met":
            break
    return info, samples[ours]
