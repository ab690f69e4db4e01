"""How much memory a loss needs for one forward and backward, without running it; `tlkernels doctor --shape` prints it.

Eager, the reference and the Python part of ours are traced: the code runs on fake tensors, which have shapes and no
memory. What our ops allocate while they run follows from the rules of their C++ and Triton code (`inside.py`), and what
torch.compile keeps from a rule for each loss (`compiled.py`). On a CPU each figure is within 10 % of the measured one
(tests/test_estimate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from tlkernels._core import native
from tlkernels.bench import losses
from tlkernels.bench.cases import DTYPES
from tlkernels.bench.cost import COSTS
from tlkernels.bench.work import Case, Shape
from tlkernels.estimate import compiled, inside
from tlkernels.estimate.live import Inside, Parts, input_bytes, traced

LOSSES = {loss: cost.dims for loss, cost in COSTS.items()}
"""The losses with the names of their sizes; N: rows, H: features, T: the teacher's, V: classes, D: of an embedding."""
DEVICES = ("cpu", "cuda")
_WITHOUT_CUDA = ("sigmoid_contrastive", "mse", "rmse")
CONTESTANTS = ("eager", "compile", "native", "triton", "reference")
BASIS = {"eager": "traced", "reference": "traced", "compile": "by rule", "native": "by formula", "triton": "by formula"}


class Estimate(NamedTuple):
    """What one contestant needs above the inputs."""

    parts: Parts
    """Bytes at the peak by what they are, the largest first. "gradients of the inputs" are the results."""
    basis: str
    """How the figures were found: "traced", "by rule" or "by formula"."""

    @property
    def peak(self) -> int:
        """Return the bytes at the peak."""
        return sum(self.parts.values())


def memory(loss: str, shape: Sequence[int], dtype: torch.dtype | str, device: str = "cpu") -> dict[str, Estimate]:
    """Estimate the peak of memory that each contestant needs above the inputs, for one forward and backward.

    The inputs, such as features and weight, or logits and the teacher's logits, are not counted; their gradients are.
    Nothing is computed, and sizes may exceed the memory of this machine. It resets torch.compile: functions that this
    process has compiled are compiled again when they are called.

    Args:
        loss: one of `LOSSES`. Its options are those of the benchmarks: for example 64 classes in topk_distillation.
        shape: the sizes that `LOSSES` names for it. For nt_xent N counts the rows of both views.
        dtype: float32, bfloat16, float16 or float64, or a name of it such as "bf16".
        device: "cpu" or "cuda". The GPU is the current one; without a GPU one of architecture sm_90 is assumed. What
            cuBLAS keeps as a workspace, 8 to 32 MiB, is not counted.

    Returns:
        Estimates in bytes by contestant: "eager", the lines of PyTorch that the loss replaces; "compile", torch.compile
        of them; and the implementations "native", "triton" and "reference", without those that `without` names.

    Raises:
        ValueError: an argument is none of these; the message says what was expected.
    """
    case, on_gpu, absent = _case(loss, shape, dtype, device), device == "cuda", without(loss, device)
    contestants: dict[str, tuple[str, Inside]] = {"eager": ("eager", _nothing), "reference": ("reference", _nothing)}
    if "native" not in absent:
        contestants["native"] = "native", inside.on_cuda if on_gpu else inside.on_cpu
    if "triton" not in absent:
        # Its ops have the same results as the extension's, whose path can be traced without a GPU.
        contestants["triton"] = "native", inside.in_triton
    found = {name: traced(case, path, within, on_gpu) for name, (path, within) in contestants.items()}
    found["compile"] = compiled.parts(case, on_gpu)
    if not on_gpu:
        for name in found:
            found[name] = inside.joined([*found[name].items(), *inside.workspace(loss, name, case.dtype).items()])
    return {name: _estimate(found[name], name) for name in CONTESTANTS if name in found}


def inputs(loss: str, shape: Sequence[int], dtype: torch.dtype | str) -> int:
    """Return the bytes of the inputs, which `memory` does not count. Raises `ValueError` as `memory` does."""
    return input_bytes(_case(loss, shape, dtype, "cpu"))


def without(loss: str, device: str) -> dict[str, str]:
    """Return why implementations are not estimated, by name."""
    if not native.available():
        return dict.fromkeys(("native", "triton"), native.why_not())
    if device == "cpu":
        return {"triton": "supports GPU tensors only"}
    return {"native": f"has no CUDA kernels for {loss}"} if loss in _WITHOUT_CUDA else {}


def _nothing(*_: object) -> Parts:
    return {}


def _estimate(parts: Parts, name: str) -> Estimate:
    largest_first = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return Estimate(largest_first, BASIS[name])


def _case(loss: str, shape: Sequence[int], dtype: torch.dtype | str, device: str) -> Case:
    """Return the checked case. Its tensors are a CPU's on every device: fake ones need no GPU."""
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}; got {loss!r}")
    names, got = LOSSES[loss], "x".join(map(str, shape))
    if len(shape) != len(names) or any(size < 1 for size in shape):
        raise ValueError(f"shape: expected {','.join(names)} for {loss}, each at least 1, got {got!r}")
    if names == ("N", "D") and COSTS[loss].products(shape) and (shape[0] < 16 or shape[0] % 2):
        raise ValueError(f"shape: expected an even N of at least 16 for {loss}, got {got!r}")
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}; got {device!r}")
    sizes: Shape = tuple(shape)
    return Case(loss, sizes, kind, getattr(losses, loss))
