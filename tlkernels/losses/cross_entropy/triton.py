"""Cross entropy in Triton: launches of the kernels.

Positions are laid out as (outer, P) and classes along a third axis, so that one kernel supports rows, channels-first
images and any strides that merge into these three.

Bytes. Up to a table's limit a tile of whole rows is in registers: the logits are read once, the gradient is written
once. A longer row is swept twice by one program. The first sweep reads it from memory and computes its peak and sum,
lane by lane with one exponential for each logit. The second reads it again, from L2 if a row for each multiprocessor
fits there (H200: 132 rows of 128256 bfloat16 are 34 MB of 50), and writes the gradient. The losses of class indices
alone need no second sweep. With a given normaliser the first is not made. Ignored rows, and rows of weight 0, are not
read.

`second_order.py` has the formulas, and defines q, Q, p and a.
"""

from collections.abc import Sequence
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


# The gradient with the entropy's and the second derivative hold more of a tile.
_HALVED_ROWS, _HALVED_COLUMNS = (
    Table(
        f"{table.name}, halved",
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


class PerPosition(NamedTuple):
    """What has a number for each position, in the order of the kernel's arguments. Results are contiguous."""

    weight: Tensor | None = None
    """Multiplies the loss and its gradient; where it is 0, the position is not read."""
    grad_loss: Tensor | None = None
    """Upstream, None for 1."""
    grad_lse: Tensor | None = None
    """Upstream, None for 0."""
    grad_entropy: Tensor | None = None
    loss: Tensor | None = None
    """Result; from here on all are, but for a normaliser and an entropy that are given."""
    peak: Tensor | None = None
    log_sum: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


def sweep(
    input: Tensor, target: Tensor, options: Options, each: PerPosition, *, given: bool = False,
    grad: Tensor | None = None, factor: float = 1.0, divisor: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results.

    Args:
        input, target, options: of the loss. With `num_classes` a class index of -1 counts, and is no class of `input`.
        each: what has a number for each position.
        given: whether `peak`, `log_sum` and `entropy` are read; else they are results.
        grad: of the input's shape, for upstreams * factor / divisor; may be the input itself.
        factor, divisor: a number, and a 0-d tensor, for the upstream of the losses.
        total: 0-d, factor * sum of the losses / divisor.
    """
    probabilities, elsewhere = target.is_floating_point(), options.num_classes is not None
    classes = input.shape[class_axis(input)]
    if not probabilities:
        check_classes(target, classes, options.ignore_index, elsewhere)
        target = target.contiguous()
    arranged = [input] + ([grad] if grad is not None else []) + ([target] if probabilities else [])
    layout = positions(*arranged)
    if layout is None:  # a layout that three strides do not describe
        copy = None if grad is None else torch.empty_like(input, memory_format=torch.contiguous_format)
        sweep(
            input.contiguous(), target.contiguous(), options, each, given=given, grad=copy, factor=factor,
            divisor=divisor, total=total,
        )  # fmt: skip
        if grad is not None and copy is not None:
            grad.copy_(copy)
        return
    columns = layout.in_columns
    smoothing, softcap = options.label_smoothing, options.softcap
    # A row with more in registers than its logits counts as a longer one.
    more = probabilities or smoothing or each.entropy is not None or each.correct is not None
    size = classes * (4 if softcap else 2 if more else 1)
    T = compute_dtype(input)

    def launches(config: Config) -> None:
        BP, BC = _tile(config, layout.inner, classes, columns, size)
        programs = layout.outer * triton.cdiv(layout.inner, BP)
        partial = None if total is None else input.new_empty(programs, dtype=T)
        launch(
            kernels.sweep if columns else kernels.sweep_rows, (programs,), input, target, options.weight,
            *(_contiguous(values) for values in each), divisor, partial, grad, layout.inner, classes,
            *layout.strides[0], *(layout.strides[-1] if probabilities else layout.index_strides),
            *(layout.strides[1] if grad is not None else (0, 0, 0)), options.ignore_index, factor, smoothing,
            _spread(options, classes), options.temperature, softcap or 1.0, options.z_loss,
            PROBABILITIES=probabilities, ELSEWHERE=elsewhere, GIVEN=given, SMOOTHING=smoothing != 0,
            SOFTCAP=softcap is not None, Z_LOSS=options.z_loss != 0, WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T],
            BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    tables = (ROWS, COLUMNS) if each.grad_entropy is None else (_HALVED_ROWS, _HALVED_COLUMNS)
    tables[columns].run(input.device, input.element_size(), size, launches, repeatable=grad is not input)


def _spread(options: Options, classes: int) -> float:
    """Return what smoothing gives to each class."""
    return options.label_smoothing / max(1, options.num_classes or classes)


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
    sweep(input, target, Options(*options), PerPosition(loss=loss, peak=peak, log_sum=log_sum))
    return loss, peak, log_sum


def forward_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak, log_sum, entropy and correctness of each position."""
    loss, peak, log_sum, entropy = (_each(input) for _ in range(4))
    correct = _each(input, torch.bool)
    results = PerPosition(loss=loss, peak=peak, log_sum=log_sum, entropy=entropy, correct=correct)
    sweep(input, target, Options(*options), results)
    return loss, peak, log_sum, entropy, correct


def backward(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor, target: Tensor,
    peak: Tensor, log_sum: Tensor, entropy: Tensor | None, *options: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient of the input."""
    grad = torch.empty_like(input)
    write_gradient(
        (grad_loss, grad_lse, grad_entropy), input, target, (peak, log_sum, entropy), Options(*options), grad
    )
    return grad


def backward_(
    grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor, target: Tensor,
    peak: Tensor, log_sum: Tensor, entropy: Tensor | None, *options: Any,
) -> None:  # fmt: skip
    """Write the gradient over the input."""
    upstreams, normaliser = (grad_loss, grad_lse, grad_entropy), (peak, log_sum, entropy)
    write_gradient(upstreams, input, target, normaliser, Options(*options), input)


def write_gradient(
    upstreams: Sequence[Tensor | None], input: Tensor, target: Tensor, normaliser: Sequence[Tensor | None],
    options: Options, grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradient for upstreams of loss, lse and entropy to `grad`, by (peak, log_sum, entropy)."""
    grad_loss, grad_lse, grad_entropy = upstreams
    peak, log_sum, entropy = normaliser
    entropy = None if grad_entropy is None else entropy
    rows = PerPosition(None, grad_loss, grad_lse, grad_entropy, None, peak, log_sum, entropy)
    sweep(input, target, options, rows, given=True, grad=grad)


def total(input: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    """Return the reduced loss; after the options come the weights of rows and whether it is the mean."""
    *options, row_weight, mean = arguments
    return _reduced(input, target, Options(*options), row_weight, mean, None)


def step(input: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient; after the options come the weights of rows and whether it is the mean.

    The weights do not change what the mean divides by.
    """
    *options, row_weight, mean = arguments
    grad = torch.empty_like(input)
    return _reduced(input, target, Options(*options), row_weight, mean, grad), grad


def _reduced(
    input: Tensor, target: Tensor, options: Options, row_weight: Tensor | None, mean: bool, grad: Tensor | None
) -> Tensor:
    loss = input.new_empty((), dtype=compute_dtype(input))
    divisor, factor = None, 1.0
    classes = input.shape[class_axis(input)]
    if mean and target.is_floating_point():
        factor = 1 / (input.numel() // classes) if input.numel() else float("inf")
    elif mean:
        divisor = count(target, classes, options.weight, options.ignore_index)
    sweep(
        input, target, options, PerPosition(row_weight), grad=grad, factor=factor, divisor=divisor, total=loss
    )  # fmt: skip
    return loss


def directional(
    direction: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, input: Tensor,
    target: Tensor, *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <direction, gradient of the input> by the upstreams, the input and probabilities.

    Those by an entropy without upstream and by class indices are empty.
    """
    options = Options(*arguments)
    probabilities = target.is_floating_point()
    classes, smoothing, softcap = input.shape[class_axis(input)], options.label_smoothing, options.softcap
    v_loss, v_lse, v_input = _each(input), _each(input), torch.empty_like(input)
    v_entropy = input.new_empty((0,)) if grad_entropy is None else _each(input)
    v_target = torch.empty_like(target) if probabilities else input.new_empty((0,))
    if not probabilities:
        target = target.contiguous()
    layout = positions(input, direction, v_input, *((target, v_target) if probabilities else ()))
    if layout is None:
        copies = (tensor.contiguous() for tensor in (input, target))
        results = directional(direction.contiguous(), grad_loss, grad_lse, grad_entropy, *copies, *arguments)
        return *results[:3], v_input.copy_(results[3]), v_target.copy_(results[4])
    columns = layout.in_columns
    size = classes * (4 if softcap else 2) * (1 if grad_entropy is None else 2)
    config = (_HALVED_COLUMNS if columns else _HALVED_ROWS).find(input.device, input.element_size(), size)
    BP, BC = _tile(config, layout.inner, classes, columns, size)
    T = compute_dtype(input)
    target_strides = layout.strides[3:] or (layout.index_strides, (0, 0, 0))
    launch(
        second_order.directional if columns else second_order.directional_rows,
        (layout.outer * triton.cdiv(layout.inner, BP),), direction, _contiguous(grad_loss), _contiguous(grad_lse),
        _contiguous(grad_entropy), input, target, options.weight, v_loss, v_lse,
        None if grad_entropy is None else v_entropy, v_input, v_target if probabilities else None, layout.inner,
        classes, *chain.from_iterable((*layout.strides[:3], *target_strides)), options.ignore_index, smoothing,
        _spread(options, classes), options.temperature, softcap or 1.0, options.z_loss, PROBABILITIES=probabilities,
        ELSEWHERE=options.num_classes is not None, SMOOTHING=smoothing != 0, SOFTCAP=softcap is not None,
        WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
    )  # fmt: skip
    return v_loss, v_lse, v_entropy, v_input, v_target
