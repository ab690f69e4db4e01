"""Kernels of linear cross entropy for GPUs; `_core/linear.py` has the strategies, and the products of the library.

Both strategies run the same kernels on tiles of transposed logits: `_statistics` over all classes of some rows, split
over several programs; `_finish`, which joins the splits to a row's loss and normaliser; `_gradient`. In chunks a tile
is read from memory, and its gradient takes its place; in the lean strategy it is a product made on the spot.

Bytes of chunks, beside the products: the logits are read twice and written once, 3 * 2 bytes in bfloat16. That is
0.73 ms for 4096 x 128256 at 4.3 TB/s, beside 16.3 ms of products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core import linear
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.linear_kernels import finite, logits_tile
from tlkernels._core.triton import Config, Example, Table, check_classes, launch
from tlkernels._core.triton_kernels import DTYPES, number, sum_of, tanh_and_slope
from tlkernels.losses.cross_entropy.call import Call as CrossEntropyCall
from tlkernels.losses.cross_entropy.call import Options

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _scaled(x, inv_temperature, softcap, CAPPED: tl.constexpr):
    """Return the logits after softcap and temperature, and their slope."""
    if CAPPED:
        t, bend = tanh_and_slope(x / softcap)
        z = t * (softcap * inv_temperature)
        slope = bend * inv_temperature
    else:
        z = x * inv_temperature
        slope = inv_temperature
    return z, slope


@triton.jit
def _weights(class_weight, c, there, T: tl.constexpr):
    """Return the classes' weights, 1 each where there are none."""
    if class_weight is not None:
        w = tl.load(class_weight + c, there, other=0.0).to(T)
    else:
        w = tl.where(there, 1.0, 0.0).to(T)
    return w


@triton.jit
def _probabilities(target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T: tl.constexpr):
    """Return each class's share of the target distribution, times its weight; 0 where it is not there."""
    at = r.to(tl.int64)[None, None, :] * target_row + c.to(tl.int64) * target_class
    q = (1 - smoothing) * tl.load(target + at, there, other=0.0).to(T) + smoothing / classes
    return tl.where(there, q * _weights(class_weight, c, c < classes, T), 0.0)


@triton.jit
def _join(peak, total, far, mass, heat):
    """Join statistics along the first axis, each from its own peak."""
    top = tl.max(peak, 0)
    shift = finite(top)[None, :] - finite(peak)
    factor = tl.exp(peak - finite(top)[None, :])
    heat = tl.sum(factor * (heat + total * shift), 0)
    return top, tl.sum(factor * total, 0), tl.sum(far + mass * shift, 0), tl.sum(mass, 0), heat


