"""InfoNCE in Triton: launches of the kernels, for nt_xent and sup_con too. `ops.py` defines the ops.

Forward: one sweep over the matrix of similarities computes the log-sum-exp of rows, and with `symmetric` of columns,
from the same tiles. Backward: another sweep, panel by panel, and the two products with each panel. That is four
products of N·K·D for the symmetric loss, none of them twice; `_core/triton/similarity.py` has the model. If the matrix
is symmetric (nt_xent, sup_con), the tiles from the diagonal on give the statistics of all rows, and one product the
gradient: 2.5.

A program writes its tile's statistics to a place of its own, and `fold` joins them in a fixed order, without atomics.
That is 4·P·K / BM bytes a statistic, for a panel of P rows.

The positive is kept out of the sum of exponentials, as on CPU, so that neither a small loss nor its gradient is a
difference of large numbers. Exponentials are of base 2; `peak` and `top` are logits in that base.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels._core.triton.similarity import (
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
from tlkernels.losses.info_nce.triton_gradients import gradient, gradient_at_positives, per_query_gradients, slopes
from tlkernels.losses.info_nce.triton_kernels import (
    ALL,
    LABEL,
    NO_SET,
    fold,
    losses,
    per_query_similarities,
    positives,
    statistics,
)

# By reasoning on 2026-11-21, without a GPU: all take little time compared with the sweeps. Vectors: a few programs for
# every multiprocessor at 65536 rows. Folds: a program reads lines of 32 or more items of each tile's statistics.
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
_PER_QUERY = Table(
    "contrastive negatives of each query",
    Config("interpreter", 0, None, {"BN": 32, "BD": 32}, 1),
    Config("*", 0, None, {"BN": 16, "BD": 128}, 4),
)
STATISTICS = 5  # peak, sum, the positive's similarity, sum and number of the set; the third of the first direction only


class _Part(NamedTuple):
    """Some columns of the matrix: the keys, or the negatives. It takes one launch a panel."""

    columns: Embeddings | None
    """None: negatives of each query."""
    known: Tensor | None
    """Their similarities, or None: computed tile by tile."""
    size: int
    first: int
    """The first column among all columns."""
    keys: bool


class _Launcher:
    """Launches the kernels of one call. It has the tensors as the kernels take them."""

    def __init__(
        self, query: Tensor, key: Tensor | None, negatives: Tensor | None, logit_scale: Tensor, target: Tensor | None,
        mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, self_column: int, by_label: bool,
        symmetric: bool, normalize: bool, label_smoothing: float,
    ):  # fmt: skip
        self.given = query, key, negatives
        self.compute = compute_dtype(*self.given)
        dtype = query.dtype
        for tensor in (key, negatives):
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        self.precision = precision(dtype)
        self.rows = query.shape[0]
        self.paired, self.symmetric = key is None, symmetric
        self.logit_scale, self.scale = logit_scale, logit_scale.to(query.device)
        self.self_column, self.smoothing = self_column, label_smoothing
        self.set = (LABEL if by_label else ALL if label_smoothing > 0 else NO_SET).value
        self.rounded = dtype.itemsize > 2 or by_label
        keys = self.rows if key is None else key.shape[0]
        self.config = TILES.find(query.device, dtype.itemsize, max(self.rows * keys, 1))
        if self_column >= 0 or mask is not None or query_ids is not None or normalize or self.set != NO_SET.value:
            self.config = for_options(self.config, square=self.paired)
        self.tile: dict[str, Any] = {name: self.config.meta[name] for name in ("BM", "BN", "BK")}
        if self.paired:  # the columns of a tile above the diagonal are also rows
            self.tile["BN"] = self.tile["BM"]
        self.query = prepare(query, dtype, normalize, self.config)
        self.key = self.query if key is None else prepare(key, dtype, normalize, self.config)
        self.parts = [_Part(self.key, None, keys, 0, True)]
        self.negatives: Embeddings | None = None
        self.per_query: Tensor | None = None
        if negatives is not None and negatives.dim() == 2:
            self.negatives = prepare(negatives, dtype, normalize, self.config)
            self.parts.append(_Part(self.negatives, None, negatives.shape[0], keys, False))
        elif negatives is not None:
            self.per_query = negatives
            self.per_query_norms = negatives.new_empty(negatives.shape[:2] if normalize else (0,), dtype=self.compute)
            known = self._per_query_similarities(negatives)
            self.parts.append(_Part(None, known, negatives.shape[1], keys, False))
        self.classes = keys + sum(part.size for part in self.parts[1:])
        self.target = None if target is None else target.long().contiguous()
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.query_ids = None if query_ids is None else query_ids.long().contiguous()
        self.key_ids = self.query_ids if key_ids is None else key_ids.long().contiguous()
        self.step = panel_rows(self.rows, query.shape[1], self.config)

    def _per_query_similarities(self, negatives: Tensor) -> Tensor:
        rows, count, features = negatives.shape
        out = negatives.new_empty((rows, count), dtype=self.compute)
        config = _PER_QUERY.find(negatives.device, 0, count)
        x, norms = self.query.x, self.query.norms
        args = x, norms, negatives, out, self.per_query_norms, count, features, x.stride(0), *negatives.stride()
        launch(per_query_similarities, (rows, tiles_of(count, config.meta["BN"])), *args, config=config)
        return out

    def gradients(self, wanted: Sequence[bool]) -> list[Tensor]:
        """Return gradients by query, key and negatives to fill; zeros where there are no rows to fill them."""
        query = self.given[0]
        new = torch.empty_like if self.rows else torch.zeros_like
        return [
            new(tensor, memory_format=torch.contiguous_format) if tensor is not None and want else query.new_empty((0,))
            for tensor, want in zip(self.given, wanted, strict=True)
        ]

    def panels(self) -> Iterator[tuple[int, int]]:
        """Yield where each panel begins and ends."""
        for begin in range(0, self.rows, self.step):
            yield begin, min(begin + self.step, self.rows)

    def tiles(self, part: _Part) -> int:
        """Return how many tiles cover the columns of a part."""
        return tiles_of(part.size, self.tile["BN"])

    def matrix(self, part: _Part, begin: int, end: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Return a kernel's tensors for some rows of a part, and its numbers from `first_row` to `mask_column`."""
        known, columns = part.known, part.columns
        x = self.query.x
        if columns is None:
            assert known is not None
            known = known[begin:end]
        elif self.compute == torch.float64:  # the library multiplies float64; tiles would not use tensor cores
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
        numbers = begin, end, part.size, part.first, self.classes, self.self_column, *strides, *mask_strides
        return (*tensors, *norms, self.scale, self.target, mask, *ids), numbers

    def launch(self, kernel: Any, part: _Part, tiles: int, *args: Any, **constants: Any) -> None:
        """Launch a kernel on tiles of a part."""
        known = {"SET": self.set, "SELF": part.keys and self.self_column >= 0, "PRECISION": self.precision}
        launch(kernel, (tiles,), *args, config=self.config, **known, **self.tile, **constants)

    def vectors(self, kernel: object, *args: object, **constants: object) -> None:
        """Launch a kernel on numbers for each row."""
        config = _VECTORS.find(self.query.x.device, 0, self.rows)
        launch(kernel, (tiles_of(self.rows, config.meta["BI"]),), *args, config=config, fusion=False, **constants)


