"""Kernels of cross entropy for GPUs.

Positions are laid out as (outer, P) and classes along a third axis, so that one kernel serves rows, channels-first
images and any strides that merge into these three.

Bytes. Up to a table's limit a tile of whole rows is in registers: the logits are read once, the gradient is written
once. A longer row is swept twice by one program: the first sweep reads it from memory and finds its peak and sum, lane
by lane with one exponential for each logit; the second reads it again, from L2 as long as a row for each multiprocessor
fits there (H200: 132 rows of 128256 bfloat16 are 34 MB of 50), and writes the gradient. Where only the losses of class
indices are asked for, there is no second sweep. Ignored rows are not read.

`second_order.py` has the formulas; q, Q, p, a are those of its first lines.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, check_classes, launch
from tlkernels._core.triton.kernels import DTYPES, count, sum_of
from tlkernels.losses.cross_entropy import triton_kernels as kernels

# By the number of classes, where classes or where positions are next to each other. 2026-11-21, by reasoning and from
# the compiler's report, unmeasured: 16 to 64 logits for a thread, as many as registers allow without spills, so that a
# row's loads are all on their way before the first is used; a long row has 1024 threads, one program for a
# multiprocessor, so that what is to be read again is one row for each.
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
    """How a tensor of logits lies in memory: numbers of outer, inner positions and classes, and strides along them."""

    outer: int
    inner: int
    classes: int
    strides: tuple[tuple[int, int, int], ...]
    """Of each tensor."""

    @property
    def of_indices(self) -> tuple[int, int, int]:
        """The strides of contiguous class indices; the number of rows is none of them."""
        return self.inner if self.outer > 1 else 0, 1, 0


def _merged(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return strides along the first axis, all axes behind the second as one, and the second; None if they differ."""
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
    """Return how the tensors, of one shape, lie in memory, or None if one has too many different strides."""
    shape = tensors[0].shape
    strides = [_merged(tensor) for tensor in tensors]
    if len(shape) < 3:
        return Positions(1, shape[0] if len(shape) == 2 else 1, shape[-1], tuple(s for s in strides if s))
    inner = shape[2:].numel()
    found = tuple(s for s in strides if s)
    if len(found) < len(strides):
        return None
    if all(first == inner * each or shape[0] == 1 for first, each, _ in found):
        return Positions(1, shape[0] * inner, shape[1], found)
    return Positions(shape[0], inner, shape[1], found)


