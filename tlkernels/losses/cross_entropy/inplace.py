"""Cross entropy with `inplace_grad=True`: the backward writes the gradient over the input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core.ops import take_memory
from tlkernels.losses.cross_entropy.second_order import target_gradient

_OVERWRITTEN = (
    "This tensor was the input of tlkernels.cross_entropy(inplace_grad=True),"
    " whose backward has given its memory to the gradient."
)


def rows(*args: Any) -> Any:
    """Return (loss, peak, log_sum[, entropy, correct]) of (input, target, weight, other options, ops, stats)."""
    return _Overwriting.apply(*args)  # type: ignore[no-untyped-call]


class _Overwriting(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, numbers: Any, ops: Any, stats: bool
    ) -> Any:
        output = (ops.forward_stats if stats else ops.forward)(input, target, weight, *numbers)
        _, peak, log_sum, *others = output
        ctx.mark_non_differentiable(peak, *((*others,) if stats else (log_sum,)))
        ctx.save_for_backward(input, target, weight, peak, log_sum)
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.ops = numbers, ops
        return output

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, _: Any, by_lse: Tensor | None, *others: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_grad=True: the gradient overwrites the input, so it cannot be differentiated again"
            )
        input, target, weight, peak, log_sum = ctx.saved_tensors
        by_loss = torch.zeros_like(peak) if by_loss is None else by_loss
        needs_input, needs_target = ctx.needs_input_grad[:2]
        # Before the input is gone.
        grad_target = target_gradient(by_loss, input, target, weight, ctx.numbers) if needs_target else None
        grad_input = None
        if needs_input:
            input = input.detach()
            ctx.ops.backward_(by_loss, by_lse, input, target, peak, log_sum, weight, *ctx.numbers)
            torch.autograd.graph.increment_version(input)  # shared with the tensor that autograd knows
            grad_input = take_memory(input, _OVERWRITTEN)
        return grad_input, grad_target, None, None, None, None
