"""Cross entropy's ops under torch.func's transforms and in forward mode: vmap, jvp and any nesting of them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.ops import one_by_one
from tlkernels.losses.cross_entropy.call import class_axis
from tlkernels.losses.cross_entropy.second_order import along_target, directional, target_gradient


def rows(*args: Any) -> Any:
    """Return (loss, peak, log_sum[, entropy, correct]) of (input, target, weight, other options, ops, stats)."""
    return _Rows.apply(*args)  # type: ignore[no-untyped-call]


class _Rows(Function):
    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, numbers: Any, ops: Any, stats: bool) -> Any:
        return (ops.forward_stats if stats else ops.forward)(input, target, weight, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, weight, ctx.numbers, ctx.ops, ctx.stats = inputs
        _, peak, log_sum, *others = output
        ctx.mark_non_differentiable(peak, *((*others,) if ctx.stats else (log_sum,)))
        ctx.save_for_backward(input, target, weight, peak, log_sum)
        ctx.save_for_forward(input, target, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, _: Any, by_lse: Tensor | None, *others: Any) -> Any:
        input, target, weight, peak, log_sum = ctx.saved_tensors
        by_loss = torch.zeros_like(peak) if by_loss is None else by_loss
        needs_input, needs_target, needs_weight = ctx.needs_input_grad[:3]
        if needs_weight:
            raise NotImplementedError("weight: cross_entropy's kernels give no gradient for it")
        grad_input = grad_target = None
        if needs_input:
            kept = peak.detach(), log_sum.detach()
            grad_input = _Gradient.apply(by_loss, by_lse, input, target, weight, *kept, ctx.numbers, ctx.ops)  # type: ignore[no-untyped-call]
        if needs_target:
            grad_target = target_gradient(by_loss, input, target, weight, ctx.numbers)
        return grad_input, grad_target, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, target_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Any:
        input, target, weight = ctx.saved_tensors
        if weight_t is not None:
            raise NotImplementedError("weight: cross_entropy's kernels give no derivative for it")
        ones = torch.ones_like(input.select(class_axis(input), 0), dtype=compute_dtype(input))
        loss_t = lse_t = torch.zeros_like(ones)
        if input_t is not None:
            loss_t, lse_t = directional(input_t, ones, None, input, target, weight, ctx.numbers)[:2]
        if target_t is not None:
            slope = target_gradient(ones, input, target, weight, ctx.numbers)
            loss_t = loss_t + (slope * target_t).sum(class_axis(input))
        return (loss_t, None, lse_t, None, None) if ctx.stats else (loss_t, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        input, target, weight, *rest = args
        if in_dims[2] is not None:
            return one_by_one(_Rows.apply, info, in_dims, *args)  # the op takes one weight for all
        rows = _has_rows(input, in_dims[0])
        folded = (_fold(t, d, info.batch_size, rows) for t, d in zip((input, target), in_dims, strict=False))
        output = _Rows.apply(*folded, weight, *rest)  # type: ignore[no-untyped-call]
        return tuple(_unfold(t, info.batch_size, rows) for t in output), (0,) * len(output)


class _Gradient(Function):
    """(by_loss, by_lse, input, target, weight, peak, log_sum, options without weight, ops) -> the input's gradient."""

    @staticmethod
    def forward(
        by_loss: Tensor,
        by_lse: Tensor | None,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        peak: Tensor,
        log_sum: Tensor,
        numbers: Any,
        ops: Any,
    ) -> Tensor:
        grad: Tensor = ops.backward(by_loss, by_lse, input, target, peak, log_sum, weight, *numbers)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.numbers, ctx.ops = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, direction: Tensor | None) -> Any:
        if direction is None:
            return (None,) * 9
        by_loss, by_lse, input, target, weight, *_ = ctx.saved_tensors
        v_loss, v_lse, v_input, v_target = directional(direction, by_loss, by_lse, input, target, weight, ctx.numbers)
        _, needs_lse, _, needs_target, needs_weight, *_ = ctx.needs_input_grad
        if needs_weight:
            raise NotImplementedError("weight: cross_entropy's kernels give no gradient for it")
        return v_loss, v_lse if needs_lse else None, v_input, v_target if needs_target else None, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, loss_t: Any, lse_t: Any, input_t: Any, target_t: Any, weight_t: Any, *_: Any) -> Any:
        by_loss, by_lse, input, target, weight, peak, log_sum = ctx.saved_tensors
        if weight_t is not None:
            raise NotImplementedError("weight: cross_entropy's kernels give no derivative for it")
        total = torch.zeros_like(input)
        if input_t is not None:  # the second derivative is symmetric
            total = total + directional(input_t, by_loss, by_lse, input, target, weight, ctx.numbers)[2]
        if target_t is not None:
            total = total + along_target(target_t, by_loss, input, target, weight, ctx.numbers)
        if loss_t is not None or lse_t is not None:
            loss_t = torch.zeros_like(by_loss) if loss_t is None else loss_t
            tensors = loss_t, lse_t, input, target, weight, peak, log_sum
            total = total + _Gradient.apply(*tensors, ctx.numbers, ctx.ops)  # type: ignore[no-untyped-call]
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        by_loss, by_lse, input, target, weight, peak, log_sum, *rest = args
        if in_dims[4] is not None:
            return one_by_one(_Gradient.apply, info, in_dims, *args)
        rows = _has_rows(input, in_dims[2])
        before, after = (
            [t if t is None else _fold(t, d, info.batch_size, rows) for t, d in zip(tensors, dims, strict=True)]
            for tensors, dims in (((by_loss, by_lse, input, target), in_dims[:4]), ((peak, log_sum), in_dims[5:7]))
        )
        grad = _Gradient.apply(*before, weight, *after, *rest)  # type: ignore[no-untyped-call]
        return _unfold(grad, info.batch_size, rows), 0


def _fold(tensor: Tensor, axis: int | None, batch: int, rows: bool) -> Tensor:
    """Put vmap's batch axis in front, or where the tensor has rows make it part of them."""
    tensor = tensor.expand(batch, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.flatten(0, 1) if rows else tensor


def _has_rows(input: Tensor, axis: int | None) -> bool:
    return input.dim() - (axis is not None) > 1


def _unfold(tensor: Tensor, batch: int, rows: bool) -> Tensor:
    return tensor.reshape(batch, -1, *tensor.shape[1:]) if rows else tensor
