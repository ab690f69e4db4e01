"""Losses of a linear layer in Triton: the strategy of a call, and the products that the library computes.

Logits are transposed: they have a row for each class. So the classes of a block are contiguous, and the gradient of the
weight, whose rows are classes too, can overwrite the logits block by block.

TLKERNELS_LINEAR=chunks or lean in the environment sets the strategy, for tests; see `plan`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import INTERPRETED, architecture, tf32

_ENVIRONMENT = "TLKERNELS_LINEAR"
STRATEGIES = ("chunks", "lean")


class Machine(NamedTuple):
    """What the choice of a strategy depends on."""

    architecture: str
    """A pattern, such as "sm_9*"."""
    flops: dict[int, float]
    """Operations of the library's products in a second (a product and a sum are 2), by bytes of an element."""
    share: dict[int, float]
    """The share of that rate that the products of our kernels reach."""
    bandwidth: float
    """Bytes read and written in a second."""
    chunk: int
    """Bytes of logits that chunks may take in addition to the gradient of the weight."""
    align: int
    """Rows and classes of chunks and blocks are multiples of this."""
    multiprocessors: int
    """Each computes a tile of the library's products at a time, `align` x 256; 1 if that is not known."""
    programs: int
    """Programs of a sweep over all classes: several for each multiprocessor of the largest of these GPUs."""


_SHARE = {2: 0.65, 4: 0.5, 8: 0.3}
_CHUNK = 256 << 20
# 2026-11-21. sm_9*: flops of 2 bytes and bandwidth as measured on an H200. All others are vendors' figures times 0.8,
# and the shares are estimates; an error in them moves the hidden size from which chunks are faster. With 256 MiB a
# chunk of 128256 classes has 1046 rows, with which the library's products reach their full rate. The interpreter's row
# gives small tests several chunks and blocks.
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
    name = architecture(device)
    return next(row for row in _MACHINES if fnmatchcase(name, row.architecture))


Layer = tuple[Tensor, Tensor, Tensor | None]
"""Input, weight and bias."""


class Needs(NamedTuple):
    """Which gradients of a layer are needed."""

    input: bool
    weight: bool
    bias: bool


class Plan(NamedTuple):
    """What a sweep has at a time: the logits of `rows` rows for all classes, or of all rows for `classes` classes."""

    strategy: str
    rows: int
    classes: int


