"""Cross entropy in Triton: launches of the kernels.

Positions are laid out as (outer, P) and classes along a third axis, so that one kernel supports rows, channels-first
images and any strides that merge into these three.

Bytes. Up to a table's limit a tile of whole rows is in registers: the logits are read once, the gradient is written
once. A longer row is swept twice by one program. The first sweep reads it from memory and computes its peak and sum,
lane by lane with one exponential for each logit. The second reads it again, from L2 if a row for each multiprocessor
fits there (H200: 132 rows of 128256 bfloat16 are 34 MB of 50), and writes the gradient. The losses of class indices
alone need no second sweep. Ignored rows are not read.

`second_order.py` has the formulas, and defines q, Q, p and a.
"""

from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import check_classes
from tlkernels._core.triton.kernels import DTYPES, count, sum_of
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels.losses.cross_entropy import triton_kernels as kernels
from tlkernels.losses.cross_entropy import triton_second_order as second_order
from tlkernels.losses.cross_entropy.call import Options, class_axis

# By the number of classes, for contiguous classes (ROWS) or positions (COLUMNS). 2026-11-21, by reasoning and from the
# compiler's report, unmeasured: 16 to 64 logits for a thread, as many as registers allow without spills, so that all
# loads of a row are issued before the first is used. A long row has 1024 threads, one program for a multiprocessor, so
# that only one row for each has to stay in L2.
ROWS = Table(
    "cross_entropy rows",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 4),
    Config("*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("sm_120", 8, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),  # 8192 spill there
    Config("*", 0, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("*", 8, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("sm_120", 4, 16384, {"WHOLE": 1, "ELEMENTS": 16384}, 16),  # 32768 spill there
    Config("sm_120", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 32),
    Config("*", 0, 32768, {"WHOLE": 1, "ELEMENTS": 32768}, 16),
    Config("gfx*", 2, None, {"WHOLE": 0, "ELEMENTS": 8192}, 16),  # 64 lanes in a warp: 1024 threads
    Config("gfx*", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("*", 2, None, {"WHOLE": 0, "ELEMENTS": 8192}, 32),
    Config("*", 4, None, {"WHOLE": 0, "ELEMENTS": 4096}, 32),
)
COLUMNS = Table(
    "cross_entropy columns",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("*", 0, 64, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("gfx*", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 4),
    Config("*", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),
)


def _halved(row: Config) -> Config:
    meta = {"WHOLE": 0, "ELEMENTS": row.meta["ELEMENTS"] // 2}
    return row._replace(meta=meta, num_warps=max(1, row.num_warps // 2))


# The second derivative holds twice as much of a tile.
_SECOND, _SECOND_COLUMNS = (
    Table(
        f"{table.name}, second derivative",
        *(row if row.meta["WHOLE"] else _halved(row) for row in table.rows),
    )
    for table in (ROWS, COLUMNS)
)


class Positions(NamedTuple):
    """How tensors of logits are laid out in memory: as (outer, inner, classes)."""

    outer: int
    inner: int
    classes: int
    strides: tuple[tuple[int, int, int], ...]
    """Of each tensor."""

    @property
    def index_strides(self) -> tuple[int, int, int]:
        """The strides of contiguous class indices. Without outer positions they do not depend on the number of rows."""
        return self.inner if self.outer > 1 else 0, 1, 0

    @property
    def in_columns(self) -> bool:
        """Whether the first tensor's positions are contiguous and its classes are not."""
        _, along_positions, along_classes = self.strides[0]
        return along_positions == 1 and along_classes != 1 and self.inner > 1


def _merged(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return the strides along the first axis, the axes from the third on as if they were one, and the second axis.

    None if one stride does not describe the axes from the third on.
    """
    if tensor.dim() == 1:
        return 0, 0, tensor.stride(0)
    first, classes, *behind = tensor.stride()
    if not behind:
        return 0, first, classes
    inner = next(
        (stride for size, stride in zip(reversed(tensor.shape[2:]), reversed(behind), strict=True) if size > 1), 1
    )
    expected = inner
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(behind), strict=True):
        if size > 1 and stride != expected:
            return None
        expected = stride * size if size > 1 else expected
    return first, inner, classes


def positions(*tensors: Tensor) -> Positions | None:
    """Return the layout of tensors of one shape, or None if three strides do not describe one of them."""
    shape = tensors[0].shape
    merged = [_merged(tensor) for tensor in tensors]
    strides = tuple(s for s in merged if s is not None)
    if len(strides) < len(merged):
        return None
    if len(shape) < 3:
        return Positions(1, shape[0] if len(shape) == 2 else 1, shape[-1], strides)
    inner = shape[2:].numel()
    if all(first == inner * each or shape[0] == 1 for first, each, _ in strides):
        return Positions(1, shape[0] * inner, shape[1], strides)
    return Positions(shape[0], inner, shape[1], strides)


def sweep(
    input: Tensor, target: Tensor, options: Options, *, grad: Tensor | None = None, factor: float = 1.0,
    divisor: Tensor | None = None, upstream: Tensor | None = None, upstream_lse: Tensor | None = None,
    loss: Tensor | None = None, peak: Tensor | None = None, log_sum: Tensor | None = None,
    entropy: Tensor | None = None, correct: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results; those with a number for each position are contiguous, as `target` indices are.

    Args:
        grad: of the input's shape, for upstream * factor / divisor of the losses; may be the input itself.
        factor, divisor: a number, and a 0-d tensor.
        upstream, upstream_lse: a number for each position.
        loss, peak, log_sum, entropy, correct: a number for each position, as the ops return them.
        total: 0-d, factor * sum of the losses / divisor.
    """
    probabilities = target.is_floating_point()
    classes = input.shape[class_axis(input)]
    if not probabilities:
        check_classes(target, classes, options.ignore_index)
        target = target.contiguous()
    arranged = [input] + ([grad] if grad is not None else []) + ([target] if probabilities else [])
    layout = positions(*arranged)
    if layout is None:  # a layout that three strides do not describe
        copy = None if grad is None else torch.empty_like(input, memory_format=torch.contiguous_format)
        sweep(
            input.contiguous(), target.contiguous(), options, grad=copy, factor=factor, divisor=divisor,
            upstream=upstream, upstream_lse=upstream_lse, loss=loss, peak=peak, log_sum=log_sum, entropy=entropy,
            correct=correct, total=total,
        )  # fmt: skip
        if grad is not None and copy is not None:
            grad.copy_(copy)
        return
    columns = layout.in_columns
    smoothing, softcap = options.label_smoothing, options.softcap
    # A row with more in registers than its logits counts as a longer one.
    size = classes * (4 if softcap else 2 if probabilities or smoothing or entropy is not None else 1)
    T = compute_dtype(input)

    def launches(config: Config) -> None:
        BP, BC = _tile(config, layout.inner, classes, columns, size)
        programs = layout.outer * triton.cdiv(layout.inner, BP)
        partial = None if total is None else input.new_empty(programs, dtype=T)
        launch(
            kernels.sweep if columns else kernels.sweep_rows, (programs,), input, target, options.weight,
            _contiguous(upstream), _contiguous(upstream_lse), divisor, loss, peak, log_sum, entropy, correct, partial,
            grad, layout.inner, classes, *layout.strides[0],
            *(layout.strides[-1] if probabilities else layout.index_strides),
            *(layout.strides[1] if grad is not None else (0, 0, 0)), options.ignore_index, factor, smoothing,
            options.temperature, softcap or 1.0, options.z_loss, PROBABILITIES=probabilities, SMOOTHING=smoothing != 0,
            SOFTCAP=softcap is not None, Z_LOSS=options.z_loss != 0, WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T],
            BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    (COLUMNS if columns else ROWS).run(input.device, input.element_size(), size, launches, repeatable=grad is not input)


def _tile(config: Config, P: int, classes: int, columns: bool, size: int) -> tuple[int, int]:
    """Return a tile's positions and classes."""
    elements, most = config.meta["ELEMENTS"], triton.next_power_of_2(max(P, 1))
    if config.meta["WHOLE"]:
        BC = triton.next_power_of_2(max(classes, 1))
        return max(1, min(elements // triton.next_power_of_2(max(size, 1)), most)), BC
    BP = min(64, most) if columns else 1
    return BP, elements // BP


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _each(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    return torch.empty(shape, dtype=dtype or compute_dtype(input), device=input.device)


def forward(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak and log_sum of each position."""
    loss, peak, log_sum = _each(input), _each(input), _each(input)
    sweep(input, target, Options(*options), loss=loss, peak=peak, log_sum=log_sum)
    return loss, peak, log_sum


def forward_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak, log_sum, entropy and correctness of each position."""
    loss, peak, log_sum, entropy = (_each(input) for _ in range(4))
    correct = _each(input, torch.bool)
    sweep(
        input, target, Options(*options), loss=loss, peak=peak, log_sum=log_sum, entropy=entropy, correct=correct
    )  # fmt: skip
    return loss, peak, log_sum, entropy, correct


def backward(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor, target: Tensor,
    peak: Tensor, log_sum: Tensor, entropy: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient of the input. `peak` and `log_sum` are computed again, as Q is: the row is read anyway."""
    grad = torch.empty_like(input)
    sweep(input, target, Options(*options), grad=grad, upstream=grad_loss, upstream_lse=grad_lse)
    return grad


def backward_(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor, target: Tensor,
    peak: Tensor, log_sum: Tensor, entropy: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    """Write the gradient over the input."""
    sweep(input, target, Options(*options), grad=input, upstream=grad_loss, upstream_lse=grad_lse)


def total(input: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    """Return the reduced loss; after the options comes whether it is the mean."""
    *options, _row_weight, mean = arguments
    return _reduced(input, target, Options(*options), mean, None)


def step(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient; after the options comes whether it is the mean."""
    *options, _row_weight, mean = arguments
    grad = torch.empty_like(input)
    return _reduced(input, target, Options(*options), mean, grad), grad


def _reduced(input: Tensor, target: Tensor, options: Options, mean: bool, grad: Tensor | None) -> Tensor:
    loss = input.new_empty((), dtype=compute_dtype(input))
    divisor, factor = None, 1.0
    classes = input.shape[class_axis(input)]
    if mean and target.is_floating_point():
        factor = 1 / (input.numel() // classes) if input.numel() else float("inf")
    elif mean:
        divisor = count(target, classes, options.weight, options.ignore_index)
    sweep(input, target, options, grad=grad, factor=factor, divisor=divisor, total=loss)
    return loss


def directional(
    direction: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor,
    target: Tensor, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <direction, gradient of the input> by the upstreams, input and probabilities."""
    weight, ignore_index, smoothing, temperature, softcap, z_loss, _ = Options(*options)
    v_entropy = input.new_empty((0,))
    probabilities = target.is_floating_point()
    classes = input.shape[class_axis(input)]
    v_loss, v_lse, v_input = _each(input), _each(input), torch.empty_like(input)
    v_target = torch.empty_like(target) if probabilities else input.new_empty((0,))
    if not probabilities:
        target = target.contiguous()
    layout = positions(input, direction, v_input, *((target, v_target) if probabilities else ()))
    if layout is None:
        copies = (tensor.contiguous() for tensor in (input, target))
        results = directional(direction.contiguous(), grad_loss, grad_lse, grad_entropy, *copies, *options)
        return *results[:3], v_input.copy_(results[3]), v_target.copy_(results[4])
    columns = layout.in_columns
    size = classes * (4 if softcap else 2)
    config = (_SECOND_COLUMNS if columns else _SECOND).find(input.device, input.element_size(), size)
    BP, BC = _tile(config, layout.inner, classes, columns, size)
    T = compute_dtype(input)
    target_strides = layout.strides[3:] or (layout.index_strides, (0, 0, 0))
    launch(
        second_order.directional if columns else second_order.directional_rows,
        (layout.outer * triton.cdiv(layout.inner, BP),), direction, _contiguous(grad_loss), _contiguous(grad_lse),
        input, target, weight, v_loss, v_lse, v_input, v_target if probabilities else None, layout.inner, classes,
        *chain.from_iterable((*layout.strides[:3], *target_strides)), ignore_index, smoothing, temperature,
        softcap or 1.0, z_loss, PROBABILITIES=probabilities, SMOOTHING=smoothing != 0, SOFTCAP=softcap is not None,
        WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
    )  # fmt: skip
    return v_loss, v_lse, v_entropy, v_input, v_target
