"""Cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss takes its gradient along. Elsewhere an op gives the loss of each row and another its
gradient, each differentiable by a rule of its own, and the reduction is plain PyTorch. Under torch.func's transforms
and in forward mode `transforms.py` stands around the two ops.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from tlkernels._core import native, triton
from tlkernels._core.autograd import (
    Args,
    Needs,
    Rule,
    Sweep,
    Tensors,
    apply,
    differentiable,
    in_pytorch,
    one_sweep,
    plain,
    refuse_native,
    refuse_transforms,
    refuse_triton,
    two_sweeps,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.ops import define
from tlkernels._core.reduction import reduce
from tlkernels.losses.cross_entropy import inplace, reference, transforms
from tlkernels.losses.cross_entropy.call import Call, CrossEntropyOutput, Options
from tlkernels.losses.cross_entropy.second_order import directional, target_gradient

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
_DIFFERENTIABLE = ("fwd", "fwd_stats", "bwd")
NATIVE = Ops(
    *(define(f"cross_entropy_{name}{schema}", fake, name in _DIFFERENTIABLE) for name, schema, fake in _SCHEMAS[:6])
)
_SERVED = native.served("cross_entropy_fwd")
TRITON = Ops(
    *(
        triton.define(
            f"cross_entropy_{name}_triton{schema}",
            fake,
            "tlkernels.losses.cross_entropy.triton",
            function,
            name in _DIFFERENTIABLE,
        )
        for function, (name, schema, fake) in zip(Ops._fields, _SCHEMAS, strict=True)
    )
)


def _rule(ops: Ops, stats: bool) -> Rule:
    """The loss of each row, with `stats` its log_sum too, which makes the lse."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        input, target, weight, *numbers, peak, log_sum = args
        by_loss, by_lse = upstreams if stats else (*upstreams, None)
        by_loss = torch.zeros_like(peak) if by_loss is None else by_loss
        return (
            ops.backward(by_loss, by_lse, input, target, peak.detach(), log_sum.detach(), weight, *numbers)
            if needs[0]
            else None,
            target_gradient(by_loss, input, target, weight, numbers) if needs[1] else None,
        )

    return Rule(2, backward, None, results=(0, 2) if stats else (0,), kept=(1, 2))


def _gradient_rule(ops: Ops) -> Rule:
    """The gradient of the input, args being those of `ops.backward`."""

    def backward(directions: Tensors, args: Args, needs: Needs) -> Tensors:
        (direction,) = directions
        assert direction is not None
        by_loss, by_lse, input, target, _, _, weight, *numbers = args
        if ops.directional is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            found = directional(direction, by_loss, by_lse, input, target, weight, numbers)
        else:
            found = ops.directional(direction, by_loss, by_lse, input, target, weight, *numbers)
        return where_needed(found, needs)

    return Rule(4, backward, None)


