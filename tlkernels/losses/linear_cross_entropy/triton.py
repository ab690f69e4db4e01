"""Linear cross entropy in Triton: launches of the kernels. `_core/triton/linear.py` has the strategies and products.

Both strategies run the same kernels on tiles of transposed logits: `statistics` over all classes of some rows, split
over several programs; `finish`, which joins the splits to a row's loss and normaliser; and `gradient`. In chunks a tile
is read from memory and overwritten by its gradient. In the lean strategy the kernels compute it as a product.

Bytes of chunks, in addition to the products: the logits are read twice and written once, 3 * 2 bytes in bfloat16. That
is 0.73 ms for 4096 x 128256 at 4.3 TB/s, compared with 16.3 ms of products.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import check_classes, linear
from tlkernels._core.triton.kernels import DTYPES, sum_of
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels.losses.cross_entropy.call import Arguments as CrossEntropyArguments
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.linear_cross_entropy import triton_kernels as kernels

# 2026-11-21, by reasoning and from the compiler's report, unmeasured. Chunks: a thread has 16 bytes of a class, DEEP
# times, so that DEEP loads are issued before the first is used, and two programs fit on a multiprocessor. Lean: tiles
# with which products of 16-bit numbers come near the tensor cores' rate; those of float32 and float64 are bound by
# arithmetic at any size. With softcap, smoothing, probabilities or statistics the same tiles would spill.
_CHUNKS = Table(
    "linear_cross_entropy chunks",
    Config("interpreter", 0, None, {"DEEP": 2, "LANES": 32, "BLOCK": 128}, 1),
    Config("*", 8, None, {"DEEP": 2, "LANES": 8, "BLOCK": 64}, 8),
    Config("*", 4, None, {"DEEP": 4, "LANES": 8, "BLOCK": 128}, 8),
    Config("*", 2, None, {"DEEP": 4, "LANES": 16, "BLOCK": 128}, 8),
)
_CHUNKS_OPTIONS = Table(
    "linear_cross_entropy chunks with options",
    Config("interpreter", 0, None, {"DEEP": 2, "LANES": 32, "BLOCK": 128}, 1),
    Config("*", 8, None, {"DEEP": 2, "LANES": 8, "BLOCK": 64}, 8),
    Config("*", 4, None, {"DEEP": 2, "LANES": 8, "BLOCK": 128}, 8),
    Config("*", 2, None, {"DEEP": 2, "LANES": 16, "BLOCK": 128}, 8),
)
_LEAN = Table(
    "linear_cross_entropy lean",
    Config("interpreter", 0, None, {"DEEP": 64, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 1),
    Config("*", 8, None, {"DEEP": 32, "LANES": 1, "BLOCK": 32, "BLOCK_K": 16}, 4, 2),
    Config("*", 4, None, {"DEEP": 64, "LANES": 1, "BLOCK": 64, "BLOCK_K": 32}, 4, 2),
    Config("gfx9*", 2, None, {"DEEP": 128, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 8, 2),
    Config("sm_90", 2, None, {"DEEP": 128, "LANES": 1, "BLOCK": 128, "BLOCK_K": 64}, 8, 3),
    Config("sm_10*", 2, None, {"DEEP": 128, "LANES": 1, "BLOCK": 128, "BLOCK_K": 64}, 8, 3),
    Config("*", 2, None, {"DEEP": 128, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 8, 3),
)
_LEAN_OPTIONS = Table(
    "linear_cross_entropy lean with options",
    Config("interpreter", 0, None, {"DEEP": 64, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 1),
    Config("*", 8, None, {"DEEP": 32, "LANES": 1, "BLOCK": 32, "BLOCK_K": 16}, 4, 2),
    Config("*", 4, None, {"DEEP": 32, "LANES": 1, "BLOCK": 64, "BLOCK_K": 32}, 4, 2),
    Config("gfx9*", 2, None, {"DEEP": 64, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 8, 2),
    Config("*", 2, None, {"DEEP": 64, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 8, 3),
)
_FINISH = Table("linear_cross_entropy finish", Config("*", 0, None, {"BLOCK": 32}, 4))
_FIELDS = 7  # of partial statistics


def _rows(values: Tensor | None, begin: int, end: int) -> tuple[Tensor | None, int]:
    """Return some rows of an upstream, and its stride: 0 for one number for all rows."""
    if values is None or values.dim() == 0:
        return values, 0
    return values[begin:end], values.stride(0)


class _Results(NamedTuple):
    """Results of each row."""

    loss: Tensor
    peak: Tensor | None
    log_sum: Tensor | None
    mass: Tensor | None
    spread: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    correct: Tensor | None

    def narrow(self, begin: int, end: int) -> "_Results":
        """Return those of some rows."""
        return _Results(self.loss[begin:end], *(None if tensor is None else tensor[begin:end] for tensor in self[1:]))


class _Launcher:
    """Launches the kernels of one call of flat tensors."""

    def __init__(self, layer: linear.Layer, target: Tensor, options: Options):
        input, weight, bias = layer
        self.layer = input, weight, None if bias is None else bias.contiguous()
        self.rows, self.classes = input.shape[0], weight.shape[0]
        self.wide = compute_dtype(input)
        self.probabilities = target.is_floating_point()
        self.target = target
        if not self.probabilities:
            check_classes(target, self.classes, options.ignore_index)
            self.target = target.to(torch.int64).contiguous()
        self.options = options
        self.class_weight = None if options.weight is None else options.weight.contiguous()
        self.constants: dict[str, Any] = {
            "PROBABILITIES": self.probabilities,
            "SMOOTH": bool(options.label_smoothing) and not self.probabilities,
            "T": DTYPES[self.wide],
        }

    def run(
        self, needs: linear.Needs, results: _Results, by_loss: Tensor | None = None, by_lse: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Fill `results` and return the gradients that are needed, for upstreams of the losses and of the lse."""
        plan = linear.plan([self.layer], [needs])
        ignored = None
        if any(needs) and not self.probabilities:
            ignored = (self.target == self.options.ignore_index).unsqueeze(1)
            if by_lse is not None:
                ignored = ignored & (by_lse == 0).unsqueeze(1)
                # The kernel ignores rows by the target alone: these need a finite softmax, which it multiplies by 0.
                input, weight, bias = self.layer
                self.layer = input.masked_fill(ignored, 0), weight, bias
        sweep = linear.Sweep(self.layer, needs, plan, ignored)
        for begin in range(0, self.rows, plan.rows):
            end = min(begin + plan.rows, self.rows)
            logits = None if sweep.lean else sweep.compute(begin, end)
            part = results.narrow(begin, end)
            self.statistics(begin, end, logits, part)
            if not any(needs):
                continue
            upstreams = [*_rows(by_loss, begin, end), *_rows(by_lse, begin, end)]
            for first in range(0, self.classes, plan.classes):
                last = min(first + plan.classes, self.classes)
                gradient = sweep.memory(begin, end, first, last)
                self.gradient(begin, end, first, last, logits, gradient, part, upstreams)
                sweep.backpropagate(begin, end, first, last, gradient)
        return sweep.gradients()

    def _operands(
        self, begin: int, end: int, logits: Tensor | None, stats: bool
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], Table]:
        """Return a kernel's first arguments, those for the target, and the table."""
        options = stats or self.probabilities or self.options.label_smoothing or self.options.softcap is not None
        lean, chunks = (_LEAN_OPTIONS, _CHUNKS_OPTIONS) if options else (_LEAN, _CHUNKS)
        target = self.target[begin:end]
        strides = target.stride() if self.probabilities else (1, 0)
        operands = linear.operands(self.layer, logits, begin, end)
        return operands, (target, *strides, self.class_weight), lean if logits is None else chunks

    def _numbers(self) -> tuple[float, float, float]:
        """Return a kernel's smoothing, inverse temperature and softcap."""
        return self.options.label_smoothing, 1 / self.options.temperature, self.options.softcap or 1.0

    def _sweep_constants(self) -> dict[str, Any]:
        return {**self.constants, "CAPPED": self.options.softcap is not None, "PRECISION": linear.precision()}

    def _run(self, table: Table, launches: Callable[[Config], None], repeatable: bool = True) -> None:
        input = self.layer[0]
        # A table of chunks has no BLOCK_K, since its kernels compute no product.
        with_k = lambda config: launches(config._replace(meta={"BLOCK_K": 16, **config.meta}))  # noqa: E731
        table.run(input.device, input.element_size(), self.rows * self.classes, with_k, repeatable)

    def statistics(self, begin: int, end: int, logits: Tensor | None, results: _Results) -> None:
        """Fill `results`, those of rows `begin` to `end`."""
        input, rows = self.layer[0], end - begin
        operands, target, table = self._operands(begin, end, logits, results.correct is not None)
        correct_class = None
        if results.correct is not None:
            correct_class = self.target[begin:end].argmax(1) if self.probabilities else target[0]

        def launches(config: Config) -> None:
            blocks = triton.cdiv(rows, config.meta["BLOCK"])
            tiles = triton.cdiv(self.classes, config.meta["DEEP"] * config.meta["LANES"])
            splits, tiles_of_one = linear.split(input.device, blocks, tiles)
            partial = input.new_empty((_FIELDS, splits, rows), dtype=self.wide)
            best = None if correct_class is None else input.new_empty((splits, rows), dtype=torch.int32)
            launch(
                kernels.statistics, (blocks, splits), *operands, *target, partial, best, rows, self.classes,
                input.shape[1], tiles_of_one, *self._numbers(), config=config, **self._sweep_constants(),
            )  # fmt: skip
            row = _FINISH.find(input.device, 0, rows)
            launch(
                kernels.finish, (triton.cdiv(rows, row.meta["BLOCK"]),), partial, best, correct_class, target[0],
                self.class_weight, *results, rows, self.classes, splits, self.options.ignore_index,
                self.options.label_smoothing, self.options.z_loss, config=row,
                SPLITS=triton.next_power_of_2(splits), **self.constants,
            )  # fmt: skip

        self._run(table, launches)

    def gradient(
        self, begin: int, end: int, first: int, last: int, logits: Tensor | None, gradient: Tensor, results: _Results,
        upstreams: Sequence[Any],
    ) -> None:  # fmt: skip
        """Write the gradient of the logits of rows `begin` to `end` and classes `first` to `last`."""
        input, rows = self.layer[0], end - begin
        operands, target, table = self._operands(begin, end, logits, False)

        def launches(config: Config) -> None:
            tiles = triton.cdiv(last - first, config.meta["DEEP"] * config.meta["LANES"])
            launch(
                kernels.gradient, (triton.cdiv(rows, config.meta["BLOCK"]) * tiles,), *operands, *target, results.peak,
                results.log_sum, results.mass, results.spread, *upstreams, gradient, gradient.stride(0), rows,
                self.classes, input.shape[1], first, last, self.options.ignore_index, *self._numbers(),
                self.options.z_loss, config=config, **self._sweep_constants(),
            )  # fmt: skip

        self._run(table, launches, repeatable=logits is None)

    def results(self, gradients: bool, stats: bool = False) -> _Results:
        """Return memory for the results of each row: what `gradient` reads, and statistics, if asked for."""
        input = self.layer[0]

        def new(needed: bool, dtype: torch.dtype = self.wide) -> Tensor | None:
            return input.new_empty(self.rows, dtype=dtype) if needed else None

        loss = input.new_empty(self.rows, dtype=self.wide)
        peak, log_sum, mass, spread = (new(gradients) for _ in range(4))
        return _Results(loss, peak, log_sum, mass, spread, new(stats), new(stats), new(stats, torch.bool))

    def denominator(self) -> Tensor:
        """Return what `mean` divides by, on the device."""
        input = self.layer[0]
        logits = input.new_empty(()).expand(self.rows, self.classes)
        denominator = CrossEntropyArguments(logits, self.target, self.options, "mean", False, False).denominator()
        if isinstance(denominator, Tensor):
            return denominator.to(self.wide)
        return torch.full((), denominator, dtype=self.wide, device=input.device)


