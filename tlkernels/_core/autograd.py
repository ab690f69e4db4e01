"""Autograd for all losses.

A loss is an op with a `Rule`, its differentiation formula. `differentiable` registers the rule for the op, so that
`torch.compile`, `torch.export`, `make_fx`, saved-tensor hooks and tensor subclasses use it. Plain eager autograd has a
faster path: `apply` and `one_sweep` attach a node of the extension to the op's result.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map

from tlkernels._core import flops, native, ops, ranges, triton
from tlkernels._core.ops import scale_

Args = Sequence[Any]
"""The arguments of an op: tensors, None, and numbers."""
Needs = Sequence[bool]
Tensors = Sequence[Tensor | None]
Scale = Callable[[Tensor, Tensor], Tensor]

_ON_DEVICE = native.served("scale_")
"""Device types on which the extension multiplies gradients by their upstream gradient without a host sync."""


class Rule(NamedTuple):
    """How to differentiate an op by its first arguments.

    A rule holds no tensor. Autograd saves the `args` that it reads, so versions are checked, hooks are called, and
    nothing stays alive after the graph is freed.
    """

    inputs: int
    """Number of first arguments that may need a gradient."""
    backward: Callable[[Tensors, Args, Needs], Tensors]
    """(upstream of each differentiable result, args and the kept results, needs) -> a gradient for each input."""
    reference: Callable[[Args], Tensor | Tensors] | None
    """Computes the differentiable results in plain PyTorch, for higher derivatives; None if `backward` is
    differentiable."""
    results: tuple[int, ...] = (0,)
    """Indices of the op's differentiable results."""
    kept: tuple[int, ...] = ()
    """Indices of the op's results that the backward reads."""


class Sweep(NamedTuple):
    """How to compute a reduced loss along with its gradients. Like a `Rule`, it holds no tensor."""

    inputs: int
    step: Callable[..., Sequence[Any]]
    """step(*args, needs) -> the loss, and a gradient for each input, which is new and valid if the input needs one."""
    reference: Callable[[Args], Tensor]
    """Computes the loss, differentiable to any order."""
    by_triton: bool = False
    """Whether Triton multiplies the gradients by their upstream where the extension has no kernel for the device."""


_rules: dict[Any, Rule] = {}


def differentiable(op: Any, rule: Rule, backward: Any = None) -> None:
    """Register `rule`, whose gradients the op `backward` computes, as the autograd formula of `op`.

    `torch.library.register_autograd` does the same, but adds a third of a millisecond per op to the import time.
    """
    _rules[op] = rule

    def kernel(*args: Any) -> Any:
        if needs_grad(args[: rule.inputs]):
            return _Differentiable.apply(op, rule, *args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    ops.implement_autograd(op, kernel)
    if backward is not None:
        ops.implement_vmap(backward)


class _Differentiable(Function):
    """Calls an op and differentiates it by its rule."""

    @staticmethod
    def forward(ctx: Any, op: Any, rule: Rule, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(o for i, o in enumerate(outputs) if i not in rule.results))
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.range = rule, ranges.of_backward()
        _save(ctx, (*args, *(outputs[i] for i in rule.kept)))
        return output

    @staticmethod
    @ranges.around
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        rule = ctx.rule
        # A compiler traces only the first derivative, and raises an error itself if asked for another.
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        _, _, *needs = ctx.needs_input_grad
        upstreams = [grad_outputs[i] for i in rule.results]
        if all(upstream is None for upstream in upstreams):
            return (None,) * (2 + len(needs))
        grads = gradients(rule, upstreams, _saved(ctx), needs[: rule.inputs], create_graph)
        return None, None, *grads, *(None,) * (len(needs) - rule.inputs)


def _save(ctx: Any, args: Args) -> None:
    """Save the arguments of an op. Autograd does not save inference tensors, so `ctx` keeps those."""
    ctx.tracked = [isinstance(arg, Tensor) and not arg.is_inference() for arg in args]
    ctx.save_for_backward(*(arg for arg, tracked in zip(args, ctx.tracked, strict=True) if tracked))
    ctx.rest = [None if tracked else arg for arg, tracked in zip(args, ctx.tracked, strict=True)]


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)  # read once: hooks may unpack a tensor once only
    return [next(tensors) if tracked else arg for arg, tracked in zip(ctx.rest, ctx.tracked, strict=True)]


