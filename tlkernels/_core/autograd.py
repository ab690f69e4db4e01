"""Autograd that losses share: a gradient computed along with the loss, and derivatives of gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from tlkernels._core import native, triton
from tlkernels._core.library import scale_

Tensors = Sequence[Tensor | None]
Step = Callable[[Tensors, Sequence[bool]], tuple[Tensor, list[Tensor | None]]]
Backward = Callable[[Tensor, Tensors, Sequence[bool]], list[Tensor | None]]
Again = Callable[[Tensors], Tensor]
Scale = Callable[[Tensor, Tensor], Tensor]

_ON_DEVICE = native.served("scale_")
"""The types of devices on which the extension multiplies gradients by their upstream without reading it on the host."""


def plain(*tensors: Tensor | None) -> bool:
    """Return whether nothing but plain autograd will ask for derivatives: no compiler, transform, forward mode."""
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # such as activation checkpointing
    )


def differentiate(again: Again, tensors: Tensors, needs: Sequence[bool], upstream: Tensor) -> list[Tensor | None]:
    """Return the gradients of `again(tensors)` where needed, themselves differentiable to any order.

    `again` is the loss in plain PyTorch. Backwards call this where `create_graph=True` asks for more derivatives.
    """
    with torch.enable_grad():
        loss = again(tensors)
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def where_needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return None in place of the gradients that an op has not computed."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def refuse_native(*tensors: Tensor | None, served: tuple[str, ...] = ("cpu",)) -> str | None:
    """Return why a native implementation without functorch support cannot serve a call with these tensors, or None.

    `served` are the types of devices that it has kernels for (`native.served`).
    """
    if not native.available():
        return native.why_not()
    for tensor in tensors:
        if tensor is not None and tensor.device.type not in served:
            kinds = " and ".join(kind.upper() for kind in served)
            return f"it serves {kinds} tensors; there is one on {tensor.device}"
    return _refuse_transforms()


def refuse_triton(*tensors: Tensor | None) -> str | None:
    """Return why a Triton implementation without functorch support cannot serve a call with these tensors, or None."""
    return triton.refuse_triton(*tensors) or _refuse_transforms()


def _refuse_transforms() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms go through the reference"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives go through the reference"
    return None


def one_sweep(
    step: Step, again: Again, *tensors: Tensor | None, dtype: torch.dtype | None = None, by_triton: bool = False
) -> Tensor:
    """Return a loss whose gradients are computed along with it; only where `plain(*tensors)`, and for a 0-d loss.

    The first backward gives the gradients away, so that theirs is the only memory; a second one computes them again,
    and one that is to be differentiated (`create_graph=True`) goes through `again`.

    Args:
        step: (tensors, whether each needs a gradient) -> the loss and a fresh gradient for each that does.
        again: the same loss of the same tensors in plain PyTorch.
        tensors: what may need a gradient; `step` and `again` hold everything else.
        dtype: of the loss, where `step` may give another. A cast outside would be one more node of the graph, and on a
            GPU one more launch in the backward.
        by_triton: whether `step` is Triton's. Where the extension has no kernel for the device, Triton's multiplies
            gradients by their upstream.
    """
    needs = [_needs_grad(tensor) for tensor in tensors]
    with torch.no_grad():
        loss, grads = step(tensors, needs)
        if dtype is not None and loss.dtype != dtype:
            loss = loss.to(dtype)
    if not any(needs):
        return loss
    scale = _scale(loss.device.type, by_triton)

    def compute(upstream: Tensor, tensors: Tensors, needs: Sequence[bool], create_graph: bool) -> list[Tensor | None]:
        if create_graph:
            return differentiate(again, tensors, needs, upstream)
        return [
            grad if grad is None else scale(grad, upstream) for grad in where_needed(step(tensors, needs)[1], needs)
        ]

    return _attach(loss, tensors, grads, compute, scale)


def two_sweeps(loss: Tensor, backward: Backward, again: Again, *tensors: Tensor | None) -> Tensor:
    """Return `loss`, computed without autograd, with a gradient by `tensors`; only where `plain(*tensors)`.

    For what `one_sweep` does not serve: an upstream gradient for each row, or one that the gradient must not be rounded
    without, as in float16.

    Args:
        loss: its own history is replaced.
        backward: (upstream, tensors, whether each needs a gradient) -> a gradient for each that does.
        again, tensors: as of `one_sweep`.
    """

    def compute(upstream: Tensor, tensors: Tensors, needs: Sequence[bool], create_graph: bool) -> list[Tensor | None]:
        if create_graph:
            return differentiate(again, tensors, needs, upstream)
        return backward(upstream, tensors, needs)

    return _attach(loss, tensors, [], compute) if any(map(_needs_grad, tensors)) else loss


def _scale(device: str, by_triton: bool) -> Scale:
    """Return what multiplies a gradient in place by its upstream, on that type of device."""
    if device in _ON_DEVICE:
        return _by_extension
    return _by_triton if by_triton else Tensor.mul_


def _by_extension(grad: Tensor, upstream: Tensor) -> Tensor:
    scale_(grad, upstream)
    return grad


def _by_triton(grad: Tensor, upstream: Tensor) -> Tensor:
    from tlkernels._core import triton_kernels

    return triton_kernels.scale_(grad, upstream)


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _attach(
    loss: Tensor, tensors: Tensors, grads: Sequence[Tensor | None], compute: Any, scale: Scale = Tensor.mul_
) -> Tensor:
    """Return `loss` as the result of `tensors`, as `native.attach` says; `scale` multiplies the gradients.

    The extension's node is faster than one of Python's, but it does not call Triton.
    """
    if native.available() and scale is not _by_triton:
        native.attach(loss, tensors, grads, compute, scale is _by_extension)
        return loss
    attached: Tensor = _Attached.apply([loss], list(grads), scale, compute, *tensors)  # type: ignore[no-untyped-call]
    return attached


class _Attached(Function):
    """What `native.attach` does."""

    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], grads: Any, scale: Any, compute: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.grads, ctx.scale, ctx.compute = grads, scale, compute
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        needs = ctx.needs_input_grad[4:]
        if ctx.grads and not torch.is_grad_enabled():
            ready, ctx.grads = where_needed(ctx.grads, needs), []
            found = [grad if grad is None else ctx.scale(grad, upstream) for grad in ready]
        else:
            found = ctx.compute(upstream, ctx.saved_tensors, needs, torch.is_grad_enabled())
        return None, None, None, None, *found