def _launcher(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> _Launcher:
    """Return the launcher of an op's arguments up to its options."""
    return _Launcher((input, weight, bias), target, Options(*options))


def forward(*arguments: Any) -> Tensor:
    """Return the loss of each row."""
    launcher = _launcher(*arguments)
    results = launcher.results(gradients=False)
    launcher.run(linear.Needs(False, False, False), results)
    return results.loss


def forward_stats(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Return loss, lse, entropy and correct of each row."""
    launcher = _launcher(*arguments)
    results = launcher.results(gradients=False, stats=True)
    launcher.run(linear.Needs(False, False, False), results)
    return results.loss, results.lse, results.entropy, results.correct


def backward(grad_loss: Tensor, grad_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and bias, given those of each row's loss and lse, for (..., needs)."""
    *call, needs = arguments
    launcher = _launcher(*call)
    return launcher.run(linear.Needs(*needs), launcher.results(gradients=True), grad_loss, grad_lse)


def step(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the reduced loss and its gradients for (..., *options, mean, needs)."""
    *call, mean, needs = arguments
    launcher = _launcher(*call)
    needs = linear.Needs(*needs)
    results = launcher.results(gradients=any(needs))
    loss = results.loss.new_empty(())
    divisor = launcher.denominator() if mean else None
    upstream = results.loss.new_ones(()) if divisor is None else divisor.reciprocal()
    grads = launcher.run(needs, results, upstream)
    return sum_of(results.loss, loss, divisor=divisor), *grads