def sweep(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, temperature: float,
    softcap: float | None, z_loss: float, *, grad: Tensor | None = None, factor: float = 1.0,
    divisor: Tensor | None = None, upstream: Tensor | None = None, upstream_lse: Tensor | None = None,
    loss: Tensor | None = None, peak: Tensor | None = None, log_sum: Tensor | None = None,
    entropy: Tensor | None = None, correct: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results; those with a number for each position are contiguous, as `target` indices are.

    Args:
        grad: of the input's shape, for upstream * factor / divisor of the losses; may be the input itself.
        factor, divisor: a number, and a 0-d tensor.
        upstream, upstream_lse: a number for each position.
        loss, peak, log_sum, entropy, correct: as of the ops.
        total: 0-d, factor * sum of the losses / divisor.
    """
    probabilities = target.is_floating_point()
    classes = input.shape[min(input.dim() - 1, 1)]
    if not probabilities:
        check_classes(target, classes, ignore_index)
        target = target.contiguous()
    arranged = [input] + ([grad] if grad is not None else []) + ([target] if probabilities else [])
    lying = positions(*arranged)
    if lying is None:  # a layout that three strides do not describe
        copy = None if grad is None else torch.empty_like(input, memory_format=torch.contiguous_format)
        sweep(
            input.contiguous(), target.contiguous(), weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss, grad=copy, factor=factor, divisor=divisor, upstream=upstream, upstream_lse=upstream_lse, loss=loss,
            peak=peak, log_sum=log_sum, entropy=entropy, correct=correct, total=total,
        )  # fmt: skip
        if grad is not None and copy is not None:
            grad.copy_(copy)
        return
    P = lying.inner
    x_outer, x_pos, x_class = lying.strides[0]
    columns = x_pos == 1 and x_class != 1 and P > 1
    # What is held beside the logits counts as if the row were longer.
    held = classes * (4 if softcap else 2 if probabilities or label_smoothing or entropy is not None else 1)
    T = compute_dtype(input)

    def launches(config: Config) -> None:
        BP, BC = _tile(config, P, classes, columns, held)
        programs = lying.outer * triton.cdiv(P, BP)
        partial = None if total is None else input.new_empty(programs, dtype=T)
        launch(
            kernels.sweep if columns else kernels.sweep_rows, (programs,), input, target, weight, _rows(upstream),
            _rows(upstream_lse), divisor, loss, peak, log_sum, entropy, correct, partial, grad, P, classes, x_outer,
            x_pos, x_class, *(lying.strides[-1] if probabilities else lying.of_indices),
            *(lying.strides[1] if grad is not None else (0, 0, 0)),
            ignore_index, factor, label_smoothing, temperature, softcap or 1.0, z_loss, PROBABILITIES=probabilities,
            SMOOTHING=label_smoothing != 0, SOFTCAP=softcap is not None, Z_LOSS=z_loss != 0,
            WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    (COLUMNS if columns else ROWS).run(input.device, input.element_size(), held, launches, repeatable=grad is not input)


def _tile(config: Config, P: int, classes: int, columns: bool, held: int) -> tuple[int, int]:
    """Return a tile's positions and classes."""
    elements, most = config.meta["ELEMENTS"], triton.next_power_of_2(max(P, 1))
    if config.meta["WHOLE"]:
        BC = triton.next_power_of_2(max(classes, 1))
        return max(1, min(elements // triton.next_power_of_2(max(held, 1)), most)), BC
    BP = min(64, most) if columns else 1
    return BP, elements // BP


def _rows(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _each(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    return torch.empty(shape, dtype=dtype or compute_dtype(input), device=input.device)


def forward(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak and log_sum of each position."""
    loss, peak, log_sum = _each(input), _each(input), _each(input)
    sweep(input, target, *options, loss=loss, peak=peak, log_sum=log_sum)
    return loss, peak, log_sum


def forward_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    """Return loss, peak, log_sum, entropy and correctness of each position."""
    loss, peak, log_sum, entropy = (_each(input) for _ in range(4))
    correct = _each(input, torch.bool)
    sweep(input, target, *options, loss=loss, peak=peak, log_sum=log_sum, entropy=entropy, correct=correct)
    return loss, peak, log_sum, entropy, correct


def backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    *options: Any,
) -> Tensor:
    """Return the gradient of the input. It finds peak and sum again: its row is there, and it has to find Q anyway."""
    grad = torch.empty_like(input)
    sweep(input, target, *options, grad=grad, upstream=grad_loss, upstream_lse=grad_lse)
    return grad


def backward_(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    *options: Any,
) -> None:
    """Write the gradient over the input."""
    sweep(input, target, *options, grad=input, upstream=grad_loss, upstream_lse=grad_lse)


def total(input: Tensor, target: Tensor, *options: Any) -> Tensor:
    """Return the reduced loss."""
    return _reduced(input, target, *options, grad=None)


def step(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient."""
    grad = torch.empty_like(input)
    return _reduced(input, target, *options, grad=grad), grad


def _reduced(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *rest: Any, grad: Tensor | None
) -> Tensor:
    *numbers, mean = rest
    loss = input.new_empty((), dtype=compute_dtype(input))
    divisor, factor = None, 1.0
    classes = input.shape[min(input.dim() - 1, 1)]
    if mean and target.is_floating_point():
        factor = 1 / (input.numel() // classes) if input.numel() else float("inf")
    elif mean:
        divisor = count(target, classes, weight, ignore_index)
    sweep(input, target, weight, ignore_index, *numbers, grad=grad, factor=factor, divisor=divisor, total=loss)
    return loss


def directional(
    direction: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, temperature: float, softcap: float | None, z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <direction, gradient of the input> by grad_loss, grad_lse, input and probabilities."""
    probabilities = target.is_floating_point()
    classes = input.shape[min(input.dim() - 1, 1)]
    v_loss, v_lse, v_input = _each(input), _each(input), torch.empty_like(input)
    v_target = torch.empty_like(target) if probabilities else input.new_empty((0,))
    if not probabilities:
        target = target.contiguous()
    more = (target, v_target) if probabilities else ()
    lying = positions(input, direction, v_input, *more)
    if lying is None:
        found = directional(
            direction.contiguous(), grad_loss, grad_lse, input.contiguous(), target.contiguous(), weight, ignore_index,
            label_smoothing, temperature, softcap, z_loss,
        )  # fmt: skip
        return found[0], found[1], v_input.copy_(found[2]), v_target.copy_(found[3])
    P = lying.inner
    columns = lying.strides[0][1] == 1 and lying.strides[0][2] != 1 and P > 1
    held = classes * (4 if softcap else 2)
    config = (_SECOND_COLUMNS if columns else _SECOND).find(input.device, input.element_size(), held)
    BP, BC = _tile(config, P, classes, columns, held)
    T = compute_dtype(input)
    launch(
        kernels.directional if columns else kernels.directional_rows, (lying.outer * triton.cdiv(P, BP),), direction,
        _rows(grad_loss), _rows(grad_lse), input, target, weight, v_loss, v_lse, v_input,
        v_target if probabilities else None, P, classes,
        *(stride for strides in lying.strides[:3] for stride in strides),
        *(stride for strides in (lying.strides[3:] or (lying.of_indices, (0, 0, 0))) for stride in strides),
        ignore_index, label_smoothing, temperature, softcap or 1.0, z_loss, PROBABILITIES=probabilities,
        SMOOTHING=label_smoothing != 0, SOFTCAP=softcap is not None, WHOLE=bool(config.meta["WHOLE"]), T=DTYPES[T],
        BP=BP, BC=BC, config=config._replace(meta={}),
    )  # fmt: skip
    return v_loss, v_lse, v_input, v_target


_WIDE = {"sweep": ("LDG.E.128", "STG.E.128")}
_PLAIN = (None, -100, 0.0, 1.0, None, 0.0)
_FEW = "8 to 32 bytes of a thread, once a row of which it holds 128 bytes: of 16 warps, each thread has 128 registers"
_SPILLS = {
    ("sweep", "sm_80", "spills: 14,"): _FEW,
    ("sweep", "sm_90", "spills: 2,"): _FEW,
    ("sweep", "sm_100", "spills: 12,"): _FEW,
}
_SCALARS = {("sweep", "gfx942", "spills"): "scalar registers, kept in lanes of vector registers: no memory"}


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the tables."""
    for dtype, *sizes in (
        (torch.bfloat16, 1024, 4096, 8192, 32000, 128256),
        (torch.float32, 1024, 16384, 32000, 128256),
        (torch.float64, 4096, 8192, 32000),
    ):
        for classes in sizes:
            x, y = _meta((4096, classes), dtype), _meta((4096,), torch.int64)
            spills = _SPILLS if (dtype, classes) == (torch.float32, 16384) else {}
            yield Example(f"step-{classes}-{dtype}", partial(step, x, y, *_PLAIN, True), _WIDE, spills)
    x, y = _meta((4096, 32000), torch.bfloat16), _meta((4096,), torch.int64)
    for classes in (8192, 32000):
        z, weight = _meta((4096, classes), torch.bfloat16), _meta((classes,), torch.bfloat16)
        every = (weight, -100, 0.1, 2.0, 30.0, 1e-4, True)
        yield Example(f"step-weighted-{classes}", partial(step, z, y, *every), _WIDE)
        yield Example(f"step-probabilities-{classes}", partial(step, z, z, *every), _WIDE)
        yield Example(f"stats-{classes}", partial(forward_stats, z, y, *_PLAIN), {"sweep": ("LDG.E.128",)})
    rows = _meta((4096,), torch.float32)
    yield Example("backward-in-place", partial(backward_, rows, rows, x, y, rows, rows, *_PLAIN), _WIDE)
    for options in (_PLAIN, (None, -100, 0.1, 2.0, 30.0, 1e-4)):
        for classes in (8192, 32000):
            z = x[:, :classes]
            yield Example(
                f"directional-{classes}-{options}", partial(directional, z, rows, rows, z, y, *options),
                {"directional": ("LDG.E.128", "STG.E.128")},
            )  # fmt: skip
    yield Example("step-odd", partial(step, _meta((4096, 50257), torch.bfloat16), y, *_PLAIN, True))
    for classes in (21, 300):
        x, y = _meta((8, classes, 512, 512), torch.bfloat16), _meta((8, 512, 512), torch.int64)
        yield Example(f"columns-{classes}", partial(step, x, y, *_PLAIN, True), _WIDE, _SCALARS)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
