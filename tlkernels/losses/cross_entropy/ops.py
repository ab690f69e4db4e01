"""Cross entropy's ops: schemas, fakes, autograd, and the list of implementations.

Under plain autograd a reduced loss is computed along with its gradient. Otherwise one op computes the loss of each row,
another its gradient, each with a differentiation rule, and the reduction is plain PyTorch. Under torch.func's
transforms and in forward mode, `transforms.py` wraps the two ops.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from tlkernels._core import native
from tlkernels._core.autograd import (
    Args,
    Needs,
    Rule,
    Sweep,
    Tensors,
    apply,
    differentiable,
    needs_grad,
    one_sweep,
    plain,
    refuse_transforms,
    two_sweeps,
    where_needed,
)
from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.loss import Op, Rows, define_ops, implementations, take
from tlkernels._core.reduction import reduce
from tlkernels.losses.cross_entropy import inplace, reference, transforms, vocab_parallel
from tlkernels.losses.cross_entropy.call import Arguments, CrossEntropyOutput, Options
from tlkernels.losses.cross_entropy.second_order import directional, target_gradient

OPTIONS = (
    "Tensor? weight, int ignore_index, float label_smoothing, float temperature, float? softcap, float z_loss,"
    " int? num_classes"
)
_INPUT = f"Tensor input, Tensor target, {OPTIONS}"
_GRADIENT = (
    "Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, {input}, Tensor target, Tensor peak, Tensor log_sum,"
    f" Tensor? entropy, {OPTIONS}"
)


def _fake_row(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    return input.new_empty(shape, dtype=dtype or compute_dtype(input))


def _fake_stats(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(_fake_row(input) for _ in range(4)), _fake_row(input, torch.bool)


def _fake_total(input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((), dtype=compute_dtype(input))


def _fake_directional(direction: Tensor, g: Any, h: Any, k: Any, input: Tensor, target: Tensor, *_: Any) -> Any:
    v_target = torch.empty_like(target) if target.is_floating_point() else input.new_empty((0,))
    v_entropy = input.new_empty((0,)) if k is None else _fake_row(input)
    return _fake_row(input), _fake_row(input), v_entropy, torch.empty_like(input), v_target


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Any
    """Loss of each row, and the two parts of its lse: peak * softcap (or 1) / temperature + log_sum."""
    forward_stats: Any
    """The same, with entropy and correct."""
    backward: Any
    """Gradient of `input`."""
    backward_: Any
    """Writes the gradient over `input`."""
    total: Any
    """The reduced loss."""
    step: Any
    """The reduced loss and its gradient."""
    directional: Any = None
    """`second_order.directional` as a kernel; it returns an empty tensor for None."""


NATIVE, TRITON = define_ops(
    Ops,
    "cross_entropy",
    {
        "forward": Op(
            f"fwd({_INPUT}) -> (Tensor loss, Tensor peak, Tensor log_sum)",
            lambda input, *_: tuple(_fake_row(input) for _ in range(3)),
            differentiable=True,
        ),
        "forward_stats": Op(
            f"fwd_stats({_INPUT}) -> (Tensor loss, Tensor peak, Tensor log_sum, Tensor entropy, Tensor correct)",
            _fake_stats,
            differentiable=True,
        ),
        "backward": Op(
            f"bwd({_GRADIENT.format(input='Tensor input')}) -> Tensor",
            lambda grad_loss, grad_lse, grad_entropy, input, *_: torch.empty_like(input),
            differentiable=True,
        ),
        "backward_": Op(f"bwd_({_GRADIENT.format(input='Tensor(a!) input')}) -> ()", lambda *_: None),
        "total": Op(f"total({_INPUT}, Tensor? row_weight, bool mean) -> Tensor", _fake_total),
        "step": Op(
            f"step({_INPUT}, Tensor? row_weight, bool mean) -> (Tensor loss, Tensor grad)",
            lambda input, *_: (_fake_total(input), torch.empty_like(input)),
        ),
    },
    only_triton={
        "directional": Op(
            f"directional(Tensor direction, Tensor grad_loss, Tensor? grad_lse, Tensor? grad_entropy, {_INPUT})"
            " -> (Tensor v_loss, Tensor v_lse, Tensor v_entropy, Tensor v_input, Tensor v_target)",
            _fake_directional,
        )
    },
)


def _rule(ops: Ops, stats: bool) -> Rule:
    """Return the rule for the losses of rows; with `stats`, also for log_sum, of which lse is made, and entropy."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        input, target, *rest = args
        options, kept = take(Options, rest)
        peak, log_sum, entropy = (value.detach() for value in kept) if stats else (*kept, None)
        grad_loss, grad_lse, grad_entropy = upstreams if stats else (*upstreams, None, None)
        grad_loss = torch.zeros_like(peak) if grad_loss is None else grad_loss
        normaliser = peak, log_sum, None if grad_entropy is None else entropy
        upstream = grad_loss, grad_lse, grad_entropy
        return (
            ops.backward(*upstream, input, target, *normaliser, *options) if needs[0] else None,
            target_gradient(grad_loss, input, target, options) if needs[1] else None,
        )

    return Rule(2, backward, None, results=(0, 2, 3) if stats else (0,), kept=(1, 2, 3) if stats else (1, 2))


