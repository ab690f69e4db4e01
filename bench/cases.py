"""Every case that is timed, with its bars."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch

from tlkernels.bench import memory
from tlkernels.bench.losses import (
    cross_entropy,
    cross_entropy_of_a_rank,
    distillation,
    info_nce,
    linear_cross_entropy,
    linear_distillation,
    linear_selective_log_softmax,
    masked_linear_cross_entropy,
    mse,
    nt_xent,
    rmse,
    selective_log_softmax,
    sigmoid_contrastive,
    sup_con,
    topk_distillation,
)
from tlkernels.bench.work import Case, Make, Shape

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Least speed-ups over eager, torch.compile and the floor.
ROWS: tuple[tuple[Shape, dict[str, float]], ...] = (
    ((8192, 1000), {"eager": 4.0, "compile": 4.0, "floor": 1 / 1.4}),
    ((2048, 32000), {"eager": 9.0, "compile": 5.0, "floor": 1 / 2.0}),
    ((512, 256000), {"eager": 16.0, "compile": 5.0, "floor": 1 / 1.7}),
    ((65536, 45), {"eager": 3.5, "compile": 1.3}),
    ((8, 21, 512, 512), {"eager": 4.0, "compile": 2.0}),
    ((32, 10), {"eager": 1 / 1.6}),
)
LINEAR: tuple[tuple[Shape, float], ...] = (((2048, 384, 30522), 2.3), ((1024, 1024, 128256), 4.2))
DISTILLATION: tuple[tuple[Shape, float, float], ...] = (
    ((8192, 1000), 12, 4),
    ((2048, 32000), 20, 3.5),
    ((512, 128256), 20, 3.5),
)
SMALL: tuple[tuple[str, Shape, Make], ...] = (
    ("distillation", (32, 10), distillation),
    ("info_nce", (64, 128), info_nce),
    ("mse", (32, 10), mse),
)
BOTH = ("eager", "compile", "floor")


def _memory(shape: Shape, dtype: torch.dtype, inplace: bool = False) -> dict[str, float]:
    """The bar of a loss on logits: one gradient, none in place, and for each row its loss and its log-sum."""
    gradient = 0 if inplace else prod(shape) * dtype.itemsize
    return {"memory": gradient + 16 * prod(shape) // shape[1] + memory.SLACK}


def _cross_entropy() -> Iterator[Case]:
    for dtype, (shape, bars) in itertools.product((F32, BF16), ROWS):
        # In bf16 the bar is eager in bf16; the other contestants are timed for information.
        least = (bars if dtype is F32 else {"eager": bars["eager"]}) | _memory(shape, dtype)
        quick = dtype is F32 and prod(shape) < 16 << 20
        cold = prod(shape) >= 4096  # of a smaller call the overhead is measured
        yield Case("cross_entropy", shape, dtype, cross_entropy, least, BOTH, quick=quick, cold=cold)
    options = {"inplace_grad": True}
    for (shape, bars), dtype in itertools.product(ROWS[:3], (F32, BF16)):
        least = {"eager": bars["eager"]} | _memory(shape, dtype, inplace=True)
        quick = shape == (8192, 1000)
        yield Case("cross_entropy", shape, dtype, cross_entropy, least, options=options, quick=quick)


def _others() -> Iterator[Case]:
    for (shape, chunked), dtype in itertools.product(LINEAR, (F32, BF16)):
        bars = {"eager": 1.0, "floor": 1 / 1.3}
        if dtype is F32:
            bars = {"eager": 1.12, "torch chunked": chunked, "floor": 1 / 1.15}
        yield Case("linear_cross_entropy", shape, dtype, linear_cross_entropy, bars, seconds=20.0)
    bars = {"eager": 7.0, "counted": 1 / 1.1}
    shape, masked = (8192, 384, 30522), {"counted": 0.15}
    yield Case("linear_cross_entropy", shape, F32, masked_linear_cross_entropy, bars, options=masked, seconds=20.0)
    for shape, eager, compiled in DISTILLATION:
        bars = {"eager": eager, "compile": compiled, "floor": 0.5}
        yield Case("distillation", shape, F32, distillation, bars, BOTH)
        yield Case("distillation", shape, BF16, distillation, {}, BOTH)
    for divergence in ("reverse_kl", "js", "tv"):
        yield Case("distillation", (2048, 32000), F32, distillation, {}, BOTH, {"divergence": divergence})
    bars = {"floor": 1 / 1.15}
    yield Case("linear_distillation", (1024, 384, 384, 30522), F32, linear_distillation, bars, seconds=15.0)
    bars = {"eager": 6.0, "floor": 0.5}
    yield Case("selective_log_softmax", (4096, 32000), F32, selective_log_softmax, bars, BOTH)
    bars = {"floor": 0.75 / 1.1}  # four products, and a tenth
    yield Case(
        "linear_selective_log_softmax", (2048, 576, 49152), F32, linear_selective_log_softmax, bars, seconds=20.0
    )
    bars = {"selective": 1 / 1.15, "dense": 15.0}
    yield Case("topk_distillation", (2048, 32000), F32, topk_distillation, bars)
    for rows, least in ((8192, 1.6), (16384, 2.0)):
        yield Case("info_nce", (rows, 384), F32, info_nce, {"eager": least, "floor": 1 / 1.2}, seconds=20.0)
    for make in (nt_xent, sup_con, sigmoid_contrastive):
        yield Case(make.__name__, (8192, 384), F32, make, seconds=20.0)
    yield Case("mse", (4096, 4096), F32, mse, {}, BOTH)
    yield Case("rmse", (4096, 4096), F32, rmse, {}, BOTH)
    for name, shape, small in SMALL:
        yield Case(name, shape, F32, small, {"eager": 1 / 1.6}, ("eager",), quick=True, cold=False)


def _grid() -> Iterator[Case]:
    """Cross entropy in small: `auto` is nowhere slower than eager by more than 5 %."""
    shapes = ((32, 10), (8192, 2), (2048, 45), (1024, 1000), (256, 4099), (32, 50257))
    axes = itertools.product(shapes, (F32, BF16, F16, F64), ("mean", "sum", "none"), (0.0, 0.1), (False, True))
    for number, (shape, dtype, reduction, smoothing, probabilities) in enumerate(axes):
        yield Case(
            "cross_entropy",
            shape,
            dtype,
            cross_entropy,
            bars={"eager": 1 / 1.05},
            contestants=("eager",),
            options={"reduction": reduction, "label_smoothing": smoothing, "probabilities": probabilities},
            group="grid",
            seconds=0.3,
            quick=number % 13 == 0,
            cold=False,
        )


def _of_a_rank() -> Iterator[Case]:
    """A rank with half of the classes takes 0.6 of the time of the whole, which is twice that of the half alone."""
    bars, group = {"alone": 1 / 1.2}, {"vocab_group": True}
    yield Case("cross_entropy", (8192, 16000), F32, cross_entropy_of_a_rank, bars, options=group)


SCALES: tuple[Case, ...] = (
    Case("cross_entropy", (8192, 32000), F32, cross_entropy),
    Case("linear_cross_entropy", (2048, 768, 32000), F32, linear_cross_entropy),
    Case("distillation", (4096, 32000), F32, distillation),
    Case("topk_distillation", (4096, 32000), F32, topk_distillation),
    Case("info_nce", (8192, 384), F32, info_nce),
    Case("sup_con", (8192, 384), F32, sup_con),
)
"""The largest sizes of the series that show how a loss grows."""

# The rank's case comes last: after a process's first exchange by Gloo eager's small calls take 270 us instead of 30, in
# all likelihood because OpenMP counts the threads of Gloo's thread too, more than there are cores, and stops spinning.
_LARGE = (replace(case, peers=case.cold) for case in (*_cross_entropy(), *_others()))
CASES: tuple[Case, ...] = (*_LARGE, *_grid(), *_of_a_rank())
