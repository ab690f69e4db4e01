"""A loss alone, on the loop's own batch: its time, memory and error by each way to compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tlkernels._core.dispatch import NAMES
from tlkernels.bench.measure import ERROR_ROWS, error_bar
from tlkernels.profiling.calls import EAGER, REFERENCE, Way
from tlkernels.profiling.memory import free_bytes
from tlkernels.profiling.recorded import Recorded
from tlkernels.timing import interleaved
from tlkernels.train.errors import one_line
from tlkernels.train.memory import out_of_memory, peak_bytes

SECONDS = 0.5  # of a loss, for all ways together, unless three rounds take longer
_WIDE = 6  # tensors of the size of the logits that the float64 computation needs
_WIDE_PARAMETERS = 3  # in float64: the parameters, their gradient, and the one that is compared with it


Runs = Mapping[str, Callable[[], list[Tensor]]]
Error = dict[str, float]
"""Of the "value" and of the "gradient", the worst of its parts; and of the parts that are told apart."""


def baseline(ways: Sequence[str]) -> str:
    """Return what is PyTorch's way: its lines, or the loss's reference where they are not written down."""
    return EAGER if EAGER in ways else REFERENCE


def replay(recorded: Recorded) -> dict[str, Any]:
    """Return what profile.json says of a loss. The tensors of the call are freed afterwards."""
    call, inputs = recorded.call, _Inputs(recorded)
    if recorded.spans_processes:
        why = "its tensors are spread over processes, where it cannot be computed alone"
        return _described(recorded, inputs) | {"ways": {}, "refused": dict.fromkeys(NAMES, why)}
    runs: dict[str, Callable[[], list[Tensor]]] = {}
    refused = dict(call.refused)
    memory: dict[str, int | None] = {}
    for name, way in call.ways.items():
        run = inputs.runner(way)
        try:
            run()
            memory[name] = _memory(run, inputs.device)
        except (RuntimeError, MemoryError) as error:
            refused[name] = "out of memory" if out_of_memory(error) else one_line(error)
        else:
            runs[name] = run
    seconds = interleaved(runs, SECONDS, least=3) if runs else {}
    base = baseline(list(call.ways))
    errors, why_none = _errors(inputs, runs, base, call.ways, recorded.parts)
    ways = {}
    for name in runs:
        wrong = why_none or _excess(errors, name, base, inputs.dtype)
        measured = base in runs and not wrong
        ways[name] = {
            "seconds": seconds[name],
            "step_seconds": seconds[name] * recorded.elements / recorded.largest,
            "speedup": seconds[base] / seconds[name] if measured else None,
            "peak_bytes": memory[name],
            "error": errors.get(name),
            "wrong": wrong,
        }
    return _described(recorded, inputs) | {"ways": ways, "refused": refused}


def _described(recorded: Recorded, inputs: _Inputs) -> dict[str, Any]:
    call, logits = recorded.call, recorded.logits
    return {
        "name": call.name,
        "own": call.own,
        "baseline": baseline(list(call.ways)),
        "calls": recorded.calls,
        "shape": [list(tensor.shape) for tensor in inputs.differentiable],
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "logits": None if logits is None else {**logits._asdict(), "dtype": str(logits.dtype), "bytes": logits.bytes},
    }


def _memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the most memory that a run takes; None for a CPU's beside a GPU, which `peak_bytes` would measure."""
    return peak_bytes(run) if device.type == "cuda" or not torch.cuda.is_available() else None


class _Inputs:
    """The arguments of a call."""

    def __init__(self, recorded: Recorded) -> None:
        self._leaves, self._spec = tree_flatten(recorded.call.arguments)
        self._autocast, self._logits = recorded.autocast, recorded.logits
        self.differentiable = [leaf for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.dtype, self.device = self.differentiable[0].dtype, self.differentiable[0].device
        share = self._compared_share()
        rows = self.differentiable[0].shape[:1]
        floating = [leaf for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        parameters = sum(tensor.numel() for tensor in floating if tensor.shape[:1] != rows)  # a frozen head's too
        elements = max(recorded.largest, self._logits.elements if self._logits else 0)
        self.wide_bytes = 8 * int(share * _WIDE * elements + _WIDE_PARAMETERS * parameters)
        self._few = self._leaves if share == 1 else self._rows(share)

    def _compared_share(self) -> float:
        """Return the share of the rows that are compared in float64: all, unless there are many."""
        rows = self.differentiable[0].shape[0] if self.differentiable[0].dim() == 2 else 0
        known = self._logits is not None and self._logits.rows == rows != self._logits.classes
        return min(1.0, ERROR_ROWS / rows) if known else 1.0

    def _rows(self, share: float) -> list[Any]:
        """Return the arguments with a share of the rows, drawn: every n-th may be those that are ignored."""
        rows = self.differentiable[0].shape[0]
        drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(0), device="cpu")[: round(share * rows)]
        return [
            leaf.detach()[drawn.to(leaf.device)].requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows
            else leaf
            for leaf in self._leaves
        ]

    def runner(self, way: Way, *, compared: bool = False, wide: bool = False) -> Callable[[], list[Tensor]]:
        """Return what computes the loss and its gradients: of the rows that are compared, or of all; or in float64."""
        leaves = self._few if compared else self._leaves
        leaves = [_wide(leaf) for leaf in leaves] if wide else leaves
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        arguments = tree_unflatten(leaves, self._spec)
        if compared and getattr(arguments, "num_valid", None) is not None:
            arguments = arguments._replace(num_valid=None)  # it is that of all rows
        autocast = None if wide else self._autocast

        def run() -> list[Tensor]:
            with torch.enable_grad(), torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                outputs, _ = tree_flatten(way(arguments))
                # Of several results, such as the loss and statistics, the first is the one that is trained on.
                value = next(each for each in outputs if isinstance(each, Tensor) and each.requires_grad)
                grads = torch.autograd.grad(value, inputs, torch.ones_like(value), allow_unused=True)
            return [value.detach(), *(grad for grad in grads if grad is not None)]

        return run


def _wide(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return torch.float64
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf


def _errors(
    inputs: _Inputs, runs: Runs, base: str, ways: Mapping[str, Way], parts: Sequence[str]
) -> tuple[dict[str, Error], str | None]:
    """Return the relative errors of each way, in the 2-norm, or why there are none."""
    if base not in ways:
        return {}, "there is no PyTorch line to compare with"
    if inputs.wide_bytes > free_bytes(inputs.device):
        return {}, f"not compared: float64 needs {inputs.wide_bytes / 1e9:.1f} GB of free memory"
    try:
        exact = inputs.runner(ways[base], compared=True, wide=True)()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return {}, "not compared: out of memory in float64"
    if not all(bool(result.isfinite().all()) for result in exact):
        return {}, "not compared: PyTorch's result is not finite"
    found = {}
    for name in runs:
        value, *grads = (
            float((got.double() - right).norm() / right.norm()) if right.norm() else float(got.double().norm())
            for got, right in zip(inputs.runner(ways[name], compared=True)(), exact, strict=True)
        )
        found[name] = {"value": value, "gradient": max(grads)} | (dict(zip(parts, grads, strict=True)) if parts else {})
    return found, None


def _excess(errors: Mapping[str, Error], name: str, base: str, dtype: torch.dtype) -> str | None:
    """Return why a result is wrong: its error is over twice that of PyTorch and a rounding."""
    for part, error in errors[name].items():
        bar = error_bar(errors[base][part] if base in errors else 0.0, dtype)
        if name != base and not error <= bar:
            return f"error of the {part} {error:.1e}, more than {bar:.1e}"
    return None
