"""Kernels of linear cross entropy for GPUs; `_core/linear.py` has the strategies, and the products of the library.

Both strategies run the same kernels on tiles of transposed logits: `statistics` over all classes of some rows, split
over several programs; `finish`, which joins the splits to a row's loss and normaliser; `gradient`. In chunks a tile
is read from memory, and its gradient takes its place; in the lean strategy it is a product made on the spot.

Bytes of chunks, beside the products: the logits are read twice and written once, 3 * 2 bytes in bfloat16. That is
0.73 ms for 4096 x 128256 at 4.3 TB/s, beside 16.3 ms of products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, check_classes, launch, linear
from tlkernels._core.triton.kernels import DTYPES, sum_of
from tlkernels.losses.cross_entropy.call import Call as CrossEntropyCall
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.linear_cross_entropy import triton_kernels as kernels

# 2026-11-21, by reasoning and from the compiler's report, unmeasured. Chunks: a thread has 16 bytes of a class, DEEP
# times, so that DEEP loads are on their way before the first is used, and two programs find room on a multiprocessor.
# Lean: the tiles with which products of 16-bit numbers come near the tensor cores' rate; those of float32 and float64
# are bound by arithmetic at any size. With softcap, smoothing, probabilities or statistics the same tiles would spill.
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
_SPLITS = 64  # at most, of a row: one program joins them
_FIELDS = 7  # of partial statistics


class _Rows(NamedTuple):
    """What the statistics of rows become."""

    loss: Tensor
    peak: Tensor | None
    log_sum: Tensor | None
    mass: Tensor | None
    spread: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    correct: Tensor | None

    def narrow(self, begin: int, end: int) -> "_Rows":
        return _Rows(self.loss[begin:end], *(None if tensor is None else tensor[begin:end] for tensor in self[1:]))


class _Call:
    """The launches of a call of flat tensors."""

    def __init__(self, *args: Any):
        """Take an op's arguments up to its options."""
        input, weight, bias, target = args[:4]
        options = Options(*args[4:])
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

    def run(self, plan: linear.Plan, needs: linear.Needs, out: _Rows, *upstream: Tensor | None) -> tuple[Tensor, ...]:
        """Fill `out` and return the gradients that are needed."""
        absent = None
        if any(needs) and not self.probabilities:
            absent = (self.target == self.options.ignore_index).unsqueeze(1)
            by_lse = upstream[1]
            if by_lse is not None:
                absent = absent & (by_lse == 0).unsqueeze(1)
                # The kernel tells rows apart by the target alone: of these it is to find a finite softmax, times 0.
                input, weight, bias = self.layer
                self.layer = input.masked_fill(absent, 0), weight, bias
        sweep = linear.Sweep(self.layer, needs, plan, absent)
        parts = [(begin, min(begin + plan.rows, self.rows)) for begin in range(0, self.rows, plan.rows)]
        for begin, end in parts:
            logits = None if sweep.lean else sweep.make(begin, end)
            self.statistics(begin, end, logits, out.narrow(begin, end))
            if not any(needs):
                continue
            for first in range(0, self.classes, plan.classes):
                last = min(first + plan.classes, self.classes)
                gradient = sweep.part(begin, end, first, last)
                self.gradient(begin, end, first, last, logits, gradient, out.narrow(begin, end), upstream)
                sweep.take(begin, end, first, last, gradient)
        return sweep.gradients()

    def _operands(
        self, begin: int, end: int, logits: Tensor | None, stats: bool
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], Table]:
        """The arguments that kernels begin with; those for the target; and the table."""
        input, weight, bias = self.layer
        x = input[begin:end]
        options = stats or self.probabilities or self.options.label_smoothing or self.options.softcap is not None
        if logits is None:
            operands = (None, 0, x, *x.stride(), weight, *weight.stride(), bias)
            table = _LEAN_OPTIONS if options else _LEAN
        else:
            operands = (logits, logits.stride(0), None, 0, 0, None, 0, 0, None)
            table = _CHUNKS_OPTIONS if options else _CHUNKS
        target = self.target[begin:end]
        strides = target.stride() if self.probabilities else (1, 0)
        return operands, (target, *strides, self.class_weight), table

    def _numbers(self) -> tuple[float, float, float]:
        _, _, smoothing, temperature, softcap, _ = self.options
        return smoothing, 1 / temperature, softcap or 1.0

    def _sweep_constants(self) -> dict[str, Any]:
        return {**self.constants, "CAPPED": self.options.softcap is not None, "PRECISION": linear.precision()}

    def _run(self, table: Table, launches: Callable[[Config], None], repeatable: bool = True) -> None:
        input = self.layer[0]
        # A tile of chunks makes no product.
        with_k = lambda config: launches(config._replace(meta={"BLOCK_K": 16, **config.meta}))  # noqa: E731
        table.run(input.device, input.element_size(), self.rows * self.classes, with_k, repeatable)

    def statistics(self, begin: int, end: int, logits: Tensor | None, out: _Rows) -> None:
        """Fill `out` for some rows."""
        input, rows = self.layer[0], end - begin
        operands, target, table = self._operands(begin, end, logits, out.correct is not None)
        wanted = None
        if out.correct is not None:
            wanted = self.target[begin:end].argmax(1) if self.probabilities else target[0]

        def launches(config: Config) -> None:
            blocks = triton.cdiv(rows, config.meta["BLOCK"])
            tiles = triton.cdiv(self.classes, config.meta["DEEP"] * config.meta["LANES"])
            tiles_of_one = triton.cdiv(tiles, max(1, min(_SPLITS, linear.machine(input.device).programs // blocks)))
            splits = triton.cdiv(tiles, tiles_of_one)
            partial = input.new_empty((_FIELDS, splits, rows), dtype=self.wide)
            best = None if wanted is None else input.new_empty((splits, rows), dtype=torch.int32)
            launch(
                kernels.statistics, (blocks, splits), *operands, *target, partial, best, rows, self.classes,
                input.shape[1], tiles_of_one, *self._numbers(), config=config, **self._sweep_constants(),
            )  # fmt: skip
            row = _FINISH.find(input.device, 0, rows)
            launch(
                kernels.finish, (triton.cdiv(rows, row.meta["BLOCK"]),), partial, best, wanted, target[0],
                self.class_weight, *out, rows, self.classes, splits, self.options.ignore_index,
                self.options.label_smoothing, self.options.z_loss, config=row,
                SPLITS=triton.next_power_of_2(splits), **self.constants,
            )  # fmt: skip

        self._run(table, launches)

    def gradient(
        self, begin: int, end: int, first: int, last: int, logits: Tensor | None, gradient: Tensor, out: _Rows,
        upstream: tuple[Tensor | None, ...],
    ) -> None:  # fmt: skip
        """Write the gradient of the logits of some rows and classes."""
        input, rows = self.layer[0], end - begin
        operands, target, table = self._operands(begin, end, logits, False)
        by_row: list[Any] = []
        for value in upstream:
            each = value is not None and value.dim() > 0
            by_row += [value[begin:end] if each else value, value.stride(0) if each else 0]  # type: ignore[index, union-attr]

        def launches(config: Config) -> None:
            tiles = triton.cdiv(last - first, config.meta["DEEP"] * config.meta["LANES"])
            launch(
                kernels.gradient, (triton.cdiv(rows, config.meta["BLOCK"]) * tiles,), *operands, *target, out.peak,
                out.log_sum, out.mass, out.spread, *by_row, gradient, gradient.stride(0), rows, self.classes,
                input.shape[1], first, last, self.options.ignore_index, *self._numbers(), self.options.z_loss,
                config=config, **self._sweep_constants(),
            )  # fmt: skip

        self._run(table, launches, repeatable=logits is None)

    def rows_of(self, gradients: bool, stats: bool = False) -> _Rows:
        new = self.layer[0].new_empty
        of_dtype = [self.wide] + [self.wide if gradients else None] * 4 + [self.wide if stats else None] * 2
        of_dtype += [torch.bool if stats else None]
        loss, *rest = (None if dtype is None else new(self.rows, dtype=dtype) for dtype in of_dtype)
        assert loss is not None
        return _Rows(loss, *rest)

    def plan(self, needs: linear.Needs) -> linear.Plan:
        return linear.plan([self.layer], [needs])

    def denominator(self) -> Tensor:
        """Return what `mean` divides by, on the device."""
        input = self.layer[0]
        logits = input.new_empty(()).expand(self.rows, self.classes)
        found = CrossEntropyCall(logits, self.target, self.options, "mean", False, False).denominator()
        if isinstance(found, Tensor):
            return found.to(self.wide)
        return torch.full((), found, dtype=self.wide, device=input.device)


def forward(*args: Any) -> Tensor:
    """Return the loss of each row."""
    call = _Call(*args)
    out = call.rows_of(gradients=False)
    needs = (False, False, False)
    call.run(call.plan(needs), needs, out)
    return out.loss


def forward_stats(*args: Any) -> tuple[Tensor | None, ...]:
    """Return loss, lse, entropy and correct of each row."""
    call = _Call(*args)
    out = call.rows_of(gradients=False, stats=True)
    needs = (False, False, False)
    call.run(call.plan(needs), needs, out)
    return out.loss, out.lse, out.entropy, out.correct


def backward(grad_loss: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and bias for an upstream of each row's loss, and of its lse."""
    needs = args[-3:]
    call = _Call(*args[:-3])
    return call.run(call.plan(needs), needs, call.rows_of(gradients=True), grad_loss, grad_lse)


def step(*args: Any) -> tuple[Tensor, ...]:
    """Return the reduced loss, and its gradients."""
    *rest, mean, needs_input, needs_weight, needs_bias = args
    needs = (needs_input, needs_weight, needs_bias)
    call = _Call(*rest)
    out = call.rows_of(gradients=any(needs))
    loss = out.loss.new_empty(())
    divisor = call.denominator() if mean else None
    upstream = out.loss.new_ones(()) if divisor is None else divisor.reciprocal()
    grads = call.run(call.plan(needs), needs, out, upstream, None)
    return sum_of(out.loss, loss, divisor=divisor), *grads


# 8 bytes of a thread, with which the compiler keeps to 64 registers; and scalar registers, kept in vector registers.
_FEW = {
    ("gradient", "sm_80", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("statistics", "sm_100", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("statistics", "gfx942", "spills"): "scalar registers, kept in vector registers, not in memory",
}
_WIDE = {"statistics": ("LDG.E.128",), "gradient": ("LDG.E.128", "STG.E.128")}
_PRODUCTS = {"statistics": ("HGMMA",), "gradient": ("HGMMA",)}


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the tables."""
    for strategy, claims in (("chunks", _WIDE), ("lean", _PRODUCTS)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            claimed = claims if dtype == torch.bfloat16 else {}
            yield Example(f"{strategy}-{dtype}", partial(_example, strategy, dtype), claimed, _FEW)
        every = partial(_example, strategy, torch.bfloat16, 0.1, 30.0, every_option=True)
        yield Example(f"{strategy}-every-option", every, {}, _FEW)
        for dtype in (torch.float32, torch.float64):
            yield Example(f"{strategy}-softcap-{dtype}", partial(_example, strategy, dtype, 0.0, 30.0), {}, _FEW)
    probabilities = partial(_example, "chunks", torch.bfloat16, 0.1, probabilities=True)
    yield Example("chunks-probabilities", probabilities, {}, _FEW)
    yield Example("lean-tf32", partial(_example, "lean", torch.float32, tf32=True))


def _example(
    strategy: str, dtype: torch.dtype, smoothing: float = 0.0, softcap: float | None = None, *,
    every_option: bool = False, probabilities: bool = False, tf32: bool = False,
) -> None:  # fmt: skip
    rows, features, classes = 4096, 4096, 128256
    with torch.device("meta"):
        x, w = torch.empty(rows, features, dtype=dtype), torch.empty(classes, features, dtype=dtype)
        b, y, g = torch.empty(classes, dtype=dtype), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    target = y.new_empty((rows, classes), dtype=dtype) if probabilities else y
    args = x, w, b if every_option else None, target, b if every_option else None, -100, smoothing, 1.0, softcap, 0.0
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with linear.forced(strategy):
            if every_option:
                forward_stats(*args)
                backward(g, g, *args, True, True, True)
            else:
                step(*args, True, True, True, False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
