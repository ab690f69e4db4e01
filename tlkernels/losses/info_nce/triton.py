"""InfoNCE in Triton; nt_xent and sup_con are calls of it too. What the ops mean is in `ops.py`.

Forward: one sweep over the matrix of similarities finds the log-sum-exp of rows, and with `symmetric` of columns, in
the same tiles. Backward: another sweep, panel by panel, and the two products with each panel. That is four products of
N·K·D for the symmetric loss, and none of them twice; `_core/triton_similarity.py` has the model. Where the matrix is
symmetric (nt_xent, sup_con) the tiles from the diagonal on give the statistics of all rows, and one product the
gradient: 2.5.

What a program finds of its tile goes to a place of its own, and `fold` joins these in a fixed order: no atomics. That
is 4·P·K / BM bytes a statistic, for a panel of P rows.

The positive is kept apart from the sum of exponentials, as on CPU, so that neither a small loss nor its gradient is a
difference of large numbers. Exponentials are of base 2; `peak` and `top` are logits in that base.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, launch
from tlkernels._core.triton.similarity import (
    CLAIMS,
    SPILLS,
    TILES,
    Embeddings,
    for_options,
    panel_rows,
    precision,
    prepare,
    product,
    range_of_float16,
    tiles_of,
    write_gradient,
)
from tlkernels.losses.info_nce.triton_kernels import (
    ALL,
    LABEL,
    NO_SET,
    fold,
    gradient,
    gradient_at_positives,
    losses,
    own_gradients,
    own_similarities,
    positives,
    slopes,
    statistics,
)

# By reasoning on 2026-11-21, no GPU at hand: all are small beside the sweeps. Vectors: a few programs for every
# multiprocessor at 65536 rows. Folds: the tiles' statistics lie apart, so a program reads lines of 32 or more items.
_VECTORS = Table(
    "contrastive vectors",
    Config("interpreter", 0, None, {"BI": 64}, 1),
    Config("*", 0, None, {"BI": 256}, 4),
)
_FOLDS = Table(
    "contrastive folds",
    Config("interpreter", 0, None, {"BT": 4, "BI": 64}, 1),
    Config("*", 0, None, {"BT": 16, "BI": 64}, 4),
)
_POSITIVES = Table(
    "contrastive positives",
    Config("interpreter", 0, None, {"BI": 16, "BD": 32}, 1),
    Config("*", 0, None, {"BI": 8, "BD": 256}, 4),
)
_OWN = Table(
    "contrastive own negatives",
    Config("interpreter", 0, None, {"BN": 32, "BD": 32}, 1),
    Config("*", 0, None, {"BN": 16, "BD": 128}, 4),
)
STATISTICS = 5  # peak, sum, the positive's similarity, sum and number of the set; the third of the first direction only


class _Part(NamedTuple):
    """Some columns of the matrix, with one launch a panel."""

    columns: Embeddings | None
    known: Tensor | None
    """The similarities, where they are not computed tile by tile."""
    size: int
    first: int
    keys: bool


class _Call:
    """The tensors of a call as the kernels take them."""

    def __init__(
        self, query: Tensor, key: Tensor | None, negatives: Tensor | None, logit_scale: Tensor, target: Tensor | None,
        mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, own: int, by_label: bool,
        symmetric: bool, normalize: bool, label_smoothing: float,
    ):  # fmt: skip
        given = query, key, negatives
        self.given = given
        self.compute = compute_dtype(*given)
        dtype = query.dtype
        for tensor in given[1:]:
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        self.precision = precision(dtype)
        self.rows = query.shape[0]
        self.paired, self.symmetric = key is None, symmetric
        self.scale = logit_scale.to(query.device)
        self.own, self.smoothing = own, label_smoothing
        self.set = (LABEL if by_label else ALL if label_smoothing > 0 else NO_SET).value
        keys = self.rows if key is None else key.shape[0]
        self.config = TILES.find(query.device, dtype.itemsize, max(self.rows * keys, 1))
        if own >= 0 or mask is not None or query_ids is not None or normalize or self.set != NO_SET.value:
            self.config = for_options(self.config, square=self.paired)
        self.tile = {name: self.config.meta[name] for name in ("BM", "BN", "BK")}
        if self.paired:  # a tile beyond the diagonal gives the statistics of its columns as those of rows
            self.tile["BN"] = self.tile["BM"]
        self.query = prepare(query, dtype, normalize, self.config)
        self.key = self.query if key is None else prepare(key, dtype, normalize, self.config)
        self.parts = [_Part(self.key, None, keys, 0, True)]
        self.negatives: Embeddings | None = None
        self.own_negatives: Tensor | None = None
        if negatives is not None and negatives.dim() == 2:
            self.negatives = prepare(negatives, dtype, normalize, self.config)
            self.parts.append(_Part(self.negatives, None, negatives.shape[0], keys, False))
        elif negatives is not None:
            self.own_negatives = negatives
            self.own_norms = negatives.new_empty(negatives.shape[:2] if normalize else (0,), dtype=self.compute)
            known = self._own_similarities(negatives)
            self.parts.append(_Part(None, known, negatives.shape[1], keys, False))
        self.classes = keys + sum(part.size for part in self.parts[1:])
        self.target = None if target is None else target.long().contiguous()
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.query_ids = None if query_ids is None else query_ids.long().contiguous()
        self.key_ids = self.query_ids if key_ids is None else key_ids.long().contiguous()
        self.step = panel_rows(self.rows, query.shape[1], self.config)

    def _own_similarities(self, negatives: Tensor) -> Tensor:
        rows, count, features = negatives.shape
        out = negatives.new_empty((rows, count), dtype=self.compute)
        config = _OWN.find(negatives.device, 0, count)
        x, norms = self.query.x, self.query.norms
        args = x, norms, negatives, out, self.own_norms, count, features, x.stride(0), *negatives.stride()
        launch(own_similarities, (rows, tiles_of(count, config.meta["BN"])), *args, config=config)
        return out

    def panels(self) -> Iterator[tuple[int, int]]:
        """Yield where each panel begins and ends."""
        for begin in range(0, self.rows, self.step):
            yield begin, min(begin + self.step, self.rows)

    def tiles(self, part: _Part) -> int:
        """Return how many tiles the columns of a part are."""
        return tiles_of(part.size, self.tile["BN"])

    def matrix(self, part: _Part, begin: int, end: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Return the tensors of some rows of a part, and the numbers that go with them."""
        known, columns = part.known, part.columns
        x = self.query.x
        if columns is None:
            assert known is not None
            known = known[begin:end]
        elif self.compute == torch.float64:  # no tensor core multiplies them as float64; the library does what there is
            known = product(x[begin:end], columns.x.T)
        norms = (None, None) if columns is None else (self.query.norms, columns.norms)
        tensors: tuple[Tensor | None, ...]
        if known is not None:
            strides, tensors = (0, 0, 0, known.stride(0)), (None, None, known)
        else:
            assert columns is not None
            strides, tensors = (x.shape[1], x.stride(0), columns.x.stride(0), 0), (x, columns.x, None)
        mask = None
        if self.mask is not None and (part.keys or self.mask.shape[1] == self.classes):
            mask = self.mask[:, part.first :]
        ids = (self.query_ids, self.key_ids) if part.keys else (None, None)
        mask_strides = (0, 0) if mask is None else mask.stride()
        numbers = begin, end, part.size, part.first, self.classes, self.own, *strides, *mask_strides
        return (*tensors, *norms, self.scale, self.target, mask, *ids), numbers

    def launch(self, kernel: Any, part: _Part, tiles: int, *args: Any, **constants: Any) -> None:
        """Launch a kernel on tiles of a part."""
        known = {"SET": self.set, "OWN": part.keys and self.own >= 0, "PRECISION": self.precision}
        launch(kernel, (tiles,), *args, config=self.config, **known, **self.tile, **constants)

    def vectors(self, kernel: object, *args: object, **constants: object) -> None:
        """Launch a kernel on numbers for each row."""
        config = _VECTORS.find(self.query.x.device, 0, self.rows)
        launch(kernel, (tiles_of(self.rows, config.meta["BI"]),), *args, config=config, **constants)


