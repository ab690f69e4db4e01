"""Cross entropy's ops under torch.func's transforms and in forward mode: vmap, jvp and any nesting of them.

An autograd.Function differentiates only its direct arguments, so `weight` is one, and `options` has None for it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.ops import one_by_one
from tlkernels.losses.cross_entropy.call import Options, class_axis
from tlkernels.losses.cross_entropy.second_order import along_target, directional, target_gradient


def rows(input: Tensor, target: Tensor, options: Options, ops: Any, stats: bool) -> Any:
    """Return (loss, peak, log_sum), or with `stats` (loss, peak, log_sum, entropy, correct)."""
    weight, options = options.weight, options._replace(weight=None)
    return _LossPerRow.apply(input, target, weight, options, ops, stats)  # type: ignore[no-untyped-call]


class _LossPerRow(Function):
    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, options: Options, ops: Any, stats: bool) -> Any:
        options = options._replace(weight=weight)
        return (ops.forward_stats if stats else ops.forward)(input, target, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, weight, ctx.options, ctx.ops, ctx.stats = inputs
        _, peak, log_sum, *others = output
        entropy, correct = others or (None, None)
        ctx.mark_non_differentiable(peak, correct if ctx.stats else log_sum)
        ctx.save_for_backward(input, target, weight, peak, log_sum, entropy)
        ctx.save_for_forward(input, target, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any, grad_lse: Tensor | None, *others: Any) -> Any:
        input, target, weight, peak, log_sum, entropy = ctx.saved_tensors
        grad_entropy, _ = others or (None, None)
        grad_loss = torch.zeros_like(peak) if grad_loss is None else grad_loss
        needs_input, needs_target, needs_weight, *_ = ctx.needs_input_grad
        if needs_weight:
            raise NotImplementedError("weight: cross_entropy's kernels compute no gradient for it")
        grad_input = grad_target = None
        if needs_input:
            normaliser = peak.detach(), log_sum.detach(), None if grad_entropy is None else entropy.detach()
            tensors = grad_loss, grad_lse, grad_entropy, input, target, weight, *normaliser
            grad_input = _Gradient.apply(*tensors, ctx.options, ctx.ops)  # type: ignore[no-untyped-call]
        if needs_target:
            grad_target = target_gradient(grad_loss, input, target, ctx.options._replace(weight=weight))
        return grad_input, grad_target, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, target_t: Tensor | None, weight_t: Tensor | None, *_: Any) -> Any:
        input, target, weight = ctx.saved_tensors
        options = ctx.options._replace(weight=weight)
        if weight_t is not None:
            raise NotImplementedError("weight: cross_entropy's kernels compute no derivative by it")
        ones = torch.ones_like(input.select(class_axis(input), 0), dtype=compute_dtype(input))
        zeros = torch.zeros_like(ones)
        loss_t, lse_t, entropy_t = zeros, zeros, zeros
        if input_t is not None:
            along = directional(input_t, ones, None, zeros if ctx.stats else None, input, target, options)
            loss_t, lse_t = along.loss, along.lse
            entropy_t = zeros if along.entropy is None else along.entropy
        if target_t is not None:
            slope = target_gradient(ones, input, target, options)
            loss_t = loss_t + (slope * target_t).sum(class_axis(input))
        return (loss_t, None, lse_t, entropy_t, None) if ctx.stats else (loss_t, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        input, target, weight, *rest = args
        input_dim, target_dim, weight_dim, *_ = in_dims
        if weight_dim is not None:
            return one_by_one(_LossPerRow.apply, info, in_dims, *args)  # the op takes one weight for all
        batch, rows = info.batch_size, _has_rows(input, input_dim)
        folded = _fold(input, input_dim, batch, rows), _fold(target, target_dim, batch, rows)
        output = _LossPerRow.apply(*folded, weight, *rest)  # type: ignore[no-untyped-call]
        return tuple(_unfold(tensor, batch, rows) for tensor in output), (0,) * len(output)


class _Gradient(Function):
    """The gradient of `input`."""

    @staticmethod
    def forward(
        grad_loss: Tensor,
        grad_lse: Tensor | None,
        grad_entropy: Tensor | None,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        peak: Tensor,
        log_sum: Tensor,
        entropy: Tensor | None,
        options: Options,
        ops: Any,
    ) -> Tensor:
        options = options._replace(weight=weight)
        upstream, normaliser = (grad_loss, grad_lse, grad_entropy), (peak, log_sum, entropy)
        grad: Tensor = ops.backward(*upstream, input, target, *normaliser, *options)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options, ctx.ops = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, direction: Tensor | None) -> Any:
        if direction is None:
            return (None,) * 11
        grad_loss, grad_lse, grad_entropy, input, target, weight, *_ = ctx.saved_tensors
        _, needs_lse, needs_entropy, _, needs_target, needs_weight, *_ = ctx.needs_input_grad
        if needs_weight:
            raise NotImplementedError("weight: cross_entropy's kernels compute no gradient for it")
        options = ctx.options._replace(weight=weight)
        along = directional(direction, grad_loss, grad_lse, grad_entropy, input, target, options)
        by_lse, by_entropy = along.lse if needs_lse else None, along.entropy if needs_entropy else None
        return along.loss, by_lse, by_entropy, along.input, along.target if needs_target else None, *(None,) * 6

    @staticmethod
    def jvp(
        ctx: Any, loss_t: Any, lse_t: Any, entropy_t: Any, input_t: Any, target_t: Any, weight_t: Any, *_: Any
    ) -> Any:
        grad_loss, grad_lse, grad_entropy, input, target, weight, *normaliser = ctx.saved_tensors
        options = ctx.options._replace(weight=weight)
        if weight_t is not None:
            raise NotImplementedError("weight: cross_entropy's kernels compute no derivative by it")
        total = torch.zeros_like(input)
        if input_t is not None:  # the second derivative is symmetric
            total = total + directional(input_t, grad_loss, grad_lse, grad_entropy, input, target, options).input
        if target_t is not None:
            total = total + along_target(target_t, grad_loss, input, target, options)
        if not (loss_t is None and lse_t is None and entropy_t is None):
            loss_t = torch.zeros_like(grad_loss) if loss_t is None else loss_t
            linear = loss_t, lse_t, entropy_t, input, target, weight, *normaliser
            total = total + _Gradient.apply(*linear, ctx.options, ctx.ops)  # type: ignore[no-untyped-call]
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        _, _, _, input, _, weight, _, _, _, *rest = args
        _, _, _, input_dim, _, weight_dim, *_ = in_dims
        if weight_dim is not None:
            return one_by_one(_Gradient.apply, info, in_dims, *args)
        batch, rows = info.batch_size, _has_rows(input, input_dim)
        tensors = [
            tensor if tensor is None or tensor is weight else _fold(tensor, dim, batch, rows)
            for tensor, dim in zip(args[: -len(rest)], in_dims, strict=False)
        ]
        grad = _Gradient.apply(*tensors, *rest)  # type: ignore[no-untyped-call]
        return _unfold(grad, batch, rows), 0


def _fold(tensor: Tensor, axis: int | None, batch: int, rows: bool) -> Tensor:
    """Move vmap's batch axis to the front, and flatten it into the rows where the tensor has rows."""
    tensor = tensor.expand(batch, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.flatten(0, 1) if rows else tensor


def _has_rows(input: Tensor, axis: int | None) -> bool:
    return input.dim() - (axis is not None) > 1


def _unfold(tensor: Tensor, batch: int, rows: bool) -> Tensor:
    return tensor.reshape(batch, -1, *tensor.shape[1:]) if rows else tensor
