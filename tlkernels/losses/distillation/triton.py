"""Distillation in Triton: launches of the kernels, and the formulas.

With p the student's and q the teacher's softmax at the temperature, D = sum of a_c. slope_p is dD/dp up to a constant,
slope_q is dD/dq:

    forward KL    a = q * slope_q                  slope_q = log q - log p
    reverse KL    a = p * slope_p                  slope_p = log p - log q
    js            a = p * slope_p + q * slope_q    slope_p = (1 - beta) * log(p / m), slope_q = beta * log(q / m)
    tv            a = |p - q| / 2                  slope_p = sign(p - q) / 2 = -slope_q

    T * dD/dstudent = p * (slope_p - sum of p * slope_p), and p - q for the forward KL; the same for the teacher

Bytes. Up to a table's limit both rows are in registers: each tensor of logits is read once, each gradient written once.
A longer row is swept again by the same program, from L2 if both rows of every multiprocessor fit there (H200: 132 times
two rows of 32000 bfloat16 are 17 MB of 50). The first sweep computes peaks and sums, the second the divergence. The
second also writes a gradient that needs no sum over the row (the student's of the forward KL, the teacher's of the
reverse); otherwise a third sweep writes it. Ignored rows are not read.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import check_classes
from tlkernels._core.triton.kernels import DTYPES, count, sum_of
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels.losses.distillation import triton_kernels as kernels
from tlkernels.losses.distillation import triton_second_order
from tlkernels.losses.distillation.call import DIVERGENCES, Options, triton_softcaps

# By the number of classes. 2026-11-21, by reasoning and from the compiler's report, unmeasured: as in cross
# entropy, with two tensors in registers.
TABLE = Table(
    "distillation",
    Config("interpreter", 0, 128, {"WHOLE": 1, "ELEMENTS": 1024}, 1),
    Config("interpreter", 0, None, {"WHOLE": 0, "ELEMENTS": 2048}, 1),
    Config("gfx*", 0, 1024, {"WHOLE": 1, "ELEMENTS": 1024}, 2),  # 64 lanes in a warp
    Config("gfx*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 4),
    Config("gfx*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 8),
    Config("gfx*", 8, None, {"WHOLE": 0, "ELEMENTS": 1024}, 8),
    Config("gfx*", 2, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("gfx*", 2, None, {"WHOLE": 0, "ELEMENTS": 4096}, 8),
    Config("gfx*", 4, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("gfx*", 4, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),
    Config("*", 0, 1024, {"WHOLE": 1, "ELEMENTS": 1024}, 4),
    Config("*", 0, 2048, {"WHOLE": 1, "ELEMENTS": 2048}, 8),
    Config("*", 0, 4096, {"WHOLE": 1, "ELEMENTS": 4096}, 16),
    Config("*", 8, None, {"WHOLE": 0, "ELEMENTS": 1024}, 16),
    Config("*", 0, 8192, {"WHOLE": 1, "ELEMENTS": 8192}, 16),
    Config("sm_100", 2, None, {"WHOLE": 0, "ELEMENTS": 2048}, 8),  # 16 warps spill there; its L2 has room for more rows
    Config("*", 2, None, {"WHOLE": 0, "ELEMENTS": 4096}, 16),
    Config("*", 4, None, {"WHOLE": 0, "ELEMENTS": 2048}, 16),
)


_SECOND = Table(
    "distillation, second derivative",
    Config("interpreter", 0, None, {"ELEMENTS": 512}, 1),
    Config("gfx*", 0, None, {"ELEMENTS": 1024}, 2),
    Config("sm_100", 0, None, {"ELEMENTS": 512}, 4),  # 8 for a thread spill there
    Config("*", 0, None, {"ELEMENTS": 1024}, 4),
)


def _rows(*tensors: Tensor) -> tuple[int | None, list[int]]:
    """Return `inner` and each tensor's three strides: row r is (r // inner, r % inner), the third axis has the classes.

    `inner` is None if three strides do not describe a tensor.
    """
    shape = tensors[0].shape
    merged = [_merged(tensor.shape[:-1], tensor.stride()[:-1]) for tensor in tensors]
    if None not in merged:
        whole = [(0, each, tensor.stride(-1)) for each, tensor in zip(merged, tensors, strict=True)]
        return shape[:-1].numel(), [stride or 0 for strides in whole for stride in strides]
    behind = [_merged(tensor.shape[1:-1], tensor.stride()[1:-1]) for tensor in tensors]
    if None in behind:
        return None, []
    split = [(tensor.stride(0), each, tensor.stride(-1)) for each, tensor in zip(behind, tensors, strict=True)]
    return shape[1:-1].numel(), [stride or 0 for strides in split for stride in strides]


def _merged(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride along axes as if they were one, or None."""
    axes = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    for (_, outer), (size, stride) in pairwise(axes):
        if outer != size * stride:
            return None
    return axes[-1][1] if axes else 1