@torch.no_grad()
def forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, and the state."""
    call = _Call(query, *arguments)
    rows, compute = call.rows, call.compute
    state = query.new_zeros((1 + call.symmetric, STATISTICS, rows), dtype=compute)  # some are not asked for
    loss = query.new_empty((rows,), dtype=compute)
    if rows == 0:
        return loss, state
    if call.set != LABEL.value:
        _positives(call, state[0, 2])
    kinds = 4 if call.set != NO_SET.value else 2
    row_tiles = tiles_of(min(call.step, rows), call.tile["BM"])
    tiles = sum(map(call.tiles, call.parts))
    by_row = query.new_empty((tiles, kinds, min(call.step, rows)), dtype=compute)
    columns = state[1] if call.symmetric else state[0]
    by_column = None
    if call.symmetric or call.paired:
        by_column = query.new_empty((row_tiles, kinds, call.parts[0].size), dtype=compute)
    for begin, end in call.panels():
        panel_tiles = tiles_of(end - begin, call.tile["BM"])
        offset = 0
        skipped = begin // call.tile["BM"] if call.paired else 0
        for part in call.parts:
            tensors, numbers = call.matrix(part, begin, end)
            there = by_column if part.keys else None
            strides = (*by_row.stride()[:2], *((0, 0) if there is None else there.stride()[:2]))
            grid = panel_tiles * (call.tiles(part) - skipped)
            args = *tensors, by_row, there, *numbers, *strides, skipped, panel_tiles, offset
            call.launch(statistics, part, grid, *args, PAIRED=call.paired)
            offset += call.tiles(part)
        if by_column is not None:
            _fold(call, by_column, columns, 0, call.parts[0].size, panel_tiles, skipped, begin == 0, -call.paired)
        _fold(call, by_row, state[0], begin, end - begin, tiles, 0, not call.paired, int(call.paired))
    other = state[1] if call.symmetric else None
    call.vectors(losses, state[0], other, state[0, 2], call.scale, loss, rows, call.smoothing, SET=call.set)
    return loss, state


def _positives(call: _Call, out: Tensor) -> None:
    config = _POSITIVES.find(out.device, 0, call.rows)
    query, key, negatives = call.query, call.key, call.negatives
    known = call.parts[-1].known
    tensors = query.x, key.x, negatives and negatives.x, known
    norms = query.norms, key.norms, negatives and negatives.norms
    strides = query.x.stride(0), key.x.stride(0), 0 if negatives is None else negatives.x.stride(0)
    numbers = call.rows, call.parts[0].size, call.classes, query.x.shape[1]
    grid = (tiles_of(call.rows, config.meta["BI"]),)
    launch(positives, grid, *tensors, *norms, call.target, out, *numbers, *strides, config=config)


def _fold(
    call: _Call, parts: Tensor, state: Tensor, first: int, items: int, tiles: int, first_tile: int, fresh: bool,
    side: int,
) -> None:  # fmt: skip
    config = _FOLDS.find(parts.device, 0, items)
    args = parts, state, first, items, tiles, first_tile, *parts.stride()[:2], state.stride(0)
    constants = {"SET": call.set, "FRESH": fresh, "SIDE": side, "TILE": call.tile["BM"]}
    launch(fold, (tiles_of(items, config.meta["BI"]),), *args, config=config, **constants)


@torch.no_grad()
def backward(
    grad_loss: Tensor, state: Tensor, query: Tensor, key: Tensor | None, negatives: Tensor | None, logit_scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients by query, key, negatives and scale; one that is not wanted has no elements, or is 0."""
    *arguments, wanted = rest
    call = _Call(query, key, negatives, logit_scale, *arguments)
    grads = [
        query.new_empty((0,)) if tensor is None or not want else tensor.new_zeros(tensor.shape)
        if call.rows == 0 else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, want in zip(call.given, wanted, strict=False)
    ]  # fmt: skip
    by_scale = torch.zeros_like(logit_scale)
    if call.rows == 0:
        return *grads, by_scale
    extra = range_of_float16(grad_loss) if call.query.x.dtype == torch.float16 else None
    row_slopes, column_slopes = _slopes(call, grad_loss, state, extra)
    tiles = [tiles_of(min(call.step, call.rows), call.tile["BM"]) * call.tiles(part) for part in call.parts]
    # Of every panel's tiles, then of the positives.
    sums = query.new_zeros((len(list(call.panels())) * sum(tiles) + call.rows,), dtype=call.compute)
    by_tile = iter(sums[: -call.rows].view(-1, sum(tiles)))
    memory = [
        query.new_empty(
            (min(call.step, call.rows), tiles_of(part.size, 64) * 64),
            dtype=call.compute if part.columns is None else call.query.x.dtype,
        )
        for part in call.parts
    ]
    totals: list[Tensor | None] = [None, None]
    for begin, end in call.panels():
        total, of_panel = None, next(by_tile)
        for k, part in enumerate(call.parts):
            tensors, numbers = call.matrix(part, begin, end)
            there = column_slopes if part.keys else None
            panel_tiles = tiles_of(end - begin, call.tile["BM"])
            of_part = of_panel[sum(tiles[:k]) :] if wanted[3] else None
            args = (
                *tensors,
                row_slopes,
                there,
                memory[k],
                of_part,
                *numbers,
                call.rows,
                memory[k].stride(0),
                panel_tiles,
            )
            call.launch(gradient, part, panel_tiles * call.tiles(part), *args)
            if call.set != LABEL.value:
                of_positives = sums[-call.rows :] if wanted[3] else None
                slopes_there = row_slopes, there, state[0, 2]
                _gradient_at_positives(call, part, slopes_there, memory[k], of_positives, begin, end)
            panel = memory[k][: end - begin, : part.size]
            if part.columns is None:
                _own_gradients(call, part, memory[k], extra, total, grads[2] if wanted[2] else None, begin, end)
                continue
            if wanted[0]:
                total = product(panel, part.columns.x, total)
            if wanted[k + 1] and not call.paired:
                totals[k] = product(panel.T, call.query.x[begin:end], totals[k])
        if total is not None:
            write_gradient(call.query, total, call.scale, extra, grads[0], begin)
    for of, whole, grad in zip((call.key, call.negatives), totals, grads[1:], strict=True):
        if of is not None and whole is not None:
            write_gradient(of, whole, call.scale, extra, grad)
    if wanted[3]:  # paired: each tile has both directions' gradients
        moment = sums.sum(dtype=torch.float64) / (1 + call.paired)
        by_scale = (moment if extra is None else moment / extra).to(logit_scale)
    return *grads, by_scale