def _rows_sweep(ops: Ops) -> Rule:
    """The reduced loss, behind whose arguments come those that are kept, and what divides the sum."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        (upstream,) = upstreams
        assert upstream is not None
        input, target, weight, *numbers, peak, log_sum, denominator, _ = args
        upstream = (upstream.to(peak.dtype) / denominator).expand(peak.shape)
        return (ops.backward(upstream, None, input, target, peak, log_sum, weight, *numbers),)

    return Rule(1, backward, lambda args: _again(ops, (*args[:-4], args[-1])))


def _sweep(ops: Ops) -> Sweep:
    """The reduced loss; behind the options comes the reduction."""

    def step(args: Args, needs: Needs) -> tuple[Tensor, Tensors]:
        *args, reduction = args
        if needs[0]:
            loss, grad = ops.step(*args, reduction == "mean")
            return loss, (grad,)
        return ops.total(*args, reduction == "mean"), (None,)

    return Sweep(1, step, partial(_again, ops), by_triton=ops is TRITON)


def _again(ops: Ops, args: Args) -> Tensor:
    input, target, *options, reduction = args
    call = Call(input, target, Options(*options), reduction, inplace_grad=False, stats=False)
    # Triton has a kernel of the second derivative.
    loss = _run_rows(ops, call) if ops.directional else reference.cross_entropy(call)
    assert isinstance(loss, Tensor)
    return loss


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, stats=False), _ops.backward)
    differentiable(_ops.forward_stats, _rule(_ops, stats=True))
    differentiable(_ops.backward, _gradient_rule(_ops), _ops.directional)
_SWEEPS = {ops: _sweep(ops) for ops in (NATIVE, TRITON)}
_ROWS_SWEEPS = {ops: _rows_sweep(ops) for ops in (NATIVE, TRITON)}


def _run(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    input, target, options, reduction = call[:4]
    args = input, target, *options
    if call.stats or call.inplace_grad or target.requires_grad or not plain(*args):
        return _run_rows(ops, call)
    # A float16 gradient waits for the loss scale that comes with its upstream: before, small values would be 0.
    if reduction == "none" or input.dtype == torch.float16:
        with torch._C._AutoDispatchBelowAutograd():
            rows, *kept = ops.forward(*args)
            denominator = call.denominator() if reduction == "mean" else 1
            loss = reduce(rows, denominator, reduction).to(call.dtype)
        return two_sweeps(loss, _ROWS_SWEEPS[ops], *args, *kept, denominator, reduction)
    return one_sweep(_SWEEPS[ops], *args, reduction, dtype=call.dtype)


def _run_rows(ops: Ops, call: Call) -> Tensor | CrossEntropyOutput:
    input, target, (weight, *numbers), reduction = call.input, call.target, call.options, call.reduction
    if call.inplace_grad or _transformed():
        results = (inplace if call.inplace_grad else transforms).rows(input, target, weight, numbers, ops, call.stats)
    else:
        results = apply(ops.forward_stats if call.stats else ops.forward, input, target, weight, *numbers)
    rows, peak, log_sum, *stats = results
    loss = reduce(rows, call.denominator() if reduction == "mean" else 1, reduction).to(call.dtype)
    if not call.stats:
        return loss
    lse = peak * ((call.options.softcap or 1) / call.options.temperature) + log_sum
    return CrossEntropyOutput(loss, lse, *stats)


def _transformed() -> bool:
    compiling = torch.compiler.is_compiling()
    return not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _tensors(call: Call) -> Tensors:
    return call.input, call.target, call.options.weight


def _refuse_native(call: Call) -> str | None:
    return refuse_native(*_tensors(call), served=_SERVED) or _refuse_kernels(call)


def _refuse_triton(call: Call) -> str | None:
    return refuse_triton(*_tensors(call)) or _refuse_kernels(call)


def _refuse_kernels(call: Call) -> str | None:
    if call.options.weight is not None and call.options.weight.requires_grad:
        return "it gives no gradient for weight, which requires one"
    compiling, transformed = torch.compiler.is_compiling(), _transformed()
    if call.inplace_grad and (compiling or transformed):
        return "inplace_grad=True needs plain autograd, not torch.compile or a torch.func transform"
    if compiling:
        return refuse_transforms()
    if transformed and sum(i.key() == TransformType.Jvp for i in retrieve_all_functorch_interpreters()) > 1:
        return "forward-mode differentiation within another gives an autograd.Function zeros"
    return None


def _refuse_reference(call: Call) -> str | None:
    return "it never overwrites its input, as inplace_grad=True asks" if call.inplace_grad else None


IMPLEMENTATIONS = (
    Implementation("native", _refuse_native, partial(_run, NATIVE)),
    Implementation("triton", _refuse_triton, partial(_run, TRITON), by_name_only=triton.INTERPRETED),
    Implementation("reference", _refuse_reference, in_pytorch(reference.cross_entropy)),
)
