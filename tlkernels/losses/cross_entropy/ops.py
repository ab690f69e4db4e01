"""Cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

The native path has two forms. Under plain autograd one node does it all, where it can in one sweep over the logits
(`_core/autograd.py`). Everywhere else an op gives the loss of each row, another its gradient, both with autograd of
their own (`_Rows`, `_Gradient`), and the reduction is plain PyTorch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function

from tlkernels._core import native, triton
from tlkernels._core.autograd import Tensors, one_sweep, plain, two_sweeps
from tlkernels._core.dispatch import Implementation
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.library import define, take_memory
from tlkernels._core.reduction import reduce
from tlkernels.losses.cross_entropy import reference
from tlkernels.losses.cross_entropy.call import Call, CrossEntropyOutput, class_axis
from tlkernels.losses.cross_entropy.second_order import along_target, directional, target_gradient

OPTIONS = "Tensor? weight, int ignore_index, float label_smoothing, float temperature, float? softcap, float z_loss"


def _fake_row(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    return input.new_empty(shape, dtype=dtype or compute_dtype(input))


def _fake_forward(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_row(input) for _ in range(3))


def _fake_stats(input: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return *(_fake_row(input) for _ in range(4)), _fake_row(input, torch.bool)


def _fake_directional(direction: Tensor, grad: Any, lse: Any, input: Tensor, target: Tensor, *rest: Any) -> Any:
    v_target = torch.empty_like(target) if target.is_floating_point() else input.new_empty((0,))
    return _fake_row(input), _fake_row(input), torch.empty_like(input), v_target


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Losses of rows, and the two parts of their lse: peak * softcap (or 1) / temperature + log_sum."""
    forward_stats: Any
    backward: Any
    backward_: Any
    """Writes the gradient over `input`."""
    total: Any
    """The reduced loss."""
    step: Any
    """The reduced loss with its gradient."""
    directional: Any = None
    """What second_order.directional returns, no elements for None; nothing where that serves."""


