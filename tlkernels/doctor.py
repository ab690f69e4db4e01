"""`tlkernels doctor`: what is installed, which implementation serves each loss, and its speed compared with eager.

With `--shape`: how much memory a loss of these sizes needs, instead.

Environment: TLKERNELS_ISA, which `tlkernels._core.native` reads, is shown if it is set.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import tlkernels as tlk
from tlkernels import estimate
from tlkernels._core import native
from tlkernels.bench import losses
from tlkernels.bench.clock import Clock
from tlkernels.bench.cost import COSTS
from tlkernels.bench.measure import errors, interleave, speedups
from tlkernels.bench.work import Case, Shape, Work, build, name_of
from tlkernels.estimate.layers import ARCHITECTURE
from tlkernels.machine import machine

SIZES: Mapping[tuple[str, ...], Shape] = {
    ("N", "V"): (1024, 8192),
    ("N", "H", "V"): (256, 128, 8192),
    ("N", "H", "T", "V"): (256, 128, 128, 8192),
    ("N", "D"): (1024, 128),
}
"""Sizes at which a call takes milliseconds on two cores, by their names."""
LEAST_ROUNDS = 5


def cases(device: str) -> Iterator[Case]:
    """Yield each loss, cross entropy also for a few numbers and in bfloat16."""
    few, half = ((32, 10), torch.float32), ((1024, 8192), torch.bfloat16)
    for shape, dtype in (few, half):
        yield Case("cross_entropy", shape, dtype, losses.cross_entropy, device=device)
    for loss, cost in COSTS.items():
        yield Case(loss, SIZES[cost.dims], torch.float32, getattr(losses, loss), device=device)


def doctor(seconds: float = 0.5) -> Iterator[str]:
    """Yield the lines of the report, as they are known. Each case is measured for about `seconds`."""
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
    yield from lines
    for device in ["cpu", *(["cuda"] if info["cuda"] else [])]:
        title = f"losses on {device}: forward and backward, with the gradients' relative error against float64"
        yield from ("", title)
        for case in cases(device):
            work = case.work()
            name = f"{case.loss} {'x'.join(map(str, case.shape))} {name_of(case.dtype)}"
            yield from ("", *(f"  {line}" for line in [name, *_explained(work), _measured(case, work, seconds)]))


def memory_report(loss: str, shape: Sequence[int], dtype: str, device: str) -> str:
    """Return how much memory each contestant needs above the inputs, and whether the device has it.

    Raises:
        ValueError: an argument is wrong; see `tlkernels.estimate.memory`.
    """
    found, given = estimate.memory(loss, shape, dtype, device), estimate.inputs(loss, shape, dtype)
    free, where = _free(device)
    sizes = ", ".join(f"{name}={size}" for name, size in zip(estimate.LOSSES[loss], shape, strict=True))
    lines = [
        f"memory of {loss} ({sizes}) in {dtype} on {device}: forward and backward, above the inputs of {_size(given)}",
        "",
        f"  {'':9}  {'peak':>9}  {'of eager':>8}  {'fits':4}  largest term",
    ]
    for name, its in found.items():
        share, (largest, size) = its.peak / found["eager"].peak, next(iter(its.parts.items()))
        fits = "" if free is None else "yes" if given + its.peak <= free else "no"
        lines.append(
            f"  {name:9}  {_size(its.peak):>9}  {share:>8.1%}  {fits:4}  {largest}, {size / its.peak:.0%} of the peak"
        )
    lines += [f"  {name}: not estimated: {why}" for name, why in estimate.without(loss, device).items()]
    lines += ["", f"  fits: inputs and peak fit into {where}" if free is not None else f"  fits: unknown; {where}"]
    for name, its in found.items():
        lines += ["", f"{name}: {_size(its.peak)}, {its.basis}{', not measured' * (device == 'cuda')}"]
        shown = {label: size for label, size in its.parts.items() if size >= its.peak / 200}
        lines += [f"  {_size(size):>9}  {label}" for label, size in shown.items()]
        if rest := its.peak - sum(shown.values()):
            lines.append(f"  {_size(rest):>9}  others")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _free(device: str) -> tuple[int | None, str]:
    """Return the bytes that a process could still get on the device, None if that is unknown, and what they are."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return None, f"there is no GPU; one of architecture {ARCHITECTURE} is assumed"
        free, total = torch.cuda.mem_get_info()
        return free, f"the {_size(free)} that are free of the GPU's {_size(total)}"
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        available = None
    if available is None:
        return None, "this system does not tell how much memory is available"
    return 1024 * int(available[1]), f"the {_size(1024 * int(available[1]))} that are available"


def _explained(work: Work) -> list[str]:
    inputs = [tensor.detach().requires_grad_() for tensor in work.inputs]
    return [f"  {line}" for line in tlk.explain(work.ours, *inputs).splitlines()]


def _measured(case: Case, work: Work, seconds: float) -> str:
    steps = {name: build(name, work) for name in ("auto", "eager")}
    samples = interleave(steps, Clock(torch.device(case.device), cold=False), seconds, LEAST_ROUNDS)
    found = errors(case, tuple(steps), draws=1)
    figures = [
        f"{name} {1e3 * statistics.median(samples[name]):.3f} ms, error {found[name]['gradient']:.1e}" for name in steps
    ]
    return f"  {'; '.join(figures)}: {speedups(samples, 'auto')['eager'][1]:.2f} times eager's speed"