def _slopes(call: _Call, upstream: Tensor, state: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor | None]:
    def of(direction: int) -> Tensor:
        out = state.new_empty((4, call.rows))
        part = 0.5 if call.symmetric else 1.0
        numbers = call.rows, call.classes, upstream.stride(0), call.smoothing, part
        tensors = state[direction], state[0, 2], call.target, call.scale, upstream, extra, out
        call.vectors(slopes, *tensors, *numbers, SET=call.set)
        return out

    rows = of(0)
    return rows, of(1) if call.symmetric else rows if call.paired else None


def _gradient_at_positives(
    call: _Call, part: _Part, slopes: tuple[Tensor | None, ...], panel: Tensor, by_scale: Tensor | None, begin: int,
    end: int,
) -> None:  # fmt: skip
    norms = (None, None) if part.columns is None else (call.query.norms, part.columns.norms)
    tensors = *slopes, call.target, *norms, panel, by_scale
    config = _VECTORS.find(panel.device, 0, end - begin)
    numbers = begin, end, part.first, part.size, call.rows, panel.stride(0)
    launch(gradient_at_positives, (tiles_of(end - begin, config.meta["BI"]),), *tensors, *numbers, config=config)


def _own_gradients(
    call: _Call, part: _Part, panel: Tensor, extra: Tensor | None, total: Tensor | None, grad: Tensor | None,
    begin: int, end: int,
) -> None:  # fmt: skip
    negatives = call.own_negatives
    assert negatives is not None
    if total is None and grad is None:
        return
    config = _OWN.find(negatives.device, 0, part.size)
    x, features = call.query.x, negatives.shape[2]
    tensors = x, call.query.norms, negatives, part.known, call.own_norms, panel, call.scale, extra, total, grad
    strides = x.stride(0), *negatives.stride(), panel.stride(0), 0 if total is None else total.stride(0)
    grid = (end - begin, tiles_of(features, config.meta["BD"]))
    launch(own_gradients, grid, *tensors, begin, part.size, features, *strides, config=config)