_BACKWARD = f"Tensor grad_loss, Tensor? grad_lse, {{input}}, Tensor target, Tensor peak, Tensor log_sum, {OPTIONS}"
_SCHEMAS: tuple[tuple[str, str, Any], ...] = (
    ("fwd", f"(Tensor input, Tensor target, {OPTIONS}) -> (Tensor loss, Tensor peak, Tensor log_sum)", _fake_forward),
    (
        "fwd_stats",
        f"(Tensor input, Tensor target, {OPTIONS})"
        " -> (Tensor loss, Tensor peak, Tensor log_sum, Tensor entropy, Tensor correct)",
        _fake_stats,
    ),
    (
        "bwd",
        f"({_BACKWARD.format(input='Tensor input')}) -> Tensor",
        lambda grad_loss, grad_lse, input, *rest: torch.empty_like(input),
    ),
    ("bwd_", f"({_BACKWARD.format(input='Tensor(a!) input')}) -> ()", lambda *args: None),
    (
        "total",
        f"(Tensor input, Tensor target, {OPTIONS}, bool mean) -> Tensor",
        lambda input, *rest: input.new_empty((), dtype=compute_dtype(input)),
    ),
    (
        "step",
        f"(Tensor input, Tensor target, {OPTIONS}, bool mean) -> (Tensor loss, Tensor grad)",
        lambda input, *rest: (input.new_empty((), dtype=compute_dtype(input)), torch.empty_like(input)),
    ),
    (
        "directional",
        f"(Tensor direction, Tensor grad_loss, Tensor? grad_lse, Tensor input, Tensor target, {OPTIONS})"
        " -> (Tensor v_loss, Tensor v_lse, Tensor v_input, Tensor v_target)",
        _fake_directional,
    ),
)
NATIVE = Ops(*(define(f"cross_entropy_{name}{schema}", fake) for name, schema, fake in _SCHEMAS[:6]))
_SERVED = native.served("cross_entropy_fwd")
TRITON = Ops(
    *(
        triton.define(f"cross_entropy_{name}_triton{schema}", fake, "tlkernels.losses.cross_entropy.triton", function)
        for function, (name, schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)

_OVERWRITTEN = (
    "This tensor was the input of tlkernels.cross_entropy(inplace_grad=True),"
    " whose backward has given its memory to the gradient."
)


def _apply(function: Any, *args: Any) -> Any:
    # Dynamo does not trace a Function that has a jvp, and has no use for one.
    return (function if torch.compiler.is_compiling() else _WITH_JVP[function]).apply(*args)


def _fold(tensor: Tensor, axis: int | None, batch: int, rows: bool) -> Tensor:
    """Put vmap's batch axis in front, or where the tensor has rows make it part of them."""
    tensor = tensor.expand(batch, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.flatten(0, 1) if rows else tensor


def _has_rows(input: Tensor, axis: int | None) -> bool:
    return input.dim() - (axis is not None) > 1


def _unfold(tensor: Tensor, batch: int, rows: bool) -> Tensor:
    return tensor.reshape(batch, -1, *tensor.shape[1:]) if rows else tensor


def _over_batch(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Vmap by a loop, for the rare operand that the op cannot take in a batch."""
    results = [
        _apply(function, *(a.select(d, i) if type(d) is int else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


class _Rows(Function):
    """(input, target, weight, other options, ops, stats, inplace) -> loss, peak, log_sum[, lse, entropy, correct]."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, numbers: Any, ops: Ops, stats: bool, inplace: bool
    ) -> Any:
        if not stats:
            return ops.forward(input, target, weight, *numbers)
        loss, peak, log_sum, entropy, correct = ops.forward_stats(input, target, weight, *numbers)
        _, _, temperature, softcap, _ = numbers
        return loss, peak, log_sum, peak * ((softcap or 1) / temperature) + log_sum, entropy, correct

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, weight, ctx.numbers, ctx.ops, ctx.stats, ctx.inplace = inputs
        ctx.mark_non_differentiable(*output[1:3], *output[4:])
        ctx.save_for_backward(input, target, weight, *output[1:3])
        ctx.save_for_forward(input, target, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> Any:
        input, target, weight, peak, log_sum = ctx.saved_tensors
        grad_lse = grads[2] if len(grads) > 2 else None
        if grad_loss is None:
            grad_loss = torch.zeros_like(peak)
        needs_input, needs_target, needs_weight = ctx.needs_input_grad[:3]
        if needs_weight:
            raise NotImplementedError("weight: cross_entropy's kernels give no gradient for it")
        grad_input = grad_target = None
        if needs_input and ctx.inplace:
            grad_input = _overwrite(ctx.ops, grad_loss, grad_lse, input, target, peak, log_sum, weight, ctx.numbers)
        elif needs_input:
            grad_input = _apply(
                _Gradient,
                grad_loss,
                grad_lse,
                input,
                target,
                weight,
                peak.detach(),
                log_sum.detach(),
                ctx.numbers,
                ctx.ops,
            )
        if needs_target:
            grad_target = target_gradient(grad_loss, input, target, weight, ctx.numbers)
        return grad_input, grad_target, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        input, target, weight, numbers, ops, stats, inplace = args
        if in_dims[2] is not None:
            return _over_batch(_Rows, info, in_dims, args)
        rows = _has_rows(input, in_dims[0])
        folded = (_fold(t, d, info.batch_size, rows) for t, d in zip((input, target), in_dims, strict=False))
        output = _apply(_Rows, *folded, weight, numbers, ops, stats, inplace)
        return tuple(_unfold(t, info.batch_size, rows) for t in output), (0,) * len(output)


class _RowsWithJvp(_Rows):
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
        return (loss_t, None, None, lse_t, None, None) if ctx.stats else (loss_t, None, None)


class _Gradient(Function):
    """(grad_loss, grad_lse, input, target, weight, peak, log_sum, options without weight, ops) -> its gradient."""

    @staticmethod
    def forward(
        grad_loss: Tensor,
        grad_lse: Tensor | None,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        peak: Tensor,
        log_sum: Tensor,
        numbers: Any,
        ops: Ops,
    ) -> Tensor:
        grad: Tensor = ops.backward(grad_loss, grad_lse, input, target, peak, log_sum, weight, *numbers)
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
        grad_loss, grad_lse, input, target, weight, *_ = ctx.saved_tensors
        if ctx.ops.directional is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            derivatives = directional(direction, grad_loss, grad_lse, input, target, weight, ctx.numbers)
        else:
            derivatives = ctx.ops.directional(direction, grad_loss, grad_lse, input, target, weight, *ctx.numbers)
        v_loss, v_lse, v_input, v_target = derivatives
        if ctx.needs_input_grad[4]:
            raise NotImplementedError("weight: cross_entropy's kernels give no gradient for it")
        return (
            v_loss,
            v_lse if ctx.needs_input_grad[1] else None,
            v_input,
            v_target if ctx.needs_input_grad[3] else None,
            *(None,) * 5,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if in_dims[4] is not None:
            return _over_batch(_Gradient, info, in_dims, args)
        rows = _has_rows(args[2], in_dims[2])
        folded_tensors = [
            t if t is None or position == 4 else _fold(t, d, info.batch_size, rows)
            for position, (t, d) in enumerate(zip(args[:7], in_dims, strict=False))
        ]
        return _unfold(_apply(_Gradient, *folded_tensors, *args[7:]), info.batch_size, rows), 0


class _GradientWithJvp(_Gradient):
    @staticmethod
    def jvp(ctx: Any, loss_t: Any, lse_t: Any, input_t: Any, target_t: Any, weight_t: Any, *_: Any) -> Any:
        grad_loss, grad_lse, input, target, weight, peak, log_sum = ctx.saved_tensors
        if weight_t is not None:
            raise NotImplementedError("weight: cross_entropy's kernels give no derivative for it")
        total = torch.zeros_like(input)
        if input_t is not None:  # the second derivative is symmetric
            total = total + directional(input_t, grad_loss, grad_lse, input, target, weight, ctx.numbers)[2]
        if target_t is not None:
            total = total + along_target(target_t, grad_loss, input, target, weight, ctx.numbers)
        if loss_t is not None or lse_t is not None:
            loss_t = torch.zeros_like(grad_loss) if loss_t is None else loss_t
            total = total + _apply(_Gradient, loss_t, lse_t, input, target, weight, peak, log_sum, ctx.numbers, ctx.ops)
        return total


_WITH_JVP: dict[Any, Any] = {_Rows: _RowsWithJvp, _Gradient: _GradientWithJvp}


def _overwrite(
    ops: Ops, grad_loss: Tensor, grad_lse: Tensor | None, input: Tensor, target: Tensor, peak: Tensor, log_sum: Tensor,
    *rest: Any,
) -> Tensor:  # fmt: skip
    """Return the input's gradient in the input's memory, and make every later use of the input an error."""
    if torch.is_grad_enabled():
        raise RuntimeError("inplace_grad=True: the gradient overwrites the input, so it cannot be differentiated again")
    weight, numbers = rest
    input = input.detach()
    ops.backward_(grad_loss, grad_lse, input, target, peak, log_sum, weight, *numbers)
    torch.autograd.graph.increment_version(input)  # shared with the tensor that autograd knows
    grad: Tensor = take_memory(input, _OVERWRITTEN)
    return grad


def _run_plain(ops: Ops, call: Call) -> Tensor:
    input, target, (weight, *numbers), reduction = call.input, call.target, call.options, call.reduction

    def again(tensors: Tensors) -> Tensor:
        (input,) = tensors
        if ops is TRITON:  # it has a kernel of the second derivative
            return _run_rows(ops, call._replace(input=input))  # type: ignore[arg-type, return-value]
        return reference.cross_entropy(call._replace(input=input))  # type: ignore[arg-type, return-value]

    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction == "none" or input.dtype == torch.float16:
        with torch.no_grad():
            rows, peak, log_sum = ops.forward(input, target, weight, *numbers)
            denominator = call.denominator() if reduction == "mean" else 1
            loss = reduce(rows, denominator, reduction).to(call.dtype)

        def backward_(upstream: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
            upstream = (upstream.to(rows.dtype) / denominator).expand(peak.shape)
            return [ops.backward(upstream, None, tensors[0], target, peak, log_sum, weight, *numbers)]

        return two_sweeps(loss, backward_, again, input)

    def step_(tensors: Tensors, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        sweep, grad = ops.step if needs[0] else ops.total, None
        loss = sweep(tensors[0], target, weight, *numbers, reduction == "mean")
        if needs[0]:
            loss, grad = loss
        return loss, [grad]

    return one_sweep(step_, again, input, dtype=call.dtype, by_triton=ops is TRITON)


def _run(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    if not (call.stats or call.inplace_grad or call.target.requires_grad) and plain(call.input):
        return _run_plain(ops, call)
    return _run_rows(ops, call)


def _run_rows(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    input, target, (weight, *numbers), reduction = call.input, call.target, call.options, call.reduction
    rows, _, _, *stats = _apply(_Rows, input, target, weight, numbers, ops, call.stats, call.inplace_grad)
    loss = reduce(rows, call.denominator() if reduction == "mean" else 1, reduction).to(call.dtype)
    return CrossEntropyOutput(loss, *stats) if call.stats else loss


def _refuse_native(call: Call) -> str | None:
    if not native.available():
        return native.why_not()
    if call.input.device.type not in _SERVED:
        kinds = " and ".join(kind.upper() for kind in _SERVED)
        return f"it serves {kinds} tensors; input is on {call.input.device}"
    return _refuse_kernels(call)


def _refuse_triton(call: Call) -> str | None:
    return triton.refuse_triton(call.input) or _refuse_kernels(call)


def _refuse_kernels(call: Call) -> str | None:
    if call.options.weight is not None and call.options.weight.requires_grad:
        return "it gives no gradient for weight, which requires one"
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    if call.inplace_grad and (compiling or transformed):
        return "inplace_grad=True needs plain autograd, not torch.compile or a torch.func transform"
    if transformed and sum(i.key() == TransformType.Jvp for i in retrieve_all_functorch_interpreters()) > 1:
        return "forward-mode differentiation within another gives an autograd.Function zeros"
    return None


def _refuse_reference(call: Call) -> str | None:
    return "it never overwrites its input, as inplace_grad=True asks" if call.inplace_grad else None


IMPLEMENTATIONS = (
    Implementation("native", _refuse_native, partial(_run, NATIVE)),
    Implementation("triton", _refuse_triton, partial(_run, TRITON), by_name_only=triton.INTERPRETED),
    Implementation("reference", _refuse_reference, reference.cross_entropy),
)