def gradients(rule: Rule | Sweep, upstreams: Tensors, args: Args, needs: Needs, create_graph: bool) -> Tensors:
    """Return the gradients of the first arguments where needed; differentiable to any order with `create_graph`."""
    if create_graph and rule.reference is not None:
        return differentiate(rule.reference, upstreams, args, needs)
    if create_graph:
        assert isinstance(rule, Rule)
        return rule.backward(upstreams, args, needs)
    # Skips the rules of the ops that this calls: nothing differentiates them, and Dynamo cannot trace the skipping.
    with nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd():
        if isinstance(rule, Rule):
            return rule.backward(upstreams, args, needs)
        _, *grads = rule.step(*args, needs)
    (upstream,) = upstreams
    assert upstream is not None
    scale = _scale(upstream.device.type, rule.by_triton)
    return [None if grad is None else _scaled(grad, upstream, scale) for grad in where_needed(grads, needs)]


def differentiate(
    reference: Callable[[Args], Tensor | Tensors], upstreams: Tensors, args: Args, needs: Needs
) -> list[Tensor | None]:
    """Return the gradients of `reference(args)` by the first arguments where needed; they have a graph."""
    with torch.enable_grad():
        # Aliases, so that a tensor passed as two arguments has two gradients.
        args = [arg.view_as(arg) if i < len(needs) and needs[i] else trackable(arg) for i, arg in enumerate(args)]
        results = reference(args)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(r, u.to(r.dtype)) for r, u in zip(results, upstreams, strict=True) if r is not None and u is not None]
        inputs = [arg for arg, need in zip(args, needs, strict=False) if need]
        grads = iter(
            torch.autograd.grad(
                [result for result, _ in pairs], inputs, [u for _, u in pairs], create_graph=True, allow_unused=True
            )
        )
    return [next(grads) if need else None for need in needs]


def trackable(arg: Any) -> Any:
    """Return a copy if `arg` is an inference tensor, which PyTorch's operators cannot save for backward.

    Dynamo does not trace the question.
    """
    if torch.compiler.is_compiling() or not isinstance(arg, Tensor):
        return arg
    return arg.clone() if arg.is_inference() else arg