def _meta(
    n: int, d: int, dtype: torch.dtype, *, negatives: tuple[int, ...] | None = None, paired: bool = False,
    target: bool = False, mask: bool = False, ids: bool = False, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    numbers = empty(n, dtype=torch.int64)
    values = {"own": -1, "by_label": False, "symmetric": False, "normalize": False, "label_smoothing": 0.0, **options}
    return (
        empty(n, d), None if paired else empty(n, d), None if negatives is None else empty(*negatives),
        empty(dtype=torch.float32), numbers if target else None, empty(n, n, dtype=torch.bool) if mask else None,
        numbers if ids else None, None, *values.values(),
    )  # fmt: skip


def _both(call: tuple[Any, ...]) -> None:
    loss, state = forward(*call)
    backward(loss, state, *call, [True] * 4)


_SPILLS_OF_LABELS = {
    ("gradient", "sm_100", "spills: 20,"): "twenty words once a tile, where all 255 registers are in use",
    ("statistics", "gfx942", "spills: 12"): "twelve words once a tile",
}


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the tables, and the options with most in a kernel."""
    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    views = {"paired": True, "own": 0, "normalize": True}
    everything = {"mask": True, "symmetric": True, "normalize": True, "label_smoothing": 0.1}
    for name, n, d, dtype, options in (
        ("clip", 65536, 1024, bf16, {"symmetric": True}),
        ("clip-small", 512, 512, bf16, {"symmetric": True}),
        ("clip", 65536, 1024, f16, {"symmetric": True}),
        ("clip", 8192, 384, f32, {"symmetric": True}),
        ("clip", 8192, 384, f64, {"symmetric": True, "normalize": True}),
        ("nt_xent", 8192, 128, bf16, {**views, "target": True}),
        ("sup_con", 8192, 128, bf16, {**views, "ids": True, "by_label": True}),
        ("everything", 8192, 384, bf16, {**everything, "negatives": (4096, 384)}),
        ("everything", 8192, 384, f32, {**everything, "negatives": (8192, 64, 384)}),
        ("own-negatives", 8192, 384, bf16, {"negatives": (8192, 64, 384)}),
    ):
        call = _meta(n, d, dtype, **options)
        claims = CLAIMS if dtype in (bf16, f16) and name != "own-negatives" else {}  # those are read, not multiplied
        plain = name in ("clip", "own-negatives")
        title = f"{name}-{str(dtype).removeprefix('torch.')}"
        yield Example(title, partial(_both, call), claims, SPILLS if plain else _SPILLS_OF_LABELS)