@torch.no_grad()
def forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of each row, and the state."""
    launcher = _Launcher(query, *arguments)
    rows, compute = launcher.rows, launcher.compute
    state = query.new_zeros((1 + launcher.symmetric, STATISTICS, rows), dtype=compute)  # not all are written
    loss = query.new_empty((rows,), dtype=compute)
    if rows == 0:
        return loss, state
    if launcher.set != LABEL.value:
        _positives(launcher, state[0, 2])
    kinds = 4 if launcher.set != NO_SET.value else 2
    row_tiles = tiles_of(min(launcher.step, rows), launcher.tile["BM"])
    tiles = sum(map(launcher.tiles, launcher.parts))
    by_row = query.new_empty((tiles, kinds, min(launcher.step, rows)), dtype=compute)
    by_column = None
    if launcher.symmetric or launcher.paired:
        by_column = query.new_empty((row_tiles, kinds, launcher.parts[0].size), dtype=compute)
    for begin, end in launcher.panels():
        panel_tiles = tiles_of(end - begin, launcher.tile["BM"])
        offset = 0
        skipped = begin // launcher.tile["BM"] if launcher.paired else 0
        for part in launcher.parts:
            tensors, numbers = launcher.matrix(part, begin, end)
            columns = by_column if part.keys else None
            strides = (*by_row.stride()[:2], *((0, 0) if columns is None else columns.stride()[:2]))
            launcher.launch(
                statistics, part, panel_tiles * (launcher.tiles(part) - skipped), *tensors, by_row, columns, *numbers,
                *strides, skipped, panel_tiles, offset, PAIRED=launcher.paired,
            )  # fmt: skip
            offset += launcher.tiles(part)
        if by_column is not None:
            _fold(
                launcher, by_column, state[1] if launcher.symmetric else state[0], 0, launcher.parts[0].size,
                panel_tiles, skipped, fresh=begin == 0, side=-launcher.paired,
            )  # fmt: skip
        _fold(
            launcher, by_row, state[0], begin, end - begin, tiles, 0, fresh=not launcher.paired,
            side=int(launcher.paired),
        )  # fmt: skip
    launcher.vectors(
        losses, state[0], state[1] if launcher.symmetric else None, state[0, 2], launcher.scale, loss, rows,
        launcher.smoothing, SET=launcher.set,
    )  # fmt: skip
    return loss, state


def _positives(launcher: _Launcher, out: Tensor) -> None:
    """Write each row's similarity to its positive."""
    config = _POSITIVES.find(out.device, 0, launcher.rows)
    query, key, negatives = launcher.query, launcher.key, launcher.negatives
    launch(
        positives, (tiles_of(launcher.rows, config.meta["BI"]),), query.x, key.x, negatives and negatives.x,
        launcher.parts[-1].known, query.norms, key.norms, negatives and negatives.norms, launcher.target, out,
        launcher.rows, launcher.parts[0].size, launcher.classes, query.x.shape[1], query.x.stride(0), key.x.stride(0),
        0 if negatives is None else negatives.x.stride(0), config=config,
    )  # fmt: skip


