"""Losses of a linear layer on GPUs: which strategy a call takes, and the products that the library makes.

Logits stand transposed here, a row for each class. So the classes of a block lie together, and the gradient of the
weight, whose rows are classes too, can take the logits' memory block by block.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import INTERPRETED, architecture, tf32

_ENVIRONMENT = "TLKERNELS_LINEAR"
STRATEGIES = ("chunks", "lean")


class Machine(NamedTuple):
    """What the choice of a strategy rests on."""

    architecture: str
    """A pattern, such as "sm_9*"."""
    flops: dict[int, float]
    """The library's products in a second, twice, by bytes of an element."""
    share: dict[int, float]
    """How much of that rate our own products reach."""
    bandwidth: float
    """Bytes read and written in a second."""
    chunk: int
    """Bytes of logits that chunks may take beside what the gradient of the weight takes anyway."""
    align: int
    """Rows and classes of chunks and blocks are multiples of so many."""
    multiprocessors: int
    """Each has a tile of the library's products at a time, `align` x 256; 1 where that is not known."""
    programs: int
    """Of a sweep over all classes: several for each multiprocessor of the largest of these GPUs."""


_SHARE = {2: 0.65, 4: 0.5, 8: 0.3}
_CHUNK = 256 << 20
# 2026-11-21. sm_9*: flops of 2 bytes and bandwidth as measured on an H200; all others are vendors' figures times 0.8,
# and the shares are estimates: what is wrong about them moves the hidden size at which the strategies change places.
# With 256 MiB a chunk of 128256 classes has 1046 rows, at which the library's products run at their full rate. The
# interpreter's row makes chunks and blocks of small tests.
_MACHINES = (
    Machine("interpreter", {2: 8e14, 4: 5e13, 8: 5e13}, _SHARE, 4e12, 1 << 17, 16, 1, 8),
    Machine("sm_8*", {2: 2.5e14, 4: 1.6e13, 8: 1.6e13}, _SHARE, 1.6e12, _CHUNK, 128, 108, 1024),
    Machine("sm_9*", {2: 7.9e14, 4: 5.3e13, 8: 5.3e13}, _SHARE, 4.3e12, _CHUNK, 128, 132, 1024),
    Machine("sm_10*", {2: 1.8e15, 4: 6e13, 8: 3e13}, _SHARE, 6.4e12, _CHUNK, 128, 148, 1024),
    Machine("sm_12*", {2: 1.7e14, 4: 8e13, 8: 1.3e12}, _SHARE, 1.4e12, _CHUNK, 128, 188, 1024),
    Machine("gfx9*", {2: 1e15, 4: 1.3e14, 8: 1.3e14}, _SHARE, 4.2e12, _CHUNK, 128, 1, 1024),
    Machine("*", {2: 1e14, 4: 1e13, 8: 1e12}, _SHARE, 1e12, _CHUNK, 128, 1, 1024),
)


def machine(device: torch.device) -> Machine:
    """Return the row of the table for a device."""
    where = architecture(device)
    return next(row for row in _MACHINES if fnmatchcase(where, row.architecture))


Layer = tuple[Tensor, Tensor, Tensor | None]
Needs = Sequence[bool]


class Plan(NamedTuple):
    """How a sweep goes over the logits: all classes of `rows` rows at a time, or all rows of `classes` classes."""

    strategy: str
    rows: int
    classes: int


