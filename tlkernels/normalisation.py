"""Whether the gradient of a training step depends on the number of micro-batches (gradient accumulation)."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    import transformers

# A correct step's difference was at most 1.7 times the change of the gradient that flipped last bits make: tiny BERT,
# Llama and ResNet and MiniLM, new and trained to a small loss, in float64, float32, bfloat16 and its autocast.
_MARGIN = 8
_CHUNK = 1 << 24  # elements compared at a time, in float64

_DROPOUTS = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
}
# Modules that are random, or use statistics of the micro-batch, if their own `training` is True.
_TRAINING_MODULES = (nn.modules.batchnorm._BatchNorm, nn.RNNBase, nn.MultiheadAttention)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Normalisation:
    """The gradient with `pieces` micro-batches, compared with the gradient of the whole batch in one piece.

    Attributes:
        pieces: the number of micro-batches; the line of 1 compares two runs of the whole batch.
        factor: the multiple of the whole batch's gradient that is closest to this gradient.
        difference: the norm of the difference of the two gradients, divided by that of the whole batch's gradient.
        rounding: the largest difference that is taken for rounding.
    """

    pieces: int
    factor: float
    difference: float
    rounding: float

    @property
    def ok(self) -> bool:
        """Whether the difference is no larger than rounding."""
        return self.difference <= self.rounding


@dataclass(frozen=True)
class NormalisationReport:
    """The lines of `check_normalisation`, one for each number of micro-batches; `str` gives a table and a verdict."""

    lines: tuple[Normalisation, ...]

    @property
    def ok(self) -> bool:
        """Whether the gradient is the same with every number of micro-batches."""
        return all(line.ok for line in self.lines)

    def __str__(self) -> str:
        return self.text("micro-batches")

    def text(self, pieces: str) -> str:
        """Return the table and the verdict; `pieces` says what the batch was cut into."""
        rows = [
            f"{line.pieces:13d}  {line.factor:7.3f}  {line.difference:10.2e}  {line.rounding:8.1e}  "
            + ("ok" if line.ok else "NOT OK")
            for line in self.lines
        ]
        return "\n".join([f"{pieces:>13}   factor  difference  rounding", *rows, self._verdict(pieces)])

    def _verdict(self, pieces: str) -> str:
        if self.ok:
            rounding = max(line.rounding for line in self.lines)
            return f"The gradient does not depend on the number of {pieces}, up to a rounding of {rounding:.1e}."
        worst = max(self.lines, key=lambda line: line.difference)
        text = (
            f"The gradient depends on the number of {pieces}: with {worst.pieces}, it is {worst.factor:.3f} times "
            f"that of the whole batch, with a relative difference of {worst.difference:.3g}"
        )
        multiples = all(
            max(abs(line.factor - line.pieces), abs(line.difference - (line.pieces - 1))) <= line.pieces * line.rounding
            for line in self.lines[1:]
        )
        return text + ("; the loss is not divided by the number of micro-batches." if multiples else ".")


def check_normalisation(
    step: Callable[[int], object] | transformers.Trainer,
    model: nn.Module | None = None,
    pieces: Sequence[int] = (1, 2, 4),
) -> NormalisationReport:
    """Compare the gradients of one training step on the same batch, cut into different numbers of micro-batches.

    A loop that averages the means of micro-batches weighs rows differently if micro-batches have different numbers of
    counted rows (not masked, not ignored); a loop that does not divide the loss multiplies the gradient by the number
    of micro-batches.

    The model stays in training mode, without what depends on the micro-batch for other reasons: dropout is off, and
    batch normalisation uses its running statistics. A loss over pairs of rows (contrastive) is reported as not ok,
    since a row has fewer partners in a micro-batch. Weights, buffers, modes, gradients and the states of the random
    number generators of torch, NumPy and Python are the same afterwards.

    `rounding` is measured: 8 times the change of the gradient when the last bit of every weight is flipped, in the
    coarsest dtype that occurs in the step, and at least 8 times the machine epsilon of that dtype. In float32 it is
    about 1e-6 to 1e-4; in bfloat16 it is 0.06 to 1 or more and hides small differences.

    Args:
        step: `step(n)` runs the forward and backward passes of one step, without that of the optimiser, with the
            same batch in n micro-batches, and leaves the gradient in the `.grad` of the parameters of `model`. Or a
            `transformers.Trainer`: the step is its `train()`, up to the step of the optimiser and without clipping and
            callbacks, on the first batch of its training data; micro-batches are cut from what its collator returns
            for the whole batch.
        model: the model; None for a `Trainer`, which has one.
        pieces: the numbers of micro-batches; the first is 1.

    Raises:
        TypeError: `step` or `model` is of another type.
        ValueError: `pieces` are not increasing numbers from 1; the step leaves no gradient, one that is zero or not
            finite, or different ones in two runs of the whole batch; the `Trainer` has several processes or devices, or
            its batch cannot be cut.
    """
    counts = list(pieces)
    if len(counts) < 2 or counts[0] != 1 or any(more <= fewer for fewer, more in pairwise(counts)):
        raise ValueError(f"pieces: expected 1 and larger numbers in increasing order, got {counts}")
    with _random_state():
        if callable(step):
            if not isinstance(model, nn.Module):
                raise TypeError(f"model: expected the nn.Module that step trains, got {type(model).__name__}")
            return _report(step, model, counts)
        library = sys.modules.get("transformers")
        if library is None or not isinstance(step, library.Trainer):
            raise TypeError(f"step: expected a function or a transformers.Trainer, got {type(step).__name__}")
        if model is not None:
            raise TypeError(f"model: expected None with a Trainer, got {type(model).__name__}")
        from tlkernels.integrations.hf_normalisation import trainer_step

        with trainer_step(step, counts) as run:
            return _report(run, step.model, counts)


def _report(step: Callable[[int], object], model: nn.Module, counts: list[int]) -> NormalisationReport:
    with repeatable(model) as dtypes:
        whole = [gradient.clone() for gradient in _gradients(step, model, 1)]  # the step may use its buffers again
        again = _compare(_gradients(step, model, 1), whole)
        dtypes |= {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        # Rounding changes far less than half of the digits, and randomness far more.
        if again[1] > math.sqrt(eps):
            raise ValueError(
                f"step: expected the same gradient from two runs of step(1), got a relative difference of "
                f"{again[1]:.2g}; the data or the model are random"
            )
        with _last_bits_flipped(model, eps):
            _, change = _compare(_gradients(step, model, 1), whole)
        rounding = _MARGIN * max(change, eps)
        lines = [Normalisation(1, *again, rounding)]
        for count in counts[1:]:
            lines.append(Normalisation(count, *_compare(_gradients(step, model, count), whole), rounding))
    return NormalisationReport(tuple(lines))


def _gradients(step: Callable[[int], object], model: nn.Module, count: int) -> list[Tensor]:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    versions = [parameter._version for parameter in parameters]
    step(count)
    if versions != [parameter._version for parameter in parameters]:
        raise ValueError(f"step: step({count}) changed the weights; expected no step of the optimiser")
    if all(parameter.grad is None for parameter in parameters):
        raise ValueError(f"step: no parameter of the model has a gradient after step({count})")
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters if p.requires_grad]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError(f"step: the gradient of step({count}) is not finite")
    return gradients


def _compare(gradients: list[Tensor], whole: list[Tensor]) -> tuple[float, float]:
    """Return the factor and the relative difference."""
    inner = norm = distance = 0.0
    for pair in zip(gradients, whole, strict=True):
        for a, b in zip(*(gradient.detach().flatten().split(_CHUNK) for gradient in pair), strict=True):
            a, b = a.double(), b.double()
            inner, norm, distance = inner + float(a @ b), norm + float(b @ b), distance + float((a - b) @ (a - b))
    if norm == 0:
        raise ValueError("step: the gradient of step(1) is zero")
    return inner / norm, math.sqrt(distance / norm)


@contextmanager
def repeatable(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Turn off what is random or depends on the micro-batch; give the floating dtypes that occur, as they do.

    Modules, buffers and gradients are restored afterwards.
    """
    with _restored(model), _NoDropout() as mode:
        yield mode.dtypes


class _NoDropout(TorchFunctionMode):
    """Turn dropout off in functions, and collect the floating dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)
        return result


@contextmanager
def _random_state() -> Iterator[None]:
    """Restore the states of the random number generators of torch, NumPy and Python."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Turn off what is random or depends on the micro-batch in modules; restore modules, buffers and gradients."""
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for module, _, _ in modules:
            name = type(module).__name__.lower()
            if isinstance(module, _TRAINING_MODULES) or "drop" in name or name == "stochasticdepth":
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, attributes, named in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(named)


@contextmanager
def _last_bits_flipped(model: nn.Module, eps: float) -> Iterator[None]:
    """Change each weight by one unit in the last place of the dtype that has `eps`. Undone exactly, without a copy."""

    def flip() -> None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                bit = round(math.log2(eps / torch.finfo(parameter.dtype).eps))
                parameter.detach().view(_INTEGERS[parameter.itemsize]).bitwise_xor_(1 << bit)

    flip()
    try:
        yield
    finally:
        flip()
