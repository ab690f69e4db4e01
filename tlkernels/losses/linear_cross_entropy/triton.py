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
from tlkernels._core.triton.counted import counted_rows
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
_COPIED = 1 << 22  # probabilities that are converted at a time


def _rows(values: Tensor | None, begin: int, end: int) -> tuple[Tensor | None, int]:
    """Return some rows of an upstream, and its stride: 0 for one number for all rows."""
    if values is None or values.dim() == 0:
        return values, 0
    return values[begin:end], values.stride(0)


class Results(NamedTuple):
    """Results of each row, in the order of the arguments of `finish`."""

    loss: Tensor | None
    peak: Tensor
    log_sum: Tensor
    mass: Tensor | None
    """For the gradient with probabilities: their sum as the loss has them."""
    entropy: Tensor | None
    correct: Tensor | None

    def narrow(self, begin: int, end: int) -> "Results":
        """Return those of some rows."""
        return Results(*(None if tensor is None else tensor[begin:end] for tensor in self))  # type: ignore[arg-type]


class Launcher:
    """Launches the kernels of one call of flat tensors. Rows that are left out are in no tensor of it."""

    strategy: str | None = None
    """The only one, if not None."""

    def __init__(
        self, layer: linear.Layer, target: Tensor, options: Options, row_weight: Tensor | None, num_valid: int | None,
        needs: linear.Needs,
    ):  # fmt: skip
        input, weight, bias = layer
        self.all_rows, self.classes, self.needs = input.shape[0], weight.shape[0], needs
        self.wide = compute_dtype(input)
        self.probabilities = target.is_floating_point()
        valid = None
        if not self.probabilities:
            check_classes(target, self.classes, options.ignore_index, options.num_classes is not None)
            target = target.to(torch.int64)
            valid = target != options.ignore_index
        used = None if row_weight is None else row_weight != 0
        # Probabilities would have to be copied.
        strategy = self.strategy or linear.strategy([layer], [needs])
        ahead = not self.probabilities and strategy == "lean"
        self.counted = counted_rows(valid, used, num_valid, ahead)
        if self.counted.miscounted is not None:  # with a class out of range every row is NaN
            bad = self.classes + (options.ignore_index == self.classes)
            target = target.masked_fill(self.counted.miscounted, bad)
        if not self.probabilities:
            target = self.counted.kept(target).contiguous()
        self.target = target
        self.row_weight = None if row_weight is None else self.counted.kept(row_weight).contiguous()
        self.layer = self.counted.kept(input), weight, None if bias is None else bias.contiguous()
        self.rows = self.layer[0].shape[0]
        self.options = options
        self.class_weight = None if options.weight is None else options.weight.contiguous()
        self.spread = options.label_smoothing / (options.num_classes or self.classes)
        self.constants: dict[str, Any] = {
            "PROBABILITIES": self.probabilities,
            "SMOOTH": bool(options.label_smoothing) and not self.probabilities,
            "T": DTYPES[self.wide],
        }
        self.elsewhere = {"ELSEWHERE": options.num_classes is not None}

    def run(self, results: Results, *upstreams: Tensor | None, given: bool = False) -> tuple[Tensor, ...]:
        """Fill `results`, unless they are given, and return the gradients that are needed.

        `upstreams` are the gradients of the losses, the lse and the entropy.
        """
        plan = linear.plan([self.layer], [self.needs], self.strategy)
        sweep = linear.Sweep(self.layer, self.needs, plan, self.counted.absent)
        for begin in range(0, self.rows, plan.rows):
            end = min(begin + plan.rows, self.rows)
            logits = None if sweep.lean else sweep.compute(begin, end)
            part = results.narrow(begin, end)
            if not given:
                self.statistics(begin, end, logits, part)
            elif self.probabilities:
                part = part._replace(mass=self._mass(begin, end))
            if not any(self.needs):
                continue
            of_rows = [value for upstream in upstreams for value in _rows(upstream, begin, end)]
            for first in range(0, self.classes, plan.classes):
                last = min(first + plan.classes, self.classes)
                gradient = sweep.memory(begin, end, first, last)
                self.gradient(begin, end, first, last, logits, gradient, part, of_rows)
                sweep.backpropagate(begin, end, first, last, gradient)
        by_input, *others = sweep.gradients()
        return self.counted.spread(by_input, self.all_rows) if self.needs.input else by_input, *others

    def _weight_sum(self) -> Tensor | None:
        """Return the sum of the weights of the classes, (1,); None for their number."""
        return None if self.class_weight is None else self.class_weight.sum(0, keepdim=True, dtype=self.wide)

    def _mass(self, begin: int, end: int) -> Tensor:
        """Return the sum of the target's probabilities after smoothing, times the classes' weights, of some rows."""
        target, weight, smoothing = self.target[begin:end], self.class_weight, self.options.label_smoothing
        if weight is None:
            return (1 - smoothing) * target.sum(1, dtype=self.wide) + self.spread * self.classes
        step = max(1, _COPIED // self.classes)
        parts = [target[k : k + step].to(self.wide) @ weight.to(self.wide) for k in range(0, end - begin, step)]
        return (1 - smoothing) * torch.cat(parts) + self.spread * weight.sum(dtype=self.wide)

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

    def _weights(self, begin: int, end: int) -> Tensor | None:
        return None if self.row_weight is None else self.row_weight[begin:end]

    def _sweep_constants(self) -> dict[str, Any]:
        return {**self.constants, "CAPPED": self.options.softcap is not None, "PRECISION": linear.precision()}

    def _run(self, table: Table, launches: Callable[[Config], None], repeatable: bool = True) -> None:
        input = self.layer[0]
        # A table of chunks has no BLOCK_K, since its kernels compute no product.
        with_k = lambda config: launches(config._replace(meta={"BLOCK_K": 16, **config.meta}))  # noqa: E731
        table.run(input.device, input.element_size(), self.rows * self.classes, with_k, repeatable)

    def statistics(self, begin: int, end: int, logits: Tensor | None, results: Results) -> None:
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
                kernels.statistics, (blocks, splits), *operands, *target, self.counted.total, partial, best, rows,
                self.classes, input.shape[1], tiles_of_one, *self._numbers(), self.spread, config=config,
                **self._sweep_constants(),
            )  # fmt: skip
            row = _FINISH.find(input.device, 0, rows)
            launch(
                kernels.finish, (triton.cdiv(rows, row.meta["BLOCK"]),), partial, best, correct_class, target[0],
                self.class_weight, self._weights(begin, end), *results, rows, self.classes, splits,
                self.options.ignore_index, *self._numbers(), self.options.z_loss, self.spread, config=row,
                SPLITS=triton.next_power_of_2(splits), **self.elsewhere, **self.constants,
            )  # fmt: skip

        self._run(table, launches)

    def gradient(
        self, begin: int, end: int, first: int, last: int, logits: Tensor | None, gradient: Tensor, results: Results,
        upstreams: Sequence[Any],
    ) -> None:  # fmt: skip
        """Write the gradient of the logits of rows `begin` to `end` and classes `first` to `last`."""
        input, rows = self.layer[0], end - begin
        operands, target, table = self._operands(begin, end, logits, False)
        weight_sum = self._weight_sum() if self.constants["SMOOTH"] else None

        def launches(config: Config) -> None:
            tiles = triton.cdiv(last - first, config.meta["DEEP"] * config.meta["LANES"])
            launch(
                kernels.gradient, (triton.cdiv(rows, config.meta["BLOCK"]) * tiles,), *operands, *target, weight_sum,
                self._weights(begin, end), results.peak, results.log_sum, results.mass, results.entropy, *upstreams,
                self.counted.total, gradient, gradient.stride(0), rows, self.classes, input.shape[1], first, last,
                self.options.ignore_index, *self._numbers(), self.options.z_loss, self.spread, config=config,
                **self.elsewhere, **self._sweep_constants(),
            )  # fmt: skip

        self._run(table, launches, repeatable=logits is None)

    def results(self, stats: bool = False) -> Results:
        """Return memory for the results of each row, with statistics if asked for."""
        input = self.layer[0]

        def new(needed: bool, dtype: torch.dtype = self.wide) -> Tensor | None:
            return input.new_empty(self.rows, dtype=dtype) if needed else None

        loss, peak, log_sum = (input.new_empty(self.rows, dtype=self.wide) for _ in range(3))
        mass = new(self.probabilities and any(self.needs))
        return Results(loss, peak, log_sum, mass, new(stats), new(stats, torch.bool))

    def spread_out(self, results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Return results of all rows, 0 in those that are left out."""
        return tuple(self.counted.spread(values, self.all_rows) for values in results if values is not None)


_NOTHING = linear.Needs(False, False, False)


def _launcher(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any, needs: linear.Needs = _NOTHING
) -> Launcher:
    """Return the launcher of an op's arguments up to `num_valid`."""
    *options, row_weight, num_valid = rest
    return Launcher((input, weight, bias), target, Options(*options), row_weight, num_valid, needs)


def _denominator(input: Tensor, weight: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return what `mean` divides by, on the device."""
    logits = input.new_empty(()).expand(input.shape[0], weight.shape[0])
    denominator = CrossEntropyArguments(logits, target, options, "mean", False, False).denominator()
    if isinstance(denominator, Tensor):
        return denominator.to(compute_dtype(input))
    return torch.full((), denominator, dtype=compute_dtype(input), device=input.device)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return loss, peak and log_sum of each row."""
    launcher = _launcher(*arguments)
    results = launcher.results()
    launcher.run(results)
    return launcher.spread_out(results)


def forward_stats(*arguments: Any) -> tuple[Tensor, ...]:
    """Return loss, peak, log_sum, entropy and correct of each row."""
    launcher = _launcher(*arguments)
    results = launcher.results(stats=True)
    launcher.run(results)
    return launcher.spread_out(results)


def backward(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor, weight: Tensor,
    bias: Tensor | None, target: Tensor, peak: Tensor, log_sum: Tensor, entropy: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of input, weight and bias, given those of each row's results, for (..., needs)."""
    *options, needs = rest
    launcher = _launcher(input, weight, bias, target, *options, needs=linear.Needs(*needs))
    kept = launcher.counted.kept
    upstreams = (None if values is None else kept(values) for values in (grad_loss, grad_lse, grad_entropy))
    entropy = None if entropy is None else kept(entropy).contiguous()
    normaliser = Results(None, kept(peak).contiguous(), kept(log_sum).contiguous(), None, entropy, None)
    return launcher.run(normaliser, *upstreams, given=True)


def step(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return the reduced loss and its gradients for (..., *options, row_weight, num_valid, mean, needs)."""
    *arguments, mean, needs = rest
    launcher = _launcher(input, weight, bias, target, *arguments, needs=linear.Needs(*needs))
    results = launcher.results()
    assert results.loss is not None
    loss = results.loss.new_empty(())
    divisor = _denominator(input, weight, target, launcher.options) if mean else None
    upstream = loss.new_ones(()) if divisor is None else divisor.reciprocal()
    grads = launcher.run(results, upstream, None, None)
    return sum_of(results.loss, loss, divisor=divisor), *grads