def in_pytorch(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return an implementation in plain PyTorch that also takes inference tensors, where these need no gradient."""

    def run_trackable(call: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            call = tree_map(trackable, call)
        return run(call)

    return run_trackable


def where_needed(grads: Tensors, needs: Needs) -> list[Tensor | None]:
    """Return None for the gradients that are not needed, which an op has not computed."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def eager(*args: Any) -> bool:
    """Return whether `args` hold plain tensors outside of any compiler, transform, tracer and dispatch mode.

    `FlopCounterMode` counts what a call does without it.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch._C._len_torch_dispatch_stack() and not flops.counting())  # such as make_fx
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    ):
        return False
    # all() of a generator takes a microsecond longer, which is noticeable in small calls.
    for arg in args:  # noqa: SIM110
        if isinstance(arg, Tensor) and type(arg) not in PLAIN:
            return False
    return True


def plain(*args: Any) -> bool:
    """Return whether only plain autograd will differentiate a call with `args`."""
    return (
        eager(*args)
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # such as activation checkpointing
    )


PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors without operators of their own."""


def apply(op: Any, *args: Any) -> Any:
    """Return the results of `op(*args)`, differentiable by its rule."""
    rule = _rules[op]
    if len(rule.results) > 1 or not plain(*args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        results = op(*args)
    if needs_grad(args[: rule.inputs]):
        first, *others = (results,) if isinstance(results, Tensor) else results
        first = _attach(first, rule, (*args, *(others[i - 1] for i in rule.kept)), [])
        return first if isinstance(results, Tensor) else (first, *others)
    return results


def two_sweeps(loss: Tensor, rule: Rule, *args: Any) -> Tensor:
    """Return `loss`, which was computed without autograd, with `rule` as its backward; requires `plain(*args)`."""
    return _attach(loss, rule, args, []) if needs_grad(args[: rule.inputs]) else loss


def one_sweep(sweep: Sweep, *args: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a 0-d loss, computed along with its gradients; requires `plain(*args)`.

    The first backward hands out the stored gradients; no copy is kept. A second backward computes them again. With
    `create_graph=True`, `sweep.reference` is differentiated.

    Args:
        sweep: the loss.
        args: its arguments.
        dtype: the dtype of the result. A cast outside of this function would be another node of the graph, and on a
            GPU another launch in the backward.
    """
    enabled = torch.is_grad_enabled()
    needs = [enabled and arg is not None and arg.requires_grad for arg in args[: sweep.inputs]]
    with torch._C._AutoDispatchBelowAutograd():
        loss, *grads = sweep.step(*args, needs)
        if dtype is not None and loss.dtype != dtype:
            loss = loss.to(dtype)
    return _attach(loss, sweep, args, where_needed(grads, needs)) if any(needs) else loss


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a derivative by `tensor` may be asked for."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def needs_grad(args: Args) -> bool:
    """Return whether autograd will ask for the gradient of one of `args`."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def refuse_native(*tensors: Tensor | None, served: tuple[str, ...] = ("cpu",)) -> str | None:
    """Return why a native implementation cannot serve a call with these tensors, or None.

    `served` are the device types that it has kernels for (`native.served`).
    """
    if not native.available():
        return native.why_not()
    for tensor in tensors:
        if tensor is not None and tensor.device.type not in served:
            kinds = " and ".join(kind.upper() for kind in served)
            return f"supports {kinds} tensors only; got one on {tensor.device}"
    return _refuse_subclasses(*tensors)


def refuse_triton(*tensors: Tensor | None) -> str | None:
    """Return why a Triton implementation cannot serve a call with these tensors, or None."""
    return triton.refuse_triton(*tensors) or _refuse_subclasses(*tensors)


def _refuse_subclasses(*tensors: Tensor | None) -> str | None:
    """Return why kernels cannot serve these tensors if one is a subclass with its own operators, or None."""
    for tensor in tensors:
        if tensor is None or type(tensor) in PLAIN or isinstance(tensor, _TRACED):
            continue
        kind = type(tensor)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # such as DTensor
            return f"a {kind.__name__} has no implementation of the kernels' ops; the reference supports it"
    return None


_TRACED = (FakeTensor, FunctionalTensor)


def refuse_transforms() -> str | None:
    """Return why kernels without functorch support cannot serve a call at this moment, or None."""
    if torch._C._are_functorch_transforms_active():
        return "does not support torch.func transforms; the reference does"
    if forward_ad._current_level >= 0:
        return "does not support forward-mode AD; the reference does"
    return None


def _scale(device: str, by_triton: bool) -> Scale:
    """Return the function that multiplies a gradient in place by its upstream gradient on that device type."""
    if device in _ON_DEVICE:
        return _by_extension
    return _by_triton if by_triton else Tensor.mul_


def _scaled(grad: Tensor, upstream: Tensor, scale: Scale) -> Tensor:
    # With is_grads_batched, the upstream is a batch of values.
    return scale(grad, upstream) if _one_value(upstream) else grad * upstream


def _one_value(upstream: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return not (functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream))


def _by_extension(grad: Tensor, upstream: Tensor) -> Tensor:
    scale_(grad, upstream)
    return grad


def _by_triton(grad: Tensor, upstream: Tensor) -> Tensor:
    from tlkernels._core.triton import kernels as triton_kernels

    return triton_kernels.scale_(grad, upstream)


def _attach(loss: Tensor, rule: Rule | Sweep, args: Args, grads: Tensors) -> Tensor:
    """Return `loss` with `rule` as its backward; see `native.attach`.

    The extension's node is faster than a Python one, but it does not call Triton.
    """
    scale = _scale(loss.device.type, isinstance(rule, Sweep) and rule.by_triton)
    if native.available() and scale is not _by_triton:
        native.attach(loss, rule, args, grads, scale is _by_extension, ranges.of_backward())
        return loss
    attached: Tensor = _Attached.apply([loss], list(grads), scale, rule, *args)  # type: ignore[no-untyped-call]
    return attached


class _Attached(Function):
    """`native.attach` in Python."""

    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], grads: Any, scale: Any, rule: Any, *args: Any) -> Tensor:
        _save(ctx, args)
        ctx.grads, ctx.scale, ctx.rule, ctx.range = grads, scale, rule, ranges.of_backward()
        return loss[0]

    @staticmethod
    @ranges.around
    def backward(ctx: Any, upstream: Tensor) -> Any:
        rule, needs = ctx.rule, ctx.needs_input_grad[4 : 4 + ctx.rule.inputs]
        if ctx.grads and not torch.is_grad_enabled():
            stored = where_needed(ctx.grads, needs)
            if _one_value(upstream):
                ctx.grads = []
            grads = [None if grad is None else _scaled(grad, upstream, ctx.scale) for grad in stored]
        else:
            grads = list(gradients(rule, [upstream], _saved(ctx), needs, torch.is_grad_enabled()))
        return None, None, None, None, *grads, *(None,) * (len(ctx.rest) - rule.inputs)


_constants: dict[int, tuple[Rule | Sweep, list[Any]]] = {}
_numbers: dict[tuple[Rule | Sweep, str], int] = {}
_next = itertools.count()


def number_of(rule: Rule | Sweep, rest: list[Any]) -> int:
    """Return a number for a rule and its arguments that are not tensors; `by_number` returns them.

    Compiled autograd stores the number in its graph and in the key of its cache.
    """
    number = _numbers.setdefault((rule, repr(rest)), next(_next))
    _constants.setdefault(number, (rule, rest))
    return number


def by_number(number: int) -> tuple[Rule | Sweep, list[Any]]:
    """Return the rule and arguments with this number."""
    return _constants[number]
