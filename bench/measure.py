"""How it is measured: interleaved rounds, and the error against float64."""

import gc
import math
import statistics
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch
import torch.nn.functional as F

from bench.cases import Case, Data
from bench.contestants import LossStep, Step

LEAST_ROUNDS, MOST_ROUNDS = 7, 101
SAMPLE_SECONDS = 2e-3  # a call of less than half of it is repeated, so that the clock's own cost does not count


def sample(step: Step, loops: int) -> float:
    """Seconds of one call, the mean of `loops`."""
    step.prepare()
    start = perf_counter()
    for _ in range(loops):
        step()
    seconds = perf_counter() - start
    step.release()
    return seconds / loops


def interleave(steps: Mapping[str, Step], seconds: float, least: int = LEAST_ROUNDS) -> dict[str, list[float]]:
    """Every contestant once a round; the seconds of a call, by name, in the order of the rounds.

    A round starts one place further on than the last, and after a full turn the order runs backwards: nobody always
    comes after the same neighbour, whose data would still be in the cache.
    """
    loops = {}
    for name, step in steps.items():
        sample(step, 1)
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
    """Lower quartile, median, upper quartile, in as many digits as mean anything."""
    return [float(f"{value:.4g}") for value in statistics.quantiles(values, n=4, method="inclusive")]


def speedups(samples: Mapping[str, Sequence[float]], ours: str) -> dict[str, list[float]]:
    """Each contestant's time divided by ours within a round: the quartiles over the rounds."""
    return {
        name: quartiles([theirs / our for theirs, our in zip(times, samples[ours], strict=True)])
        for name, times in samples.items()
        if name != ours
    }


def errors(case: Case, data: Data, steps: Mapping[str, LossStep]) -> dict[str, dict[str, float]]:
    """Relative error of loss and gradient, in the 2-norm, against PyTorch in float64."""
    logits = data.logits.detach().double().requires_grad_()
    target = data.target.double() if case.probabilities else data.target
    loss = F.cross_entropy(logits, target, **case.options)
    (gradient,) = torch.autograd.grad(loss, logits, data.upstream.double())
    exact = {"value": loss.detach(), "gradient": gradient}
    scale = {part: float(tensor.norm()) for part, tensor in exact.items()}
    found = {}
    for name, step in steps.items():
        step.prepare()
        step()
        # In place, on a copy that .double() has made: three of the largest gradients in float64 are too much memory.
        got = {part: getattr(step, part).detach().to(torch.float64, copy=True) for part in exact}
        step.release()
        found[name] = {part: float(got[part].sub_(exact[part]).norm()) / scale[part] for part in exact}
    return found


def error_bar(eager: float, dtype: torch.dtype) -> float:
    """Twice eager's error and one rounding of the result; in float64 eager is the oracle itself, roundings and all."""
    return 1e-12 if dtype is torch.float64 else 2 * eager + torch.finfo(dtype).eps / 2
