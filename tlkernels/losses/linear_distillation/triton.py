"""Linear distillation in Triton: launches of the kernels. `_core/triton/linear.py` has the strategies and products.

As in linear cross entropy, both strategies run the same kernels on tiles of transposed logits, those of both layers:
`normalise` over all classes of some rows, split over several programs; `average` for Jensen-Shannon and total
variation, which need both normalisers first; `finish`, which joins the splits; and `gradient`.

With p_t and p_s the softmax of the teacher's and the student's logits over the temperature, D the divergence, and
slope_k = dD / dp_k up to a constant:

    dD / du_k = p_k * (slope_k - sum of p_k * slope_k)

    forward_kl: slope_t = log(p_t / p_s), of average D; slope_s = -p_t / p_s, which leaves p_s - p_t; reverse_kl mirrors
    js: slope_t = beta * log(p_t / m), slope_s = (1 - beta) * log(p_s / m);    tv: slope_k = sign(p_k - p_other) / 2

so D is the sum of both averages of slopes, or one of them. Bytes of chunks, in addition to the products: both logits
are read twice (for js and tv three times), and those that need a gradient are written once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import check_classes, linear
from tlkernels._core.triton.kernels import DTYPES, sum_of
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels.losses.distillation.call import DIVERGENCES, Options, absent_rows, counted_rows, triton_softcaps
from tlkernels.losses.linear_distillation import triton_gradients
from tlkernels.losses.linear_distillation import triton_kernels as kernels
from tlkernels.losses.linear_distillation.call import Layers

# 2026-11-21, by reasoning and from the compiler's report, unmeasured: as in linear cross entropy with options, since
# there are tiles of two layers.
_CHUNKS = Table(
    "linear_distillation chunks",
    Config("interpreter", 0, None, {"DEEP": 2, "LANES": 16, "BLOCK": 64}, 1),
    Config("*", 8, None, {"DEEP": 2, "LANES": 8, "BLOCK": 64}, 8),
    Config("*", 4, None, {"DEEP": 2, "LANES": 8, "BLOCK": 128}, 8),
    Config("*", 2, None, {"DEEP": 2, "LANES": 16, "BLOCK": 128}, 8),
)
_LEAN = Table(
    "linear_distillation lean",
    Config("interpreter", 0, None, {"DEEP": 64, "LANES": 1, "BLOCK": 64, "BLOCK_K": 16}, 1),
    Config("*", 8, None, {"DEEP": 16, "LANES": 1, "BLOCK": 32, "BLOCK_K": 16}, 4, 2),
    Config("*", 4, None, {"DEEP": 32, "LANES": 1, "BLOCK": 32, "BLOCK_K": 32}, 4, 2),
    Config("gfx9*", 2, None, {"DEEP": 64, "LANES": 1, "BLOCK": 64, "BLOCK_K": 32}, 4, 2),
    Config("*", 2, None, {"DEEP": 64, "LANES": 1, "BLOCK": 128, "BLOCK_K": 32}, 8, 3),
)
_FINISH = Table("linear_distillation finish", Config("*", 0, None, {"BLOCK": 32}, 4))
_FIELDS, _KEPT = 9, 7  # of partial statistics; of `kept`, which `finish` writes


class _Launcher:
    """Launches the kernels of one call."""

    def __init__(self, layers: Layers, options: Options):
        self.layers = [
            (x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.contiguous())
            for x, weight, bias in (
                (layers.student_input, layers.student_weight, layers.student_bias),
                (layers.teacher_input, layers.teacher_weight, layers.teacher_bias),
            )
        ]
        (x, weight, _), (teacher, _, _) = self.layers
        self.rows, self.classes = x.shape[0], weight.shape[0]
        self.wide = compute_dtype(x, teacher)
        self.options = options
        self.target = self.row_weight = None
        if options.target is not None:
            check_classes(options.target, self.classes, options.ignore_index)
            self.target = options.target.reshape(-1).to(torch.int64).contiguous()
        if options.row_weight is not None:
            self.row_weight = options.row_weight.reshape(-1).contiguous()
        self.loss = x.new_empty(self.rows, dtype=self.wide)
        self.kept = x.new_empty((_KEPT, self.rows), dtype=self.wide)
        self.hard = bool(options.hard_weight)
        self.caps, self.capped = triton_softcaps(options)
        self.divergence = DIVERGENCES.index(options.divergence)
        self.kinds: dict[str, Any] = {"DIVERGENCE": self.divergence, "T": DTYPES[self.wide]}
        self.types = {"S_TYPE": DTYPES[compute_dtype(x)], "T_TYPE": DTYPES[compute_dtype(teacher)]}

    def run(self, needs: Sequence[bool], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """Fill `loss` and return the gradients that are needed, of flat tensors."""
        sides = [linear.Needs(*needs[k : k + 3]) for k in (0, 3)]
        plan = linear.plan(self.layers, sides)
        self.in_chunks = plan.strategy == "chunks"
        absent = absent_rows(self.options) if any(needs) else None
        if absent is not None:
            absent = absent.reshape(-1, 1)
        sweeps = [linear.Sweep(layer, side, plan, absent) for layer, side in zip(self.layers, sides, strict=True)]
        for begin in range(0, self.rows, plan.rows):
            end = min(begin + plan.rows, self.rows)
            logits = [None if sweep.lean else sweep.compute(begin, end) for sweep in sweeps]
            self.losses(begin, end, logits)
            if upstream is None or not any(needs):
                continue
            for first in range(0, self.classes, plan.classes):
                last = min(first + plan.classes, self.classes)
                gradients = [
                    sweep.memory(begin, end, first, last) if any(side) else None
                    for sweep, side in zip(sweeps, sides, strict=True)
                ]
                self.gradient(begin, end, first, last, logits, gradients, upstream)
                for sweep, gradient in zip(sweeps, gradients, strict=True):
                    if gradient is not None:
                        sweep.backpropagate(begin, end, first, last, gradient)
        student, teacher = sweeps
        return *student.gradients(), *teacher.gradients()

    def _operands(self, begin: int, end: int, logits: Sequence[Tensor | None]) -> tuple[list[Any], Table]:
        """Return a kernel's first arguments, and the table."""
        arguments: list[Any] = []
        for layer, made in zip(self.layers, logits, strict=True):
            arguments += linear.operands(layer, made, begin, end)
        return arguments, _CHUNKS if self.in_chunks else _LEAN

    def _run(self, table: Table, launches: Callable[[Config], None], repeatable: bool = True) -> None:
        size = max(x.element_size() for x, _, _ in self.layers)
        # A table of chunks has no BLOCK_K, since its kernels compute no product.
        with_k = lambda config: launches(config._replace(meta={"BLOCK_K": 16, **config.meta}))  # noqa: E731
        table.run(self.loss.device, size, self.rows * self.classes, with_k, repeatable)

    def _features(self) -> tuple[int, int]:
        (x, _, _), (teacher, _, _) = self.layers
        return x.shape[1], teacher.shape[1]

    def _numbers(self) -> tuple[float, ...]:
        """Return a kernel's numbers from `inv_temperature` to `smoothing`."""
        temperature, beta, hard_weight = self.options.temperature, self.options.beta, self.options.hard_weight
        soft_weight = (1 - hard_weight) * temperature**2
        return 1 / temperature, beta, soft_weight, hard_weight, self.options.label_smoothing

    def losses(self, begin: int, end: int, logits: Sequence[Tensor | None]) -> None:
        """Fill `loss` and `kept` for rows `begin` to `end`."""
        rows = end - begin
        operands, table = self._operands(begin, end, logits)
        new = partial(self.loss.new_empty, dtype=self.wide)
        target, row_weight = (None if t is None else t[begin:end] for t in (self.target, self.row_weight))
        kept, loss = self.kept[:, begin:], self.loss[begin:end]
        inv_temperature, beta, *weights = self._numbers()

        def launches(config: Config) -> None:
            blocks = triton.cdiv(rows, config.meta["BLOCK"])
            tiles = triton.cdiv(self.classes, config.meta["DEEP"] * config.meta["LANES"])
            splits, tiles_of_one = linear.split(self.loss.device, blocks, tiles)
            common = {"config": config, "PRECISION": linear.precision(), **self.kinds, **self.types, **self.capped}

            def finish(sums: Tensor | None, averages: Tensor | None) -> None:
                row = _FINISH.find(self.loss.device, 0, rows)
                launch(
                    kernels.finish, (triton.cdiv(rows, row.meta["BLOCK"]),), sums, averages, target, row_weight, loss,
                    kept, rows, self.classes, self.rows, splits, self.options.ignore_index, inv_temperature,
                    beta, *weights, config=row, HARD=self.hard, SPLITS=triton.next_power_of_2(splits), **self.kinds,
                )  # fmt: skip

            sums = new((_FIELDS, splits, rows))
            launch(
                kernels.normalise, (blocks, splits), *operands, target, sums, rows, self.classes, *self._features(),
                tiles_of_one, inv_temperature, *self.caps, HARD=self.hard, **common,
            )  # fmt: skip
            finish(sums, None)
            if self.options.divergence in ("js", "tv"):
                averages = new((2, splits, rows))
                launch(
                    kernels.average, (blocks, splits), *operands, kept, averages, rows, self.classes, *self._features(),
                    self.rows, tiles_of_one, inv_temperature, beta, *self.caps, **common,
                )  # fmt: skip
                finish(None, averages)

        self._run(table, launches)

    def gradient(
        self, begin: int, end: int, first: int, last: int, logits: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None], upstream: Tensor,
    ) -> None:  # fmt: skip
        """Write the gradients of the logits of rows `begin` to `end` and classes `first` to `last`."""
        rows = end - begin
        operands, table = self._operands(begin, end, logits)
        target, row_weight = (None if t is None else t[begin:end] for t in (self.target, self.row_weight))
        each = upstream.dim() > 0
        outputs: list[Any] = []
        for gradient in gradients:
            outputs += [gradient, 0 if gradient is None else gradient.stride(0)]

        def launches(config: Config) -> None:
            tiles = triton.cdiv(last - first, config.meta["DEEP"] * config.meta["LANES"])
            launch(
                triton_gradients.gradient, (triton.cdiv(rows, config.meta["BLOCK"]) * tiles,), *operands, target,
                row_weight, self.kept[:, begin:], upstream[begin:end] if each else upstream,
                upstream.stride(0) if each else 0, *outputs, rows, self.classes, *self._features(), first, last,
                self.rows, self.options.ignore_index, *self._numbers(), *self.caps, config=config, HARD=self.hard,
                PRECISION=linear.precision(), **self.kinds, **self.types, **self.capped,
            )  # fmt: skip

        self._run(table, launches, repeatable=not self.in_chunks)