def _gradient_rule(ops: Ops) -> Rule:
    """Return the rule for the gradient of `input`, a function of the arguments of `ops.backward`."""

    def backward(directions: Tensors, args: Args, needs: Needs) -> Tensors:
        (direction,) = directions
        assert direction is not None
        grad_loss, grad_lse, grad_entropy, input, target, _, _, _, *rest = args
        options, _ = take(Options, rest)
        call = direction, grad_loss, grad_lse, grad_entropy, input, target
        if ops.directional is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return where_needed(directional(*call, options), needs)
        return where_needed(ops.directional(*call, *options), needs)

    return Rule(5, backward, None)


def _two_sweeps(ops: Ops) -> Rule:
    """Return the rule for the reduced loss of (input, target, *options, peak, log_sum, denominator, reduction)."""

    def backward(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        (upstream,) = upstreams
        assert upstream is not None
        input, target, *rest = args
        options, (peak, log_sum, denominator, _) = take(Options, rest)
        grad_loss = (upstream.to(peak.dtype) / denominator).expand(peak.shape)
        return (ops.backward(grad_loss, None, None, input, target, peak, log_sum, None, *options),)

    def recompute(args: Args) -> Tensor:
        *args, _, _, _, reduction = args
        return _recompute(ops, (*args, None, reduction))

    return Rule(1, backward, recompute)


def _one_sweep(ops: Ops) -> Sweep:
    """Return the sweep for the reduced loss of (input, target, *options, row_weight, reduction)."""

    def step(*args: Any) -> Any:
        *call, reduction, (needs_input,) = args
        if needs_input:
            return ops.step(*call, reduction == "mean")
        return ops.total(*call, reduction == "mean"), None

    return Sweep(1, step, partial(_recompute, ops), by_triton=ops is TRITON)


def _recompute(ops: Ops, args: Args) -> Tensor:
    """Return the reduced loss, differentiable to any order."""
    input, target, *rest = args
    options, (row_weight, reduction) = take(Options, rest)
    call = Arguments(input, target, options, reduction, inplace_grad=False, stats=False, row_weight=row_weight)
    # Triton has a kernel of the second derivative.
    loss = _run_rows(ops, call) if ops.directional else reference.cross_entropy(call)
    assert isinstance(loss, Tensor)
    return loss


for _ops in (NATIVE, TRITON):
    differentiable(_ops.forward, _rule(_ops, stats=False), _ops.backward)
    differentiable(_ops.forward_stats, _rule(_ops, stats=True))
    differentiable(_ops.backward, _gradient_rule(_ops), _ops.directional)


def _over_group(ops: Ops, call: Arguments) -> Tensor | CrossEntropyOutput:
    """Compute a call with `vocab_group`."""

    def part(input: Tensor, target: Tensor, options: Options) -> Sequence[Any]:
        return call._replace(input=input, target=target, options=options).without_weightless()[:2]

    def forward(target: Tensor, options: Options, stats: bool) -> Any:
        input, target = part(call.input, target, options)
        return (ops.forward_stats if stats else ops.forward)(input, target, *options)

    def backward(*args: Any) -> Tensors:
        *upstreams, (input,), target, peak, log_sum, entropy, options, _ = args
        input, target = part(input, target, options)
        normaliser = peak, log_sum, entropy
        if call.inplace_grad:
            return (inplace.overwrite(ops, upstreams, input, target, *normaliser, *options),)
        return (ops.backward(*upstreams, input, target, *normaliser, *options),)

    output: Tensor | CrossEntropyOutput = vocab_parallel.cross_entropy(call, forward, backward, (call.input,))
    return output


def _run(ops: Ops, sweep: Sweep, rule: Rule, call: Arguments) -> Tensor | CrossEntropyOutput:
    if call.vocab_group is not None:
        return _over_group(ops, call)
    args, row_weight = (call.input, call.target, *call.options), call.row_weight
    by_rows = call.stats or call.inplace_grad or needs_grad((call.target, row_weight)) or not plain(*args, row_weight)
    # A float16 gradient waits for the loss scale, as `_core.loss.in_one_sweep` says.
    waits = call.reduction == "none" or call.input.dtype == torch.float16
    if by_rows or (waits and row_weight is not None):
        return _run_rows(ops, call)
    if waits:
        with torch._C._AutoDispatchBelowAutograd():
            rows, *normaliser = ops.forward(*args)
            denominator = call.denominator() if call.reduction == "mean" else 1
            loss = reduce(rows, denominator, call.reduction).to(call.dtype)
        return two_sweeps(loss, rule, *args, *normaliser, denominator, call.reduction)
    return one_sweep(sweep, *args, row_weight, call.reduction, dtype=call.dtype)


def _run_rows(ops: Ops, call: Arguments) -> Tensor | CrossEntropyOutput:
    denominator = call.denominator() if call.reduction == "mean" else 1
    call = call.without_weightless()
    input, target, options = call.input, call.target, call.options
    if call.inplace_grad or _transformed():
        results = (inplace if call.inplace_grad else transforms).rows(input, target, options, ops, call.stats)
    else:
        results = apply(ops.forward_stats if call.stats else ops.forward, input, target, *options)
    rows, peak, log_sum, *stats = results
    loss = reduce(call.weighted(rows), denominator, call.reduction).to(call.dtype)
    if not call.stats:
        return loss
    lse = peak * ((options.softcap or 1) / options.temperature) + log_sum
    entropy, correct = stats
    weightless = call.weightless() if target.is_floating_point() else None
    if weightless is not None:
        lse, entropy, correct = (values.masked_fill(weightless, 0) for values in (lse, entropy, correct))
    return CrossEntropyOutput(loss, lse, entropy, correct)


def _transformed() -> bool:
    compiling = torch.compiler.is_compiling()
    return not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _refuse(call: Arguments) -> str | None:
    if call.options.weight is not None and call.options.weight.requires_grad:
        return "computes no gradient for weight, which requires one"
    if call.inplace_grad and call.row_weight is not None and call.target.is_floating_point():
        return "inplace_grad=True does not support row_weight with probabilities as target"
    compiling, transformed = torch.compiler.is_compiling(), _transformed()
    if call.vocab_group is not None and (compiling or transformed):
        return "vocab_group needs plain autograd, not torch.compile or a torch.func transform"
    if call.vocab_group is not None and needs_grad((call.target,)):
        return "computes no gradient for target with vocab_group"
    if call.inplace_grad and (compiling or transformed):
        return "inplace_grad=True needs plain autograd, not torch.compile or a torch.func transform"
    if compiling:
        return refuse_transforms()
    if transformed and sum(i.key() == TransformType.Jvp for i in retrieve_all_functorch_interpreters()) > 1:
        return "nested forward-mode AD is not supported"
    return None


def _refuse_reference(call: Arguments) -> str | None:
    return "does not overwrite its input, which inplace_grad=True asks for" if call.inplace_grad else None


def _tensors(call: Arguments) -> Sequence[Tensor | None]:
    return call.input, call.target, call.options.weight, call.row_weight


IMPLEMENTATIONS = implementations(
    native=partial(_run, NATIVE, _one_sweep(NATIVE), _two_sweeps(NATIVE)),
    triton=partial(_run, TRITON, _one_sweep(TRITON), _two_sweeps(TRITON)),
    reference=reference.cross_entropy,
    served=native.served("cross_entropy_fwd"),
    tensors=_tensors,
    refuse=_refuse,
    refuse_reference=_refuse_reference,
    rows=Rows(1, ("weight",)),
)
