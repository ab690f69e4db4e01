"""What is measured on a GPU: sizes, floors, peers where they are installed, and the bars to clear.

Floors are what the card itself gives in the same run: a copy that moves the bytes of a loss on logits, the bare
products of a linear loss, and for InfoNCE products of 8192 x 8192 x 8192 with the operations of four of N x N x D.

Where the extension has CUDA kernels, `native` and `triton` run beside each other as contestants of the same run; their
times are where the rows of tlkernels/_core/choice.py come from.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import tlkernels as tlk
from bench import losses
from bench.losses import BF16, F32, Case, Cast, Loss, Make, Shape, Work
from tlkernels._core import native

FAR = 8192  # rows, columns and depth of a product that runs at the card's rate


def _installed(name: str, module: str, function: str, use: Callable[[Any], Loss]) -> dict[str, Loss]:
    """Return a peer by name, or nothing where its package is missing."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return {}
    return {name: use(getattr(importlib.import_module(module), function))}


def _both(make: Make) -> Make:
    """With the two implementations on a GPU beside what "auto" takes."""

    def made(shape: Shape, cast: Cast) -> Work:
        work = make(shape, cast)
        names = ("native", "triton") if native.build_info().get("cuda") else ()
        return work._replace(peers={**work.peers, **{name: partial(work.ours, impl=name) for name in names}})

    return made


def cross_entropy(shape: Shape, cast: Cast) -> Work:
    rows, classes = shape
    x, y = cast(losses.normal(rows, classes, scale=2)), losses.classes_of(rows, classes)
    out = torch.empty_like(x)
    peers = _installed(
        "liger",
        "liger_kernel.transformers.functional",
        "liger_cross_entropy",
        lambda function: lambda x: function(x, y),
    )
    peers |= _installed("quack", "quack.cross_entropy", "cross_entropy", lambda function: lambda x: function(x, y))

    def ours(x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        return tlk.cross_entropy(x, y, impl=impl)

    return Work((x,), ours, lambda x: F.cross_entropy(x, y), lambda: out.copy_(x), peers, overwriting=("liger",))


def linear_cross_entropy(shape: Shape, cast: Cast) -> Work:
    work = losses.linear_cross_entropy(shape, cast)
    y = losses.classes_of(shape[0], shape[2])
    peers = _installed(
        "liger",
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        lambda function: lambda x, w: function(x, w, y),
    )
    peers |= _installed(
        "cce", "cut_cross_entropy", "linear_cross_entropy", lambda function: lambda x, w: function(x, w, y)
    )
    return work._replace(peers=peers)


def info_nce(shape: Shape, cast: Cast) -> Work:
    work = losses.info_nce(shape, cast)
    rows, features = shape
    a, b, out = (cast(losses.normal(FAR, FAR, seed=seed)) for seed in range(3))
    times = max(1, round(4 * rows * rows * features / FAR**3))

    def floor() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    def both_directions(function: Any) -> Loss:
        return lambda q, k: (function(q, k, scale=14.3).mean() + function(k, q, scale=14.3).mean()) / 2

    peers = _installed("inf_cl", "inf_cl", "cal_flash_loss", both_directions)
    return work._replace(floor=floor, peers=peers)


def _cases() -> Iterator[Case]:
    both = ("eager", "compile", "floor")
    for shape in ((32768, 4096), (32768, 32768), (16384, 131072), (8192, 262144)):
        bars = {"floor": 0.9, "compile": 1.4, "liger": 1.0, "quack": 1.0}
        yield Case("cross_entropy", shape, BF16, _both(cross_entropy), bars, both, 4.0)
    for shape in ((16384, 32000), (8192, 128256)):
        bars = {"floor": 0.88, "compile": 3.0}
        yield Case("distillation", shape, BF16, _both(losses.distillation("forward_kl")), bars, both, 4.0)
    # 17.3 ms where the products at 790 TFLOP/s take 16.3
    bars = {"floor": 16.3 / 17.3, "liger": 1.0, "cce": 1.0}
    yield Case("linear_cross_entropy", (4096, 4096, 128256), BF16, linear_cross_entropy, bars, ("eager", "floor"), 6.0)
    yield Case(
        "linear_distillation", (4096, 4096, 4096, 128256), BF16, losses.linear_distillation, {"floor": 1 / 1.1},
        ("eager", "floor"), 6.0,
    )  # fmt: skip
    for features in (1024, 512):
        bars = {"floor": 0.55, "inf_cl": 4.0}
        yield Case("info_nce", (65536, features), BF16, _both(info_nce), bars, ("floor",), 8.0)
    bars = {"eager": 1.0}
    few = ("eager", "compile")
    yield Case("cross_entropy", (256, 1000), BF16, _both(cross_entropy), bars, few, 2.0, quick=True)
    # Narrow rows, rows of odd length, and one past what a block's shared memory holds.
    for shape in ((65536, 45), (8192, 50257)):
        yield Case("cross_entropy", shape, BF16, _both(cross_entropy), {}, both, 2.0)
        yield Case("distillation", shape, BF16, _both(losses.distillation("forward_kl")), {}, both, 2.0)
    yield Case("distillation", (4096, 128256), F32, _both(losses.distillation("js")), {}, both, 2.0)


CASES: tuple[Case, ...] = tuple(_cases())
