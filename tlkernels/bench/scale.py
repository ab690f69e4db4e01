"""How time and memory grow with each size of a loss: fitted powers, and the powers that they should not exceed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tlkernels.bench.clock import Clock
from tlkernels.bench.cost import COSTS
from tlkernels.bench.measure import interleave, prepared, quartiles
from tlkernels.bench.memory import SLACK, peaks
from tlkernels.bench.work import Case, Step, name_of

FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""The sizes of a series, as parts of the case's own."""
KEPT = (8, 16, 32, 64, 128)
"""The series of K, the classes that `topk_distillation` gets of each row."""
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
TIME: Mapping[str, Mapping[str, float]] = {
    "info_nce": {"N": 2},
    "nt_xent": {"N": 2},
    "sup_con": {"N": 2},
    "sigmoid_contrastive": {"N": 2},
    "topk_distillation": {"K": 0},
}
"""The most that the power of time should be, where it is not 1. Memory grows with no size faster than linearly."""
TOLERANCE = 0.15  # of a power


def fitted(points: Sequence[tuple[float, float]]) -> list[float]:
    """Return the power p in value = c * size**p, between the bounds of its 95 % interval.

    A straight line is fitted to the logarithms by least squares. The interval comes from the residuals, so a curve that
    is no power gets a wide one.
    """
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    count = len(points)
    middle_x, middle_y = sum(x) / count, sum(y) / count
    spread = sum((value - middle_x) ** 2 for value in x)
    power = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    residuals = sum((b - middle_y - power * (a - middle_x)) ** 2 for a, b in zip(x, y, strict=True))
    half = STUDENT[count - 3] * math.sqrt(residuals / (count - 2) / spread)
    return [round(value, 3) for value in (power - half, power, power + half)]


def expected(loss: str, dim: str, quantity: str) -> float:
    """Return the most that the power should be."""
    return TIME.get(loss, {}).get(dim, 1.0) if quantity == "time" else 1.0


def series(case: Case) -> Iterator[tuple[str, list[tuple[int, Case]]]]:
    """Yield each size's name, and the cases in which it alone grows to that of `case`."""
    for number, dim in enumerate(COSTS[case.loss].dims):
        sizes = sorted({max(8, int(case.shape[number] * factor)) for factor in FACTORS})
        shapes = [(size, (*case.shape[:number], size, *case.shape[number + 1 :])) for size in sizes]
        yield dim, [(size, replace(case, shape=shape)) for size, shape in shapes]
    if case.loss == "topk_distillation":
        yield "K", [(kept, replace(case, options={**case.options, "kept": kept})) for kept in KEPT]


def scales(
    case: Case, contestants: Sequence[str], memory: Callable[[Case, Sequence[str]], Mapping[str, int]] = peaks
) -> Iterator[dict[str, Any]]:
    """Yield what the result file says of how each contestant grows with each size."""
    for dim, cases in series(case):
        times = _times(cases, contestants, case)
        bytes_of: dict[str, list[tuple[int, float]]] = {name: [] for name in contestants}
        for size, one in cases:
            for name, most in memory(one, contestants).items():
                bytes_of[name].append((size, float(max(most, SLACK))))  # below it is noise
        for quantity, found in (("time", times), ("memory", bytes_of)):
            for name, points in found.items():
                points = [(size, value) for size, value in points if value > 0]
                if len(points) >= 3:
                    yield {
                        "loss": case.loss,
                        "dtype": name_of(case.dtype),
                        "device": case.device,
                        "contestant": name,
                        "quantity": quantity,
                        "dim": dim,
                        "points": points,
                        "exponent": fitted(points),
                        "expected": expected(case.loss, dim, quantity),
                    }


def _times(
    cases: Sequence[tuple[int, Case]], contestants: Sequence[str], case: Case
) -> dict[str, list[tuple[int, float]]]:
    """Return the median seconds at each size. The sizes and contestants take turns."""
    clock = Clock(torch.device(case.device), case.cold)
    steps: dict[str, Step] = {}
    for size, one in cases:
        found, _, _ = prepared(one.work(), contestants, clock)
        steps |= {f"{name} {size}": step for name, step in found.items()}
    samples = interleave(steps, clock, case.seconds)
    return {
        name: [(size, quartiles(samples[f"{name} {size}"])[1]) for size, _ in cases if f"{name} {size}" in samples]
        for name in contestants
    }


def too_fast(scale: Mapping[str, Any]) -> bool:
    """Return whether something grows faster than it should, by more than the interval and the tolerance."""
    low, power, _ = scale["exponent"]
    return bool(low > scale["expected"] and power > scale["expected"] + TOLERANCE)


def in_words(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each series."""
    lines = ["How time and memory grow (power of the size, 95 % interval):"]
    for scale in found:
        low, power, high = scale["exponent"]
        note = f"  faster than {scale['expected']:g}" if too_fast(scale) else ""
        lines.append(
            f"  {scale['loss']} {scale['dtype']} {scale['contestant']:<10} {scale['quantity']:<6} in {scale['dim']}: "
            f"{power:.2f} ({low:.2f} to {high:.2f}){note}"
        )
    return "\n".join(lines)