def sweep(
    student: Tensor, teacher: Tensor, options: Options, *, grad_student: Tensor | None = None,
    grad_teacher: Tensor | None = None, factor: float = 1.0, divisor: Tensor | None = None,
    upstream: Tensor | None = None, loss: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the given results; those with a number for each row are contiguous.

    Args:
        grad_student, grad_teacher: of the logits' shape, contiguous, for upstream * factor / divisor of the rows; may
            be the logits themselves.
        factor, divisor: a number, and a 0-d tensor.
        upstream: a number for each row.
        loss: of each row.
        total: 0-d, factor * sum of the rows / divisor.
    """
    classes, divergence = student.shape[-1], options.divergence
    if options.target is not None:
        check_classes(options.target, classes, options.ignore_index)
    inner, strides = _rows(student, teacher)
    if inner is None:  # more strides along the rows than two
        student, teacher = student.contiguous(), teacher.contiguous()
        inner, strides = _rows(student, teacher)
    rows = student.shape[:-1].numel()
    T = compute_dtype(student, teacher)
    itemsize = 8 if T.itemsize == 8 else max(student.element_size(), teacher.element_size())
    target, row_weight, upstream = map(_contiguous, (options.target, options.row_weight, upstream))
    hard, (caps, capped) = options.hard_weight != 0, triton_softcaps(options)
    # The Jensen-Shannon divergence and a softcap have more in registers, as if the row were longer.
    size = classes * (2 if divergence == "js" or any(capped.values()) else 1)
    heavy = divergence == "js" or hard or (grad_student is not None and grad_teacher is not None)

    def launches(config: Config) -> None:
        if heavy and not config.meta["WHOLE"]:  # as many elements for each thread, but twice as many registers
            meta = {"WHOLE": 0, "ELEMENTS": config.meta["ELEMENTS"] // 2}
            config = config._replace(meta=meta, num_warps=max(1, config.num_warps // 2))
        BP, BC = 1, config.meta["ELEMENTS"]
        if config.meta["WHOLE"]:
            BC = triton.next_power_of_2(classes)
            most = config.meta["ELEMENTS"] // triton.next_power_of_2(size)
            BP = max(1, min(most, triton.next_power_of_2(max(1, rows))))
        programs = triton.cdiv(rows, BP)
        partial = None if total is None else student.new_empty(programs, dtype=T)
        launch(
            kernels.distillation, (programs,), student, teacher, target, row_weight, upstream, divisor, loss, partial,
            grad_student, grad_teacher, rows, inner, classes, *strides, options.ignore_index, factor,
            options.temperature, options.beta, options.hard_weight, options.label_smoothing, *caps,
            DIVERGENCE=DIVERGENCES.index(divergence), **capped, HARD=hard, WHOLE=bool(config.meta["WHOLE"]),
            T=DTYPES[T], BP=BP, BC=BC, config=config._replace(meta={}),
        )  # fmt: skip
        if total is not None and partial is not None:
            sum_of(partial, total, factor, divisor)

    repeatable = grad_student is not student and grad_teacher is not teacher
    TABLE.run(student.device, itemsize, size, launches, repeatable)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    """Return the loss of each row."""
    loss = torch.empty(student.shape[:-1], dtype=compute_dtype(student, teacher), device=student.device)
    sweep(student, teacher, Options(*options), loss=loss)
    return loss


def backward(grad_rows: Tensor, student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of both logits for (..., *options, needs); one that is not needed is an empty tensor."""
    *options, needs = arguments
    grads, needed = _gradients(student, teacher, needs)
    sweep(student, teacher, Options(*options), **needed, upstream=grad_rows)
    return grads


def step(student: Tensor, teacher: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced loss and its gradients for (..., *options, mean, needs)."""
    *given, mean, needs = arguments
    options = Options(*given)
    grads, needed = _gradients(student, teacher, needs)
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    divisor, factor = None, 1.0
    if mean and options.target is not None:
        divisor = count(options.target, student.shape[-1], None, options.ignore_index)
    elif mean:
        rows = student.shape[:-1].numel()
        factor = 1 / rows if rows else float("inf")
    sweep(student, teacher, options, **needed, factor=factor, divisor=divisor, total=loss)
    return loss, *grads


def _gradients(student: Tensor, teacher: Tensor, needs: Sequence[bool]) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Return contiguous gradients, empty tensors where not needed, and by name those that are needed."""
    needs_student, needs_teacher = needs
    first = student.new_empty(student.shape if needs_student else (0,))
    second = teacher.new_empty(teacher.shape if needs_teacher else (0,))
    named: dict[str, Any] = {"grad_student": first} if needs_student else {}
    return (first, second), {**named, "grad_teacher": second} if needs_teacher else named


def second(
    v_student: Tensor | None, v_teacher: Tensor | None, grad_rows: Tensor, student: Tensor, teacher: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the derivatives of <v, the gradients for grad_rows> by grad_rows, student and teacher.

    They are a row of the Hessian of D times the directions, in closed form (`_second_terms` has the terms). The rows
    are swept four times, from L2 after the first time; no sweep holds more than a tile. The arguments end with
    (*options, needs), where `needs` are those of student and teacher.
    """
    *given, (needs_student, needs_teacher) = arguments
    options = Options(*given)
    target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, smoothing, *_ = options
    caps, capped = triton_softcaps(options)
    inner, strides = _rows(student, teacher)
    if inner is None:
        student, teacher = student.contiguous(), teacher.contiguous()
        inner, strides = _rows(student, teacher)
    rows, classes = student.shape[:-1].numel(), student.shape[-1]
    T = compute_dtype(student, teacher)
    (by_student, by_teacher), _ = _gradients(student, teacher, (needs_student, needs_teacher))
    by_rows = torch.empty(student.shape[:-1], dtype=T, device=student.device)
    v_student, v_teacher, grads, target, row_weight = map(
        _contiguous, (v_student, v_teacher, grad_rows, target, row_weight)
    )
    config = _SECOND.find(student.device, T.itemsize, classes)
    BC = min(config.meta["ELEMENTS"], triton.next_power_of_2(classes))
    BP = min(config.meta["ELEMENTS"] // BC, triton.next_power_of_2(max(1, rows)))
    launch(
        triton_second_order.second, (triton.cdiv(rows, BP),), v_student, v_teacher, grads, student, teacher, target,
        row_weight, by_rows, by_student if needs_student else None, by_teacher if needs_teacher else None, rows, inner,
        classes, *strides, ignore_index, temperature, beta, hard_weight, smoothing, *caps,
        DIVERGENCE=DIVERGENCES.index(divergence), **capped, HARD=hard_weight != 0, T=DTYPES[T], BP=BP, BC=BC,
        config=config._replace(meta={}),
    )  # fmt: skip
    return by_rows, by_student, by_teacher
