"""Autograd that losses share: a gradient computed along with the loss, and derivatives of gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

Tensors = Sequence[Tensor | None]
Step = Callable[[Tensors, Sequence[bool]], tuple[Tensor, list[Tensor | None]]]
Again = Callable[[Tensors], Tensor]


def plain(*tensors: Tensor | None) -> bool:
    """Return whether nothing but plain autograd will ask for derivatives: no compiler, transform, forward mode, hook."""
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


class _OneSweep(Function):
    @staticmethod
    def forward(ctx: Any, step: Step, again: Again, *tensors: Tensor | None) -> Tensor:
        loss, ctx.grads = step(tensors, ctx.needs_input_grad[2:])
        ctx.step, ctx.again = step, again
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        needs = ctx.needs_input_grad[2:]
        grads, ctx.grads = ctx.grads, None
        if torch.is_grad_enabled():
            return None, None, *differentiate(ctx.again, ctx.saved_tensors, needs, upstream)
        if grads is None:
            _, grads = ctx.step(ctx.saved_tensors, needs)
        if upstream.device.type != "cpu" or upstream.item() != 1:
            grads = [None if grad is None else grad.mul_(upstream.to(grad.dtype)) for grad in grads]
        return None, None, *grads


def one_sweep(step: Step, again: Again, *tensors: Tensor | None) -> Tensor:
    """Return a 0-d loss whose gradients are computed along with it; only where `plain(*tensors)`.

    The first backward gives the gradients away, so that theirs is the only memory; a second one computes them again,
    and one that is to be differentiated (`create_graph=True`) goes through `again`.

    Args:
        step: (tensors, whether each needs a gradient) -> the loss and a fresh gradient for each that does.
        again: the same loss of the same tensors in plain PyTorch.
        tensors: what may need a gradient; `step` and `again` hold everything else.
    """
    loss: Tensor = _OneSweep.apply(step, again, *tensors)  # type: ignore[no-untyped-call]
    return loss