def forward(*arguments: Any) -> Tensor:
    """Return the loss of each row."""
    layers, options, () = _split(arguments)
    launcher = _Launcher(layers, options)
    launcher.run([False] * 6)
    return launcher.loss.view(layers.student_input.shape[:-1])


def backward(grad_rows: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of both layers for an upstream of each row; after the options comes which are needed."""
    layers, options, (needs,) = _split(arguments)
    return _shaped(_Launcher(layers, options).run(needs, grad_rows.reshape(-1)), layers)


def step(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the reduced loss, and its gradients.

    After the options comes whether the loss is the mean, and which gradients are needed.
    """
    layers, options, (mean, needs) = _split(arguments)
    launcher = _Launcher(layers, options)
    divisor, upstream = None, launcher.loss.new_ones(())
    if mean:
        count = counted_rows(layers.student_input, options)
        divisor = count.to(launcher.wide) if isinstance(count, Tensor) else torch.full_like(upstream, count)
        upstream = divisor.reciprocal()
    grads = launcher.run(needs, upstream)
    return sum_of(launcher.loss, launcher.loss.new_empty(()), divisor=divisor), *_shaped(grads, layers)


def _split(arguments: Sequence[Any]) -> tuple[Layers, Options, Sequence[Any]]:
    """Return an op's layers, its options, and the arguments after them."""
    behind_layers = len(Layers._fields)
    behind_options = behind_layers + len(Options._fields)
    layers = Layers(*arguments[:behind_layers])
    return layers, Options(*arguments[behind_layers:behind_options]), arguments[behind_options:]


def _shaped(grads: Sequence[Tensor], layers: Layers) -> tuple[Tensor, ...]:
    """Return the gradients in the shapes of the layers; one that is not needed has no elements."""
    return tuple(
        grad.view(tensor.shape) if grad.dim() > 1 and tensor is not None else grad
        for grad, tensor in zip(grads, layers, strict=True)
    )
