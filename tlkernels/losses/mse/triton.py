"""Mean squared error and its root in Triton: kernel and launches.

Bytes: input, target and weight are read once; gradients are written once. Errors are summed in float32 within a
program and in float64 over programs, in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton.kernels import DTYPES, number, sum_of
from tlkernels._core.triton.launch import Config, Table, launch


@triton.jit
def _squares(
    input, target,  # (n,)
    weight,  # (n,), or None for 1
    upstream,  # (n,) with EACH, else 0-d, or None for 1
    divisor,  # 0-d, divides upstream; or None for 1
    errors,  # result, (n,), or None
    partial,  # result: the sum of each program's errors, or None
    grad_input, grad_target,  # results, (n,), or None
    n,
    factor: tl.float64,  # multiplies upstream
    EACH: tl.constexpr,
    T: tl.constexpr,  # dtype of the arithmetic
    BLOCK: tl.constexpr,  # elements of a program
):  # fmt: skip
    """Write the weighted squared errors, their sum, and the gradients, those that are given."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    d = tl.load(input + i, mask, other=0.0).to(T) - tl.load(target + i, mask, other=0.0).to(T)
    weighted = d
    if weight is not None:
        weighted *= tl.load(weight + i, mask, other=0.0).to(T)
    if errors is not None:
        tl.store(errors + i, weighted * d, mask)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(weighted * d, 0))
    if grad_input is not None or grad_target is not None:
        g = number(factor, T)
        if divisor is not None:
            g /= tl.load(divisor).to(T)
        if EACH:
            grad = 2 * weighted * (g * tl.load(upstream + i, mask, other=0.0).to(T))
        else:
            if upstream is not None:
                g *= tl.load(upstream).to(T)
            grad = 2 * weighted * g
        if grad_input is not None:
            tl.store(grad_input + i, grad.to(grad_input.dtype.element_ty), mask)
        if grad_target is not None:
            tl.store(grad_target + i, (-grad).to(grad_target.dtype.element_ty), mask)


# 2026-11-21, by reasoning, unmeasured: a thread loads 16 bytes of each tensor at a time, twice, so that several loads
# are issued before the first is used.
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
    """Return the sum of the squared errors times the weights."""
    loss, *_ = step(input, target, weight, None, 1.0, (False, False))
    return loss


def backward(
    grad: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients, given that of the sum, or of each error; one that is not needed is an empty tensor."""
    grads = _empty_gradients(input, target, needs)
    _run(input, target, weight, upstream=grad, grads=grads)
    return grads


def step(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    factor: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor * sum / divisor and its gradients."""
    grads = _empty_gradients(input, target, needs)
    loss = input.new_empty((), dtype=compute_dtype(input))
    _run(input, target, weight, divisor=divisor, factor=factor, grads=grads, loss=loss)
    return loss, *grads


def _empty_gradients(input: Tensor, target: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
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
    """Fill the results that are given, for upstream * factor / divisor of the errors; `loss` is 0-d, their sum."""
    n = input.numel()
    if upstream is not None and not any(upstream.stride()):
        upstream = upstream.as_strided((), ())  # an expanded number, such as the gradient of a sum
    each = upstream is not None and upstream.dim() > 0
    grad_input, grad_target = (grad if grad.numel() else None for grad in grads) if grads else (None, None)
    results = errors, grad_input, grad_target
    x, y, w, g, *filled = _in_one_order(input, target, weight, upstream if each else None, *results)

    def launches(config: Config) -> None:
        programs = triton.cdiv(n, config.meta["BLOCK"])
        partial = input.new_empty(programs, dtype=compute_dtype(input)) if loss is not None else None
        filled_errors, *filled_grads = filled
        launch(
            _squares, (programs,), x, y, w, g if each else upstream, divisor, filled_errors, partial, *filled_grads,
            n, factor, EACH=each, T=DTYPES[compute_dtype(input)], config=config,
        )  # fmt: skip
        if loss is not None and partial is not None:
            sum_of(partial, loss, factor, divisor)

    _TABLE.run(input.device, input.element_size(), n, launches)
    for result, copy in zip(results, filled, strict=True):
        if result is not None and copy is not None and copy is not result:
            result.copy_(copy)


def _in_one_order(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors of which an offset is the same element in each: the given ones, or copies."""
    given = [tensor for tensor in tensors if tensor is not None]
    strides = given[0].stride()
    if all(tensor.stride() == strides for tensor in given) and (
        given[0].is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(given[0])
    ):
        return list(tensors)
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
