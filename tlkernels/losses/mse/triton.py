"""Kernels of mse and rmse for GPUs.

Bytes: input, target and weight are read once; gradients are written once. Errors are added up in float32 within a
program and in float64 over programs, in a fixed order.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import Config, Example, Table, launch
from tlkernels._core.triton.kernels import DTYPES, number, scale_, sum_of


@triton.jit
def _squares(
    input,
    target,
    weight,
    upstream,  # of each error, or 0-d, or None for 1
    divisor,  # 0-d, or None for 1
    errors,
    partial,  # the sum of each program's errors
    grad_input,
    grad_target,
    n,
    factor: tl.float64,
    EACH: tl.constexpr,  # whether upstream has a number for each error
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    d = tl.load(input + i, there, other=0.0).to(T) - tl.load(target + i, there, other=0.0).to(T)
    weighted = d
    if weight is not None:
        weighted *= tl.load(weight + i, there, other=0.0).to(T)
    if errors is not None:
        tl.store(errors + i, weighted * d, there)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(weighted * d, 0))
    if grad_input is not None or grad_target is not None:
        g = number(factor, T)
        if divisor is not None:
            g /= tl.load(divisor).to(T)
        if EACH:
            grad = 2 * weighted * (g * tl.load(upstream + i, there, other=0.0).to(T))
        else:
            if upstream is not None:
                g *= tl.load(upstream).to(T)
            grad = 2 * weighted * g
        if grad_input is not None:
            tl.store(grad_input + i, grad.to(grad_input.dtype.element_ty), there)
        if grad_target is not None:
            tl.store(grad_target + i, (-grad).to(grad_target.dtype.element_ty), there)


# 2026-11-21, by reasoning, unmeasured: 16 bytes for a thread of each tensor at a time, twice, so that several loads are
# on their way before the first is used.
_TABLE = Table(
    "mse",
    Config("interpreter", 0, None, {"BLOCK": 256}, 1),
    Config("*", 8, None, {"BLOCK": 512}, 4),
    Config("*", 4, None, {"BLOCK": 1024}, 4),
    Config("*", 2, None, {"BLOCK": 2048}, 4),
)


def forward(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the squared errors times the weights."""
    errors = torch.empty_like(input, dtype=compute_dtype(input))
    _run(input, target, weight, errors=errors)
    return errors


def total(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return their sum."""
    return step(input, target, weight, None, 1.0, False, False)[0]


def backward(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, needs_input: bool, needs_target: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients for `grad`, of their sum or of each."""
    grads = _empty_gradients(input, target, needs_input, needs_target)
    _run(input, target, weight, upstream=grad, grads=grads)
    return grads


def step(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    factor: float,
    needs_input: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor * sum / divisor with its gradients."""
    grads = _empty_gradients(input, target, needs_input, needs_target)
    loss = input.new_empty((), dtype=compute_dtype(input))
    _run(input, target, weight, divisor=divisor, factor=factor, grads=grads, loss=loss)
    return loss, *grads


def _empty_gradients(input: Tensor, target: Tensor, *needs: bool) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.empty_like(tensor) if need else tensor.new_empty((0,))
        for tensor, need in zip((input, target), needs, strict=True)
    )
    return first, second


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    upstream: Tensor | None = None,
    divisor: Tensor | None = None,
    factor: float = 1.0,
    errors: Tensor | None = None,
    grads: tuple[Tensor, ...] = (),
    loss: Tensor | None = None,
) -> None:
    n = input.numel()
    if upstream is not None and not any(upstream.stride()):
        upstream = upstream.as_strided((), ())  # such as the gradient of a sum
    each = upstream is not None and upstream.dim() > 0
    results = [result if result is not None and result.numel() else None for result in (errors, *grads)]
    flat = _in_one_order(input, target, weight, upstream if each else None, *results)
    *read, g, written, grad_input, grad_target = flat if grads else (*flat, None, None)

    def launches(config: Config) -> None:
        programs = triton.cdiv(n, config.meta["BLOCK"])
        partial = input.new_empty(programs, dtype=compute_dtype(input)) if loss is not None else None
        launch(
            _squares, (programs,), *read, g if each else upstream, divisor, written, partial, grad_input, grad_target,
            n, factor, EACH=each, T=DTYPES[compute_dtype(input)], config=config,
        )  # fmt: skip
        if loss is not None and partial is not None:
            sum_of(partial, loss, factor, divisor)

    _TABLE.run(input.device, input.element_size(), n, launches)
    for result, filled in zip(results, (written, grad_input, grad_target), strict=False):
        if result is not None and filled is not None and filled is not result:
            result.copy_(filled)


def _in_one_order(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors so that one offset is the same element in each: themselves, or copies."""
    given = [tensor for tensor in tensors if tensor is not None]
    strides = given[0].stride()
    if all(tensor.stride() == strides for tensor in given) and (
        given[0].is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(given[0])
    ):
        return list(tensors)
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _tensors(dtype: torch.dtype, n: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.empty(n, dtype=dtype, device="meta")
    return x, x, x if weighted else None


_WIDE = {"_squares": ("LDG.E.128", "STG.E.128")}


def examples() -> Iterator[Example]:
    """Yield calls that take every kernel and every row of the table."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for weighted in (False, True):
            x = _tensors(dtype, 2**20, weighted)
            yield Example(f"step-{dtype}-{weighted}", partial(step, *x, None, 1.0, True, True), _WIDE)
        yield Example(f"scale-{dtype}", partial(scale_, x[0], x[0].new_empty(())), {"_scale": _WIDE["_squares"]})
    x = _tensors(torch.bfloat16, 2**20, True)
    yield Example("forward", partial(forward, *x), _WIDE)
    yield Example("backward", partial(backward, x[0], *x, True, False), _WIDE)