@triton.jit
def _statistics(
    logits,
    stride,
    input,
    input_row,
    input_k,
    weight,
    weight_row,
    weight_k,
    bias,
    target,  # class indices, or probabilities
    target_row,
    target_class,
    class_weight,
    partial,  # (statistic, split, row)
    best_class,  # (split, row), or None
    rows,
    classes,
    features,
    tiles,  # of a split
    smoothing: tl.float64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    T: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sweep a split of the classes of some rows.

    Statistics are kept for each lane apart, so that nothing crosses threads before the end. `far` is the sum of
    q * (peak - z) over the classes, q being the target's share; `heat` that of exp(z - peak) * (peak - z).
    """
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, r < rows, other=-1)
    peak = tl.full([LANES, BLOCK], float("-inf"), T)
    total = tl.zeros([LANES, BLOCK], T)
    own = tl.zeros([LANES, BLOCK], T)
    far = tl.zeros([LANES, BLOCK], T)
    mass = tl.zeros([LANES, BLOCK], T)
    heat = tl.zeros([LANES, BLOCK], T)
    best = tl.full([LANES, BLOCK], float("-inf"), T)
    best_at = tl.full([LANES, BLOCK], _NOWHERE, tl.int32)
    size: tl.constexpr = DEEP * LANES
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(classes, size))):
        first = tile * size
        x = logits_tile(
            logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
            features, T, DEEP, LANES, BLOCK_K, PRECISION,
        )  # fmt: skip
        c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
        there = c < classes
        z, _ = _scaled(x, inv_t, cap, CAPPED)
        z = tl.where(there, z, float("-inf"))
        top = tl.maximum(peak, tl.max(z, 0))
        shift = finite(top) - finite(peak)
        factor = tl.exp(peak - finite(top))
        gap = finite(top)[None, :, :] - z
        e = tl.exp(-gap)
        if best_class is not None:
            heat = factor * (heat + total * shift) + tl.sum(tl.where(e > 0, e * gap, 0.0), 0)
            x = tl.where(there, x, float("-inf"))
            tile_best = tl.max(x, 0)
            at = tl.min(tl.where((x == tile_best[None, :, :]) & there, c, _NOWHERE), 0)
            best_at = tl.where((tile_best > best) | (best_at == _NOWHERE), at, best_at)
            best = tl.maximum(best, tile_best)
        total = total * factor + tl.sum(e, 0)
        if PROBABILITIES:
            there = there & (r < rows)[None, None, :]
            q = _probabilities(target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T)
        else:
            own += tl.sum(tl.where(c == y[None, None, :], z, 0.0), 0)
            if SMOOTH:
                q = _weights(class_weight, c, there, T)
        if SPREAD:
            far += mass * shift + tl.sum(tl.where(there, q * gap, 0.0), 0)
            mass += tl.sum(q + tl.zeros_like(z), 0)
        peak = top
    peak, total, far, mass, heat = _join(peak, total, far, mass, heat)
    splits = tl.num_programs(1)
    out = partial + split.to(tl.int64) * rows + r
    next_field = splits.to(tl.int64) * rows
    tl.store(out, peak, r < rows)
    tl.store(out + next_field, total, r < rows)
    if not PROBABILITIES:
        tl.store(out + 2 * next_field, tl.sum(own, 0), r < rows)
    if SPREAD:
        tl.store(out + 3 * next_field, far, r < rows)
        tl.store(out + 4 * next_field, mass, r < rows)
    if best_class is not None:
        tl.store(out + 5 * next_field, heat, r < rows)
        value = tl.max(best, 0)
        at = tl.min(tl.where(best == value[None, :], best_at, _NOWHERE), 0)
        tl.store(out + 6 * next_field, value, r < rows)
        tl.store(best_class + split.to(tl.int64) * rows + r, at, r < rows)


@triton.jit
def _finish(
    partial,
    best_class,  # or None
    wanted,  # the target's class, or None
    target,
    class_weight,
    loss,  # results by row from here on
    peak_of,
    log_sum_of,
    mass_of,  # the sum of the target's shares, for an index without what smoothing spreads
    spread_of,  # the sum of the weights, with smoothing
    lse_of,
    entropy,
    correct,
    rows,
    classes,
    splits,
    ignore_index,
    smoothing: tl.float64,
    z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    T: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the splits of some rows. A class index out of range gives NaN."""
    SPREAD: tl.constexpr = PROBABILITIES or SMOOTH
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    there = (s < splits)[:, None] & (r < rows)[None, :]
    at = partial + s.to(tl.int64)[:, None] * rows + r[None, :]
    next_field = splits.to(tl.int64) * rows
    smoothing = number(smoothing, T)
    peaks = tl.load(at, there, other=float("-inf"))
    totals = tl.load(at + next_field, there, other=0.0)
    fars = tl.zeros([SPLITS, BLOCK], T)
    masses = tl.zeros([SPLITS, BLOCK], T)
    heats = tl.zeros([SPLITS, BLOCK], T)
    if SPREAD:
        fars = tl.load(at + 3 * next_field, there, other=0.0)
        masses = tl.load(at + 4 * next_field, there, other=0.0)
    if best_class is not None:
        heats = tl.load(at + 5 * next_field, there, other=0.0)
    peak, total, far, mass, heat = _join(peaks, totals, fars, masses, heats)
    peak = finite(peak)
    log_sum = tl.log(tl.where(r < rows, total, 1.0))
    counted = r < rows
    if PROBABILITIES:
        row_loss = far + mass * log_sum
    else:
        y = tl.load(target + r, r < rows, other=-1)
        counted = y != ignore_index
        valid = (y >= 0) & (y < classes)
        own = tl.sum(tl.load(at + 2 * next_field, there, other=0.0), 0)
        share = number(1.0, T) - smoothing
        if class_weight is not None:
            share *= tl.load(class_weight + y, valid, other=0.0).to(T)
        row_loss = share * (peak - own + log_sum)
        if SMOOTH:
            row_loss += smoothing / classes * (far + mass * log_sum)
            if peak_of is not None:
                tl.store(spread_of + r, mass, r < rows)
        mass = share + tl.zeros_like(peak)
        row_loss = tl.where(valid, row_loss, float("nan"))
    lse = peak + log_sum
    row_loss += number(z_loss, T) * lse * lse
    tl.store(loss + r, tl.where(counted, row_loss, 0.0), r < rows)
    if peak_of is not None:
        tl.store(peak_of + r, peak, r < rows)
        tl.store(log_sum_of + r, log_sum, r < rows)
        tl.store(mass_of + r, mass, r < rows)
    if best_class is not None:
        tl.store(lse_of + r, lse, r < rows)
        tl.store(entropy + r, log_sum + heat / total, r < rows)
        best = tl.load(at + 6 * next_field, there, other=float("-inf"))
        classes_of = tl.load(best_class + s.to(tl.int64)[:, None] * rows + r[None, :], there, other=_NOWHERE)
        first = tl.min(tl.where(best == tl.max(best, 0)[None, :], classes_of, _NOWHERE), 0)
        tl.store(correct + r, (first == tl.load(wanted + r, r < rows, other=-1)) & counted, r < rows)


@triton.jit
def _gradient(
    logits,
    stride,
    input,
    input_row,
    input_k,
    weight,
    weight_row,
    weight_k,
    bias,
    target,
    target_row,
    target_class,
    class_weight,
    peak_of,
    log_sum_of,
    mass_of,
    spread_of,
    grad_loss,
    grad_loss_row,
    grad_lse,  # or None
    grad_lse_row,
    gradient,  # transposed, from class `begin` on
    gradient_stride,
    rows,
    classes,
    features,
    begin,
    end,
    ignore_index,
    smoothing: tl.float64,
    inv_temperature: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    T: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient by a tile of logits; what z-loss and lse add to it stands apart from the target's."""
    blocks = tl.cdiv(rows, BLOCK)
    program = tl.program_id(0)
    r = program % blocks * BLOCK + tl.arange(0, BLOCK)
    first = begin + program // blocks * (DEEP * LANES)
    smoothing, inv_t, cap = number(smoothing, T), number(inv_temperature, T), number(softcap, T)
    x = logits_tile(
        logits, stride, input, input_row, input_k, weight, weight_row, weight_k, bias, first, r, rows, classes,
        features, T, DEEP, LANES, BLOCK_K, PRECISION,
    )  # fmt: skip
    here = r < rows
    peak = tl.load(peak_of + r, here, other=0.0)
    log_sum = tl.load(log_sum_of + r, here, other=0.0)
    mass = tl.load(mass_of + r, here, other=0.0)
    g = tl.load(grad_loss + r * grad_loss_row, here, other=0.0).to(T)
    counted = here
    y = r
    if not PROBABILITIES:
        y = tl.load(target + r, here, other=-1)
        counted = y != ignore_index
        g = tl.where((y >= 0) & (y < classes), g, float("nan"))
    g = tl.where(counted, g, 0.0)  # it may be infinite where no row counts
    rest = 2 * number(z_loss, T) * (peak + log_sum) * g
    lively = counted
    if grad_lse is not None:
        rest = tl.where(counted, rest, 0.0) + tl.load(grad_lse + r * grad_lse_row, here, other=0.0).to(T)
        lively = here
    c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
    there = (c < end) & here[None, None, :]
    z, slope = _scaled(x, inv_t, cap, CAPPED)
    p = tl.exp(z - peak[None, None, :] - log_sum[None, None, :])
    # Parts of the target cancel exactly against their parts of the softmax, where that is 1.
    if PROBABILITIES:
        d = mass[None, None, :] * p - _probabilities(
            target, target_row, target_class, class_weight, c, r, there, smoothing, classes, T
        )
    else:
        d = mass[None, None, :] * (p - tl.where(c == y[None, None, :], 1.0, 0.0))
        if SMOOTH:
            spread = tl.load(spread_of + r, here, other=0.0)
            d += smoothing / classes * (spread[None, None, :] * p - _weights(class_weight, c, c < classes, T))
    d = tl.where(counted[None, None, :], g[None, None, :] * d, 0.0)
    d = (d + rest[None, None, :] * p) * slope
    d = tl.where(lively[None, None, :], d, 0.0)
    at = gradient + (c - begin).to(tl.int64) * gradient_stride + r[None, None, :]
    tl.store(at, d.to(gradient.dtype.element_ty), there)


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
        sweep = linear.Sweep(self.layer, needs, plan)
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
                _statistics, (blocks, splits), *operands, *target, partial, best, rows, self.classes, input.shape[1],
                tiles_of_one, *self._numbers(), config=config, **self._sweep_constants(),
            )  # fmt: skip
            row = _FINISH.find(input.device, 0, rows)
            launch(
                _finish, (triton.cdiv(rows, row.meta["BLOCK"]),), partial, best, wanted, target[0], self.class_weight,
                *out, rows, self.classes, splits, self.options.ignore_index, self.options.label_smoothing,
                self.options.z_loss, config=row, SPLITS=triton.next_power_of_2(splits), **self.constants,
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
                _gradient, (triton.cdiv(rows, config.meta["BLOCK"]) * tiles,), *operands, *target, out.peak,
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
    ("_gradient", "sm_80", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("_statistics", "sm_100", "spills: 2,"): "two words, so that four programs fit on a multiprocessor",
    ("_statistics", "gfx942", "spills"): "scalar registers, kept in vector registers, not in memory",
}
_WIDE = {"_statistics": ("LDG.E.128",), "_gradient": ("LDG.E.128", "STG.E.128")}
_PRODUCTS = {"_statistics": ("HGMMA",), "_gradient": ("HGMMA",)}


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