def plan(layers: Sequence[Layer], needs: Sequence[Needs]) -> Plan:
    """Return the plan of a call; TLKERNELS_LINEAR=chunks or lean in the environment overrules the choice, for tests.

    Chunks: the library makes the logits of some rows, kernels turn them into gradients in place, and the library takes
    those back to the layer. Lean: the logits are made in kernels, tile by tile, twice where gradients are needed, and
    never stored; only a block of gradients is. The model says which is faster for these shapes, whatever the values.
    """
    forced_to = os.environ.get(_ENVIRONMENT)
    if forced_to and forced_to not in STRATEGIES:
        raise ValueError(f"{_ENVIRONMENT}: expected one of {STRATEGIES}, got {forced_to!r}")
    input, weight, _ = layers[0]
    here = machine(input.device)
    strategy = forced_to or _faster(layers, needs, here)
    (rows, _), classes = input.shape, weight.shape[0]
    if strategy == "lean":
        # A block of gradients is no larger than the input, or what stays in a cache.
        most = max(max(x.numel() for x, _, _ in layers), here.chunk // 8 // input.element_size())
        return Plan(strategy, max(rows, 1), min(classes, _multiple(max(1, most // max(rows, 1)), here.align)))
    if all(in_place(layer, need, rows) for layer, need in zip(layers, needs, strict=True)):
        return Plan(strategy, max(rows, 1), classes)
    # Each further chunk passes once more over the gradient of the weight, so that one pays for large chunks; where the
    # weight needs a gradient, logits of its size are no more than what it takes for a moment when it is rounded.
    most = min(
        max(here.chunk // w.element_size(), w.numel() if need[1] else 0) // classes
        for (x, w, b), need in zip(layers, needs, strict=True)
        if not in_place((x, w, b), need, rows)
    )
    most = max(1, most)
    chunks = -(-rows // most)
    return Plan(strategy, _multiple(-(-rows // max(chunks, 1)), here.align) if chunks > 1 else max(rows, 1), classes)


@contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Take this strategy meanwhile, whatever the model says."""
    before = os.environ.get(_ENVIRONMENT)
    os.environ[_ENVIRONMENT] = strategy
    try:
        yield
    finally:
        del os.environ[_ENVIRONMENT]
        if before is not None:
            os.environ[_ENVIRONMENT] = before


def in_place(layer: Layer, needs: Needs, rows: int) -> bool:
    """Return whether the logits of all rows fit into the memory that the gradient of the weight will take."""
    return needs[1] and _stride(rows) <= layer[1].shape[1]


def describe(layers: Sequence[Sequence[Tensor | None]]) -> str:
    """Say which strategy a call takes, of layers whose input may have any leading dimensions."""
    flat: list[Layer] = []
    for input, weight, bias in layers:
        assert input is not None and weight is not None
        flat.append((input.new_empty(()).expand(input.shape[:-1].numel(), input.shape[-1]), weight, bias))
    needs = [[t is not None and t.requires_grad and torch.is_grad_enabled() for t in layer] for layer in layers]
    strategy, rows, classes = plan(flat, needs)
    if strategy == "lean":
        return f"lean: without logits, gradients {classes} classes at a time"
    return f"in chunks of {rows} rows of logits"


def _faster(layers: Sequence[Layer], needs: Sequence[Needs], here: Machine) -> str:
    chunks = lean = 0.0
    for (input, weight, _), need in zip(layers, needs, strict=True):
        size = input.element_size()
        product = 2 * weight.shape[1] / here.flops[size]  # all for one logit
        back, moved = sum(need[:2]), size / here.bandwidth
        # Logits are written and read; with gradients read and written again, and read by each product.
        chunks += (1 + back) * product + (4 + back if any(need) else 2) * moved
        lean += (1 + any(need)) * product / here.share[size] + back * product + (1 + back if any(need) else 0) * moved
    return "lean" if lean < chunks else "chunks"


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _block(classes: int, features: int, here: Machine) -> int:
    """Return how many rows of the weight's gradient are made at a time, about a sixteenth of them.

    Up to an eighth more where that fills the multiprocessors better: of 128256 x 4096 a block of 8064 rows has 1008
    tiles for 132 multiprocessors and takes as long as one of 8448, which has 1056.
    """
    least = max(1, -(-classes // (16 * here.align)))

    def turns(block: int) -> int:
        """Of a multiprocessor, for all blocks of so many tiles."""
        whole, rest = divmod(-(-classes // here.align), block)
        across = -(-features // 256)
        return whole * -(-block * across // here.multiprocessors) + -(-rest * across // here.multiprocessors)

    return min(classes, here.align * min(range(least, least + least // 8 + 1), key=turns))


def _stride(rows: int) -> int:
    """Between two classes of transposed logits: the library's products, and 16-byte accesses, want it even."""
    return _multiple(rows, 16)


def precision() -> str:
    """Return how `logits_tile` multiplies: TF32 where PyTorch's setting lets its own products of float32 be so."""
    if INTERPRETED:
        return "wide"
    return "tf32" if tf32() else "ieee"


class Sweep:
    """The transposed logits of one layer, part by part, and what their gradients add up to."""

    def __init__(self, layer: Layer, needs: Needs, plan: Plan, absent: Tensor | None = None):
        """Allocate what the plan takes for this layer.

        `absent` says which rows, (rows, 1), have no part in any gradient, whatever the products make of them: 0 * NaN
        is NaN.
        """
        self.input, self.weight, self.bias = layer
        self.needs, self.plan, self.absent = needs, plan, absent
        if absent is not None and needs[1]:
            self.input = self.input.masked_fill(absent, 0)
        self.rows, self.features = self.input.shape
        self.classes = self.weight.shape[0]
        self.block = self.classes
        chunked, blocked = plan.rows < self.rows, plan.classes < self.classes
        wide = compute_dtype(self.input)
        new = self.input.new_empty
        self.lean = plan.strategy == "lean"
        self.whole = not self.lean and in_place(layer, needs, self.rows)
        self.totals: list[Tensor | None] = [None, None, None]
        # What several parts add to is summed in float32.
        if needs[0]:
            self.totals[0] = new(self.input.shape, dtype=wide if blocked else None)
        if needs[2]:
            self.totals[2] = self.input.new_zeros(self.classes, dtype=wide)
        if self.whole:
            self._share_memory()
            return
        if needs[1]:
            self.totals[1] = new(self.weight.shape, dtype=wide if chunked else None)
        if not self.lean or any(needs):
            self._keep_logits(new((plan.classes, _stride(min(plan.rows, self.rows)))), min(plan.rows, self.rows))

    def _share_memory(self) -> None:
        """Put the logits behind the gradient of the weight, overlapping it.

        The gradient of block k of the classes is written where gradients of the logits of blocks before k were, since
        a class has `stride` <= `features` logits and the logits end a block behind the gradient.
        """
        stride = _stride(self.rows)
        self.block = _block(self.classes, self.features, machine(self.input.device))
        logits = self.classes * stride
        start = _multiple((self.classes + self.block) * self.features - logits, 128)
        memory = self.input.new_empty(start + logits)
        self._keep_logits(memory[start:].view(self.classes, stride), self.rows)
        self.totals[1] = memory[: self.weight.numel()].view(self.weight.shape)

    def _keep_logits(self, logits: Tensor, rows: int) -> None:
        """Keep this memory for the logits of so many rows, with zeros behind those of each class.

        On CPUs with AMX oneDNN multiplies 16-bit operands by tiles, and reads what is behind their rows along: a NaN
        there, times 0, is a NaN of the product. What it costs a GPU is one small launch, 4 MB for 128256 classes.
        """
        self.logits = logits
        logits[:, rows:].zero_()

    def part(self, begin: int, end: int, first: int, last: int) -> Tensor:
        """Return the memory of the transposed logits of these rows and classes, which other parts may share."""
        begin, end = (begin, end) if self.whole else (0, end - begin)
        return self.logits[: last - first, begin:end]

    def make(self, begin: int, end: int) -> Tensor:
        """Return the transposed logits of some rows, made by the library."""
        if self.whole and begin:
            return self.logits[:, begin:end]
        last = self.rows if self.whole else end
        out, x = self.logits[:, : last - begin], self.input[begin:last]
        if self.bias is None:
            torch.mm(self.weight, x.t(), out=out)
        else:
            torch.addmm(self.bias[:, None], self.weight, x.t(), out=out)
        return out[:, : end - begin]

    def take(self, begin: int, end: int, first: int, last: int, gradient: Tensor) -> None:
        """Take the gradient of the transposed logits of these rows and classes to the layer."""
        if self.whole:
            if end < self.rows:
                return  # all rows at once
            begin, gradient = 0, self.logits[:, : self.rows]
        by_input, by_weight, by_bias = self.totals
        if by_bias is not None:
            by_bias[first:last] += gradient.sum(1, dtype=by_bias.dtype)
        if by_input is not None:
            _add_product(by_input[begin:end], gradient.t(), self.weight[first:last], first == 0)
        if by_weight is not None:  # last, since it may take the gradient's memory
            for k in range(first, last, self.block):
                stop = min(last, k + self.block)
                _add_product(by_weight[k:stop], gradient[k - first : stop - first], self.input[begin:end], begin == 0)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of input, weight and bias; without elements where not needed."""
        if not self.rows and self.totals[1] is not None:
            self.totals[1].zero_()
        if self.absent is not None and self.totals[0] is not None:
            self.totals[0].masked_fill_(self.absent, 0)
        return tuple(self.input.new_empty(0) if total is None else total.to(self.input.dtype) for total in self.totals)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Write left @ right to `total`, or add it; in the dtype of `total`, whether float32 or the operands' own."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else torch.addmm(total, left, right, out=total)
    elif left.device.type == "cuda" and torch.version.hip is None:
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # where torch has no product with a wider result: exact as well, at float32's rate
        wide = right.to(total.dtype)
        step = max(1, (1 << 22) // max(1, left.shape[1]))
        for k in range(0, left.shape[0], step):
            _add_product(total[k : k + step], left[k : k + step].to(total.dtype), wide, first)
