"""Cross entropy with `inplace_grad=True`: the backward writes the gradient over the input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core.ops import take_memory
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.cross_entropy.second_order import target_gradient

_OVERWRITTEN = (
    "This tensor was the input of tlkernels.cross_entropy(inplace_grad=True),"
    " whose backward has given its memory to the gradient."
)


def rows(input: Tensor, target: Tensor, options: Options, ops: Any, stats: bool) -> Any:
    """Return (loss, peak, log_sum), or with `stats` (loss, peak, log_sum, entropy, correct)."""
    return _InplaceLoss.apply(input, target, options, ops, stats)  # type: ignore[no-untyped-call]


class _InplaceLoss(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, options: Options, ops: Any, stats: bool) -> Any:
        output = (ops.forward_stats if stats else ops.forward)(input, target, *options)
        _, peak, log_sum, *others = output
        entropy, correct = others or (None, None)
        ctx.mark_non_differentiable(peak, correct if stats else log_sum)
        ctx.save_for_backward(input, target, options.weight, peak, log_sum, entropy)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.ops = options._replace(weight=None), ops
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any, grad_lse: Tensor | None, *others: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace_grad=True: the gradient overwrites the input, so it cannot be differentiated again"
            )
        input, target, weight, peak, log_sum, entropy = ctx.saved_tensors
        grad_entropy, _ = others or (None, None)
        options = ctx.options._replace(weight=weight)
        grad_loss = torch.zeros_like(peak) if grad_loss is None else grad_loss
        needs_input, needs_target = ctx.needs_input_grad[:2]
        # This reads the input, so it comes before the input is overwritten.
        grad_target = target_gradient(grad_loss, input, target, options) if needs_target else None
        grad_input = None
        if needs_input:
            input = input.detach()
            upstream = grad_loss, grad_lse, grad_entropy
            ctx.ops.backward_(*upstream, input, target, peak, log_sum, entropy, *options)
            torch.autograd.graph.increment_version(input)  # shared with the tensor that autograd knows
            grad_input = take_memory(input, _OVERWRITTEN)
        return grad_input, grad_target, None, None, None