def plan(layers: Sequence[Layer], needs: Sequence[Needs], only: str | None = None) -> Plan:
    """Return the plan of a call, with the strategy `only` if given.

    TLKERNELS_LINEAR=chunks or lean in the environment overrides the choice, for tests.

    Chunks: the library computes the logits of some rows, kernels replace them by their gradients, and the library
    multiplies those by the layer's tensors. Lean: kernels compute the logits tile by tile, twice if gradients are
    needed, and store only a block of gradients. A model of the time chooses; it depends on the shapes alone.
    """
    input, weight, _ = layers[0]
    chosen = only or strategy(layers, needs)
    gpu = machine(input.device)
    (rows, _), classes = input.shape, weight.shape[0]
    if chosen == "lean":
        # A block of gradients is no larger than the input, or what stays in a cache.
        most = max(max(x.numel() for x, _, _ in layers), gpu.chunk // 8 // input.element_size())
        return Plan(chosen, max(rows, 1), min(classes, _multiple(max(1, most // max(rows, 1)), gpu.align)))
    if all(in_place(layer, need, rows) for layer, need in zip(layers, needs, strict=True)):
        return Plan(chosen, max(rows, 1), classes)
    # Each further chunk reads and writes the weight's gradient once more, so large chunks are faster. If the weight
    # needs a gradient, chunks may be of its size: rounding it at the end takes as much memory.
    most = min(
        max(gpu.chunk // w.element_size(), w.numel() if need.weight else 0) // classes
        for (x, w, b), need in zip(layers, needs, strict=True)
        if not in_place((x, w, b), need, rows)
    )
    most = max(1, most)
    chunks = -(-rows // most)
    return Plan(chosen, _multiple(-(-rows // max(chunks, 1)), gpu.align) if chunks > 1 else max(rows, 1), classes)


@contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Set TLKERNELS_LINEAR to this strategy within the context."""
    before = os.environ.get(_ENVIRONMENT)
    os.environ[_ENVIRONMENT] = strategy
    try:
        yield
    finally:
        del os.environ[_ENVIRONMENT]
        if before is not None:
            os.environ[_ENVIRONMENT] = before


def in_place(layer: Layer, needs: Needs, rows: int) -> bool:
    """Return whether the logits of all rows fit into the memory of the weight's gradient."""
    _, weight, _ = layer
    return needs.weight and _stride(rows) <= weight.shape[1]


def describe(layers: Sequence[Sequence[Tensor | None]], num_valid: int | None = None, only: str | None = None) -> str:
    """Describe a call's strategy, for `explain`; the layers' inputs may have any leading dimensions."""
    flat: list[Layer] = []
    for input, weight, bias in layers:
        assert input is not None and weight is not None
        rows = input.shape[:-1].numel() if num_valid is None else num_valid
        flat.append((input.new_empty(()).expand(rows, input.shape[-1]), weight, bias))
    grad = torch.is_grad_enabled()
    needs = [Needs(*(t is not None and t.requires_grad and grad for t in layer)) for layer in layers]
    chosen, rows, classes = plan(flat, needs, only)
    if chosen == "lean":
        return f"lean: without logits, gradients {classes} classes at a time"
    return f"in chunks of {rows} rows of logits"


def strategy(layers: Sequence[Layer], needs: Sequence[Needs]) -> str:
    """Return the strategy of a call, which does not depend on the number of rows."""
    forced_to = os.environ.get(_ENVIRONMENT)
    if forced_to and forced_to not in STRATEGIES:
        raise ValueError(f"{_ENVIRONMENT}: expected one of {STRATEGIES}, got {forced_to!r}")
    return forced_to or _faster(layers, needs, machine(layers[0][0].device))


def _faster(layers: Sequence[Layer], needs: Sequence[Needs], gpu: Machine) -> str:
    chunks = lean = 0.0
    for (input, weight, _), need in zip(layers, needs, strict=True):
        size = input.element_size()
        product = 2 * weight.shape[1] / gpu.flops[size]  # seconds for one logit
        back, moved = need.input + need.weight, size / gpu.bandwidth
        # Logits are written and read; with gradients they are read and written again, and each product reads them.
        chunks += (1 + back) * product + (4 + back if any(need) else 2) * moved
        lean += (1 + any(need)) * product / gpu.share[size] + back * product + (1 + back if any(need) else 0) * moved
    return "lean" if lean < chunks else "chunks"


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _block(classes: int, features: int, gpu: Machine) -> int:
    """Return how many rows of the weight's gradient are computed at a time, about a sixteenth of them.

    Up to an eighth more if that fills the multiprocessors better: a block of 8064 rows of 128256 x 4096 has 1008 tiles
    for 132 multiprocessors, and takes as long as one of 8448 rows, which has 1056.
    """
    least = max(1, -(-classes // (16 * gpu.align)))

    def turns(block: int) -> int:
        """Return how many tiles a multiprocessor computes, for all blocks of `block` tiles of rows."""
        whole, rest = divmod(-(-classes // gpu.align), block)
        across = -(-features // 256)
        return whole * -(-block * across // gpu.multiprocessors) + -(-rest * across // gpu.multiprocessors)

    return min(classes, gpu.align * min(range(least, least + least // 8 + 1), key=turns))


def _stride(rows: int) -> int:
    """Return the stride between classes of transposed logits, a multiple of 16 for the library and 16-byte accesses."""
    return _multiple(rows, 16)


def precision() -> str:
    """Return how `logits_tile` multiplies float32: in TF32 if PyTorch's setting allows it."""
    if INTERPRETED:
        return "wide"
    return "tf32" if tf32() else "ieee"


_SPLITS = 64  # of a row at most: one program joins them


def operands(layer: Layer, logits: Tensor | None, begin: int, end: int) -> tuple[Any, ...]:
    """Return the arguments of `logits_tile` from `logits` to `bias`, for rows `begin` to `end`."""
    input, weight, bias = layer
    if logits is None:
        return None, 0, input[begin:end], *input.stride(), weight, *weight.stride(), bias
    return logits, logits.stride(0), None, 0, 0, None, 0, 0, None


def split(device: torch.device, blocks: int, tiles: int) -> tuple[int, int]:
    """Return how many programs share the tiles of each block of rows, and how many tiles each has."""
    each = -(-tiles // max(1, min(_SPLITS, machine(device).programs // blocks)))
    return -(-tiles // each), each


class Sweep:
    """The transposed logits of one layer, part by part, and the gradients of the layer."""

    def __init__(self, layer: Layer, needs: Needs, plan: Plan, ignored: Tensor | None = None):
        """Allocate the memory of the plan for this layer.

        `ignored`, (rows, 1), are the rows without a gradient, even if they have a NaN: 0 * NaN is NaN.
        """
        self.input, self.weight, self.bias = layer
        self.needs, self.plan, self.ignored = needs, plan, ignored
        if plan.strategy != "lean" and self.input.stride(-1) != 1:
            # As `masked_fill` gives it to the backward: the library may round logits of another layout otherwise, and
            # then the normaliser of the forward does not fit them.
            self.input = self.input.contiguous()
        if ignored is not None and needs.weight:
            self.input = self.input.masked_fill(ignored, 0)
        self.rows, self.features = self.input.shape
        self.classes = self.weight.shape[0]
        self.block = self.classes
        chunked, blocked = plan.rows < self.rows, plan.classes < self.classes
        wide = compute_dtype(self.input)
        new = self.input.new_empty
        self.lean = plan.strategy == "lean"
        self.whole = not self.lean and in_place(layer, needs, self.rows)
        self.by_input: Tensor | None = None
        self.by_weight: Tensor | None = None
        self.by_bias: Tensor | None = None
        # Sums of several parts are in float32.
        if needs.input:
            self.by_input = new(self.input.shape, dtype=wide if blocked else None)
        if needs.bias:
            self.by_bias = self.input.new_zeros(self.classes, dtype=wide)
        if self.whole:
            self._share_memory()
            return
        if needs.weight:
            self.by_weight = new(self.weight.shape, dtype=wide if chunked else None)
        if not self.lean or any(needs):
            self._keep_logits(new((plan.classes, _stride(min(plan.rows, self.rows)))), min(plan.rows, self.rows))

    def _share_memory(self) -> None:
        """Put the logits into the memory of the weight's gradient, so that they end one block after it.

        The gradient of block k of the classes then overwrites only logits of blocks before k, since a class has
        `stride` <= `features` logits.
        """
        stride = _stride(self.rows)
        self.block = _block(self.classes, self.features, machine(self.input.device))
        logits = self.classes * stride
        start = _multiple((self.classes + self.block) * self.features - logits, 128)
        memory = self.input.new_empty(start + logits)
        self._keep_logits(memory[start:].view(self.classes, stride), self.rows)
        self.by_weight = memory[: self.weight.numel()].view(self.weight.shape)

    def _keep_logits(self, logits: Tensor, rows: int) -> None:
        """Use this memory for the logits of `rows` rows, with zeros after those of each class.

        On CPUs with AMX, oneDNN multiplies 16-bit operands by tiles, and also reads what follows a row: a NaN there,
        times 0, is a NaN in the product. On a GPU this costs one small launch, 4 MB for 128256 classes.
        """
        self.logits = logits
        logits[:, rows:].zero_()

    def memory(self, begin: int, end: int, first: int, last: int) -> Tensor:
        """Return the memory of the transposed logits of these rows and classes; other parts may share it."""
        begin, end = (begin, end) if self.whole else (0, end - begin)
        return self.logits[: last - first, begin:end]

    def compute(self, begin: int, end: int) -> Tensor:
        """Return the transposed logits of some rows, computed by the library."""
        if self.whole and begin:
            return self.logits[:, begin:end]
        last = self.rows if self.whole else end
        out, x = self.logits[:, : last - begin], self.input[begin:last]
        if self.bias is None:
            torch.mm(self.weight, x.t(), out=out)
        else:
            torch.addmm(self.bias[:, None], self.weight, x.t(), out=out)
        return out[:, : end - begin]

    def backpropagate(self, begin: int, end: int, first: int, last: int, gradient: Tensor) -> None:
        """Add to the layer's gradients what the gradient of the transposed logits of these rows and classes gives."""
        if self.whole:
            if end < self.rows:
                return  # the last part has all rows
            begin, gradient = 0, self.logits[:, : self.rows]
        if self.by_bias is not None:
            self.by_bias[first:last] += gradient.sum(1, dtype=self.by_bias.dtype)
        if self.by_input is not None:
            _add_product(self.by_input[begin:end], gradient.t(), self.weight[first:last], first == 0)
        if self.by_weight is not None:  # last, since it may overwrite the gradient
            for k in range(first, last, self.block):
                stop = min(last, k + self.block)
                block = gradient[k - first : stop - first]
                _add_product(self.by_weight[k:stop], block, self.input[begin:end], begin == 0)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of input, weight and bias; those that are not needed have no elements."""
        if not self.rows and self.by_weight is not None:
            self.by_weight.zero_()
        if self.ignored is not None and self.by_input is not None:
            self.by_input.masked_fill_(self.ignored, 0)
        totals = self.by_input, self.by_weight, self.by_bias
        return tuple(self.input.new_empty(0) if total is None else total.to(self.input.dtype) for total in totals)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Write left @ right to `total`, or add it, in the dtype of `total`: float32 or the operands'."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else torch.addmm(total, left, right, out=total)
    elif left.device.type == "cuda" and torch.version.hip is None:
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # torch has no product with a wider result: as exact, at float32's rate
        wide = right.to(total.dtype)
        step = max(1, (1 << 22) // max(1, left.shape[1]))
        for k in range(0, left.shape[0], step):
            _add_product(total[k : k + step], left[k : k + step].to(total.dtype), wide, first)
