"""`tlkernels doctor`: what is installed, which implementation serves each loss, and its speed compared with eager.

Environment: TLKERNELS_ISA, which `tlkernels._core.native` reads, is shown if it is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tlkernels as tlk
from tlkernels._core import native
from tlkernels.machine import machine
from tlkernels.timing import interleaved


@dataclass(frozen=True)
class Case:
    """One loss at one size: our call, the PyTorch lines that it replaces, and their inputs.

    The gradient is that of the first input.
    """

    name: str
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def cases(device: str) -> Iterator[Case]:
    """Yield each loss, at sizes where a call takes milliseconds on two cores."""
    for rows, classes, dtype in ((32, 10, torch.float32), (8192, 1000, torch.float32), (8192, 1000, torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator).to(device, dtype)
        target = torch.randint(classes, (rows,), generator=generator).to(device)
        name = f"cross_entropy {rows}x{classes} {str(dtype).removeprefix('torch.')}"
        yield Case(name, tlk.cross_entropy, functional.cross_entropy, (logits, target))

    def normal(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    def plain(name: str, loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Case:
        """Return the case of a loss whose reference implementation is the eager contestant."""
        eager = partial(loss, impl="reference", **options)
        return Case(f"{loss.__name__} {name} float32", partial(loss, **options), eager, inputs)

    x, weight, y = normal(256, 128), normal(8192, 128) / 11, torch.arange(256, device=device)
    a, b = normal(1024, 128), normal(1024, 128, seed=1)
    yield plain("256x128x8192", tlk.linear_cross_entropy, x, weight, y)
    yield plain("1024x8192", tlk.distillation, normal(1024, 8192), normal(1024, 8192, seed=1), temperature=2.0)
    yield plain("256x128x8192", tlk.linear_distillation, x, weight, x.flip(0), weight.flip(0), temperature=2.0)
    yield plain("1024x128", tlk.info_nce, a, b, temperature=0.1, symmetric=True, normalize=True)
    yield plain("1024x128", tlk.nt_xent, a, b, temperature=0.1)
    yield plain("1024x128", tlk.sup_con, a, torch.arange(1024, device=device) % 128, temperature=0.1)
    yield plain("1024x128", tlk.sigmoid_contrastive, a / 11, b / 11, logit_scale=10.0, logit_bias=-10.0)
    yield plain("1024x1024", tlk.mse, normal(1024, 1024), normal(1024, 1024, seed=1))
    yield plain("1024x1024", tlk.rmse, normal(1024, 1024), normal(1024, 1024, seed=1))


def doctor(seconds: float = 1.0) -> str:
    """Return the report. Each case is measured for about `seconds`."""
    info = machine()
    forced = os.environ.get("TLKERNELS_ISA")
    how = f"forced by TLKERNELS_ISA={forced}" if forced else "TLKERNELS_ISA forces another"
    lines = ["versions", f"  python {info['python']}"]
    lines += [f"  {name} {version or 'not installed'}" for name, version in info["packages"].items()]
    lines += ["", "devices", f"  cpu: {info['processor']}, {info['threads']} threads"]
    lines += [f"  cuda: {info['cuda'] or 'none that torch can use'}", "", "extension"]
    if native.available():
        lines += [f"  instruction sets: {', '.join(info['isas'])}; in use: {info['isa']} ({how})"]
        lines += [f"  {key}: {value}" for key, value in info["extension"].items() if value]
    else:
        lines += [f"  not loaded: {native.why_not()}"]
    for device in ["cpu", *(["cuda"] if info["cuda"] else [])]:
        title = f"losses on {device}: forward and backward, with the gradient's largest error against float64"
        lines += ["", title, ""]
        for case in cases(device):
            lines += [f"  {line}" for line in [case.name, *_explained(case), _measured(case, seconds), ""]]
    return "\n".join(lines).rstrip()


def _explained(case: Case) -> list[str]:
    answer = tlk.explain(case.ours, *_leaves(case.inputs)).splitlines()
    return [f"  {line}" for line in answer]


def _measured(case: Case, seconds: float) -> str:
    ways = {"tlkernels": _step(case.ours, case.inputs), "eager": _step(case.eager, case.inputs)}
    times = interleaved(ways, seconds)
    exact = _step(case.eager, tuple(t.double() if t.is_floating_point() else t for t in case.inputs))()
    errors = {name: float((way().double() - exact).abs().max()) for name, way in ways.items()}
    figures = [f"{name} {times[name] * 1e3:.3f} ms, error {errors[name]:.1e}" for name in ways]
    return f"  {'; '.join(figures)}: {times['eager'] / times['tlkernels']:.2f} times eager's speed"


def _leaves(inputs: tuple[Tensor, ...]) -> list[Any]:
    return [inputs[0].detach().requires_grad_(), *inputs[1:]]


def _step(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward and returns the gradient of the first input."""
    leaves = _leaves(inputs)

    def run() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(*leaves), leaves[:1])
        return gradient

    return run