def _fold(
    launcher: _Launcher, parts: Tensor, state: Tensor, first: int, items: int, tiles: int, first_tile: int, *,
    fresh: bool, side: int,
) -> None:  # fmt: skip
    """Join the statistics of tiles, as the kernel says."""
    config = _FOLDS.find(parts.device, 0, items)
    launch(
        fold, (tiles_of(items, config.meta["BI"]),), parts, state, first, items, tiles, first_tile,
        *parts.stride()[:2], state.stride(0), SET=launcher.set, FRESH=fresh, SIDE=side, TILE=launcher.tile["BM"],
        config=config,
    )  # fmt: skip


@torch.no_grad()
def backward(grad_loss: Tensor, state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients by query, key, negatives and scale, for an upstream of each row.

    After the arguments of `forward` comes which are wanted. One that is not wanted has no elements; the scale's is 0.
    """
    *given, wanted = arguments
    launcher = _Launcher(*given)
    want_query, want_key, want_negatives, want_scale = wanted
    grads = launcher.gradients((want_query, want_key, want_negatives))
    by_scale = torch.zeros_like(launcher.logit_scale)
    if launcher.rows == 0:
        return *grads, by_scale
    grad_query, grad_key, grad_negatives = grads
    half = launcher.query.x.dtype == torch.float16
    panels = _Panels(launcher, grad_loss, state, range_of_float16(grad_loss) if half else None, want_scale)
    totals: list[Tensor | None] = [None, None]
    want_columns = (want_key and not launcher.paired, want_negatives)
    for n, (begin, end) in enumerate(launcher.panels()):
        total = None
        for k, part in enumerate(launcher.parts):
            panel = panels.compute(n, k, begin, end)
            if part.columns is None:
                panels.per_query(part, panel, total, grad_negatives if want_negatives else None, begin, end)
                continue
            if want_query:
                total = product(panel, part.columns.x, total)
            if want_columns[k]:
                totals[k] = product(panel.T, launcher.query.x[begin:end], totals[k])
        if total is not None:
            write_gradient(launcher.query, total, launcher.scale, panels.grad_scale, grad_query, begin)
    columns = (launcher.key, launcher.negatives)
    for embeddings, whole, grad in zip(columns, totals, (grad_key, grad_negatives), strict=True):
        if embeddings is not None and whole is not None:
            write_gradient(embeddings, whole, launcher.scale, panels.grad_scale, grad)
    return *grads, panels.by_scale().to(by_scale) if want_scale else by_scale


class _Panels:
    """The panels of the gradient by the products, computed one at a time in the memory of a part."""

    def __init__(
        self, launcher: _Launcher, upstream: Tensor, state: Tensor, grad_scale: Tensor | None, want_scale: bool
    ):
        self.launcher, self.state, self.grad_scale = launcher, state, grad_scale
        rows, step = launcher.rows, min(launcher.step, launcher.rows)
        self.row_slopes = self._slopes(state[0], upstream)
        self.column_slopes = (
            self._slopes(state[1], upstream) if launcher.symmetric else self.row_slopes if launcher.paired else None
        )
        self.tiles = [tiles_of(step, launcher.tile["BM"]) * launcher.tiles(part) for part in launcher.parts]
        self.memory = [
            state.new_empty(
                (step, tiles_of(part.size, 64) * 64),
                dtype=launcher.compute if part.columns is None else launcher.query.x.dtype,
            )
            for part in launcher.parts
        ]
        # Gradient * similarity, summed over each tile of every panel, and of each positive.
        self.by_tile = self.by_positive = None
        if want_scale:
            panels = len(list(launcher.panels()))
            self.sums = state.new_zeros(panels * sum(self.tiles) + rows)
            self.by_tile, self.by_positive = self.sums[:-rows].view(panels, sum(self.tiles)), self.sums[-rows:]

    def _slopes(self, state: Tensor, upstream: Tensor) -> Tensor:
        """Return four numbers of each row of a direction, as the kernel says."""
        launcher = self.launcher
        out = state.new_empty((4, launcher.rows))
        launcher.vectors(
            slopes, state, self.state[0, 2], launcher.target, launcher.scale, upstream, self.grad_scale, out,
            launcher.rows, launcher.classes, upstream.stride(0), launcher.smoothing, 0.5 if launcher.symmetric else 1.0,
            SET=launcher.set,
        )  # fmt: skip
        return out

    def compute(self, n: int, k: int, begin: int, end: int) -> Tensor:
        """Return panel n of the gradient by the products of part k; the next panel overwrites it."""
        launcher, part, memory = self.launcher, self.launcher.parts[k], self.memory[k]
        tensors, numbers = launcher.matrix(part, begin, end)
        column_slopes = self.column_slopes if part.keys else None
        row_tiles = tiles_of(end - begin, launcher.tile["BM"])
        launcher.launch(
            gradient, part, row_tiles * launcher.tiles(part), *tensors, self.row_slopes, column_slopes, memory,
            None if self.by_tile is None else self.by_tile[n, sum(self.tiles[:k]) :], *numbers, launcher.rows,
            memory.stride(0), row_tiles, ROUNDED=launcher.rounded,
        )  # fmt: skip
        if launcher.set != LABEL.value:
            norms = (None, None) if part.columns is None else (launcher.query.norms, part.columns.norms)
            config = _VECTORS.find(memory.device, 0, end - begin)
            launch(
                gradient_at_positives, (tiles_of(end - begin, config.meta["BI"]),), self.row_slopes, column_slopes,
                self.state[0, 2], launcher.target, *norms, memory, self.by_positive, begin, end, part.first, part.size,
                launcher.rows, memory.stride(0), config=config,
            )  # fmt: skip
        return memory[: end - begin, : part.size]

    def per_query(
        self, part: _Part, panel: Tensor, total: Tensor | None, grad: Tensor | None, begin: int, end: int
    ) -> None:
        """Add to `total` and write `grad` for negatives of each query, as the kernel says."""
        launcher, negatives = self.launcher, self.launcher.per_query
        assert negatives is not None
        if total is None and grad is None:
            return
        config = _PER_QUERY.find(negatives.device, 0, part.size)
        x, features = launcher.query.x, negatives.shape[2]
        launch(
            per_query_gradients, (end - begin, tiles_of(features, config.meta["BD"])), x, launcher.query.norms,
            negatives, part.known, launcher.per_query_norms, panel, launcher.scale, self.grad_scale, total, grad, begin,
            part.size, features, x.stride(0), *negatives.stride(), panel.stride(0),
            0 if total is None else total.stride(0), config=config,
        )  # fmt: skip

    def by_scale(self) -> Tensor:
        """Return the gradient by the scale."""
        # Each tile of a symmetric matrix has the gradients of both directions.
        moment = self.sums.sum(dtype=torch.float64) / (1 + self.launcher.paired)
        return moment if self.grad_scale is None else moment / self.grad_scale
