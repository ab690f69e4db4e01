"""A row whose target is ignored has gradient 0, whatever it holds, in every loss with `ignore_index`.

PyTorch gives NaN if its logits are not finite (pytorch/pytorch#11551), so the oracle is PyTorch with zeros there.
"""

import math
from dataclasses import replace
from functools import partial
from inspect import signature

import harness
import pytest
import torch
import torch.nn.functional as F
from battery import LOSSES, Call, gradients, leaves, targets, upstream_of
from helpers import IMPLEMENTATIONS

import tlkernels as tlk
from tlkernels._core import native

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
LOST = (math.nan, math.inf, -math.inf)
FILLS = pytest.mark.parametrize("fill", LOST)
ROWS = ("input", "student_logits", "teacher_logits", "student_input", "teacher_input")


def fill_ignored(loss, arguments, *fills):
    """Return the arguments with the first row ignored too, and the ignored rows filled with the fills in turn."""
    index = arguments.get("ignore_index", -100)
    target = arguments["target"].clone()
    target.view(-1)[0] = index
    made = {**arguments, "target": target}
    for name in made.keys() & set(ROWS):
        made[name] = made[name].clone()  # keeps the strides
        axis = 1 if loss is LOSSES["cross_entropy"] and made[name].dim() > 1 else -1
        values = torch.tensor(fills, dtype=made[name].dtype).repeat(target.numel())[: int((target == index).sum())]
        made[name].movedim(axis, -1)[target == index] = values.unsqueeze(-1)
    return made


def filled(loss, case, *fills):
    return replace(case, make=lambda seed: fill_ignored(loss, case.make(seed), *fills))


def ignores(case):
    """Return whether a case has class indices and is small enough for the interpreter."""
    arguments = case.make(0)
    target = arguments.get("target")
    indices = target is not None and not target.is_floating_point()
    tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
    return indices and max(tensor.numel() for tensor in tensors) <= harness.INTERPRETED_ELEMENTS


def over(which, each):
    """Parametrise by the cases with class indices, and by `each(name)`: targets or implementations of the loss."""
    chosen = [
        pytest.param(loss, case, impl, id=f"{name}-{case.id}-{impl}")
        for name, loss in LOSSES.items()
        if "ignore_index" in signature(loss.function).parameters
        for case in loss.cases
        if which(case) and ignores(case)
        for impl in each(name)
    ]
    return pytest.mark.parametrize(("loss", "case", "impl"), chosen)


def runs(name):
    """Return the targets of a loss, of the instruction sets only the widest."""
    return [target for target in targets(name) if target.isa not in native.isas()[1:]]


def kernels(name):
    return [target for target in runs(name) if target.impl != "reference"]


over_small = over(lambda case: case.small, lambda name: IMPLEMENTATIONS)


def draw(loss, case, target, seed):
    with harness.forced(target) as impl:
        call = Call(loss, filled(loss, case, *LOST[seed % 3 :], *LOST[: seed % 3]), impl, seed)
        value, grads = gradients(call.ours, call.tensors, seed)
    zeros = Call(loss, filled(loss, case, 0), "reference", seed)
    eager_value, eager_grads = gradients(zeros.eager, zeros.tensors, seed)
    right_value, right_grads = gradients(zeros.right, zeros.wide_tensors, seed)
    yield "loss", value, eager_value, right_value
    yield from zip(case.wants_grad, grads, eager_grads, right_grads, strict=True)


# float16 gradients are computed in the backward, since they depend on the upstream; the small cases are float64.
@over(lambda case: case.dtype in (torch.float32, torch.float16), kernels)
def test_value_and_gradients(loss, case, impl):
    harness.check_budgets(case.dtype, partial(draw, loss, case, impl), first=2)


@FILLS
@over_small
def test_second_gradient(loss, case, impl, fill):
    results = []
    call, zeros = (Call(loss, filled(loss, case, value), impl) for value in (fill, 0))
    for function, tensors in ((call.ours, call.tensors), (zeros.right, zeros.tensors)):
        inputs = leaves(tensors)
        value = function(*inputs)
        upstream = upstream_of(value).requires_grad_()
        grads = torch.autograd.grad(value, inputs, upstream, create_graph=True)
        mixed = sum((grad.square() * torch.arange(1, grad.numel() + 1).view(grad.shape)).sum() for grad in grads)
        results.append([*grads, *torch.autograd.grad(mixed, [*inputs, upstream])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11, equal_nan=True)


@FILLS
@over_small
@pytest.mark.parametrize("of", ["grad", "hessian", "jvp", "vmap"])
def test_transforms(loss, case, impl, fill, of):
    call, zeros = (Call(loss, filled(loss, case, value), impl) for value in (fill, 0))
    every = tuple(range(len(call.tensors)))
    tangents = tuple(torch.randn_like(tensor) for tensor in call.tensors)

    def run(function, tensors):
        total = lambda *tensors: function(*tensors).sum()  # noqa: E731
        if of == "jvp":
            return torch.func.jvp(total, tensors, tangents)
        if of == "vmap":
            stacked = [torch.stack([tensor, tensor * 0.5]) for tensor in tensors]
            return torch.func.vmap(torch.func.grad(total, every))(*stacked)
        return getattr(torch.func, of)(total, every)(*tensors)

    try:
        ours = run(call.ours, call.tensors)
    except NotImplementedError:
        return
    torch.testing.assert_close(ours, run(zeros.right, zeros.tensors), rtol=1e-9, atol=1e-11, equal_nan=True)


TARGETS = pytest.mark.parametrize("impl", runs("cross_entropy"), ids=str)
SHAPES = pytest.mark.parametrize("shape", [(4, 5), (4, 40), (4, 4100), (4, 5, 3)], ids=str)


def logits_and_target(shape, fill):
    """Return logits and a target that ignores all positions of the first entry and one more."""
    input = torch.randn(shape, dtype=torch.float64)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    target[0] = target.view(-1)[-2] = -100
    input.movedim(1, -1)[target == -100] = fill
    return input, target


STATISTICS = {
    "cross_entropy": (tlk.cross_entropy_stats, lambda input: torch.logsumexp(input, 1)),
    "linear_cross_entropy": (
        tlk.linear_cross_entropy_stats,
        lambda input, weight: torch.logsumexp(F.linear(input, weight), 1),
    ),
}


@TARGETS
@FILLS
@SHAPES
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=str)
def test_statistics(impl, fill, shape, name, options):
    """The gradient of loss and lse together; ignored rows count in neither, and their statistics are 0."""
    linear = name == "linear_cross_entropy"
    input, target = logits_and_target((shape[0], 6) if linear else shape, fill)
    tensors = [input, torch.randn(shape[1], 6, dtype=torch.float64)] if linear else [input]
    ignored = target == -100

    def derivatives(loss, lse, tensors):
        total = loss + lse.square().sum()
        return [total.detach(), *torch.autograd.grad(total, tensors)]

    function, lse = STATISTICS[name]
    with harness.forced(impl) as chosen:
        inputs = leaves(tensors)
        output = function(*inputs, target, **options, impl=chosen)
        ours = derivatives(output.loss, output.lse, inputs)
    for values in output[1:]:
        assert not values[ignored].any()
    inputs = leaves([tensors[0].masked_fill(ignored.unsqueeze(1), 0), *tensors[1:]])
    right_lse = lse(*inputs).masked_fill(ignored, 0)
    right = derivatives(LOSSES[name].pytorch(*inputs, target, **options), right_lse, inputs)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


@TARGETS
@FILLS
@SHAPES
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_rows_of_weight_0(impl, fill, shape, probabilities, reduction, stats, dtype):
    """Neither loss nor gradient depends on their logits; the mean's denominator counts them."""
    input, target = torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    if probabilities:
        target = torch.rand(shape).softmax(1).to(dtype)
    row_weight = torch.randn(shape[:1] + shape[2:])
    row_weight[1] = row_weight.view(-1)[-1] = 0
    absent = row_weight == 0
    leaf = input.masked_fill(absent.unsqueeze(1), fill).to(dtype).requires_grad_()
    options = {"row_weight": row_weight, "reduction": reduction, "label_smoothing": 0.1}
    with harness.forced(impl) as name:
        function = tlk.cross_entropy_stats if stats else tlk.cross_entropy
        output = function(leaf, target, **options, impl=name)
        loss = output.loss if stats else output
        total = loss.sum() + (output.lse + output.entropy).sum() if stats else loss.sum()
        (grad,) = torch.autograd.grad(total, leaf)
    wide = input.to(dtype).double().requires_grad_()
    target = target.double() if probabilities else target
    right = LOSSES["cross_entropy"].pytorch(wide, target, **options)
    of_stats = 0
    if stats:
        assert not any(values[absent].any() for values in output[1:])
        log_p = wide.log_softmax(1)
        of_stats = (torch.logsumexp(wide, 1) - (log_p.exp() * log_p).sum(1)).masked_fill(absent, 0).sum()
    (right_grad,) = torch.autograd.grad(right.sum() + of_stats, wide)
    tolerance = 1e-10 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(loss.detach().double(), right.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), right_grad, rtol=tolerance, atol=tolerance)
    assert not grad.movedim(1, -1)[absent].any()


@TARGETS
@FILLS
@SHAPES
def test_in_place_and_upstream_of_nan(impl, fill, shape):
    input, target = logits_and_target(shape, fill)
    for inplace in (False, True):
        if inplace and impl.impl == "reference":
            continue
        leaf = input.clone().requires_grad_()
        with harness.forced(impl) as name:
            loss = tlk.cross_entropy(leaf * 1, target, reduction="none", inplace_grad=inplace, impl=name)
            upstream = torch.ones_like(loss).masked_fill(target == -100, math.nan)
            (grad,) = torch.autograd.grad(loss, leaf, upstream)
        wide = input.masked_fill((target == -100).unsqueeze(1), 0).requires_grad_()
        (right,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="sum"), wide)
        torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", runs("linear_cross_entropy"), ids=str)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_distillation"])
def test_weights_that_are_not_finite(impl, name):
    """An ignored row's features have gradient 0; all others have NaN, as in PyTorch."""
    loss = LOSSES[name]
    case = next(case for case in loss.cases if ignores(case) and case.make(0)["target"].numel() > 2)
    arguments = fill_ignored(loss, case.make(0), 1.0)
    features = [arguments[name].requires_grad_() for name in ROWS if name in arguments]
    for weight in ("linear_weight", "student_weight", "teacher_weight"):
        if weight in arguments:
            arguments[weight][0] = math.nan
    with harness.forced(impl) as chosen:
        grads = torch.autograd.grad(loss.function(**arguments, impl=chosen), features)
    ignored = arguments["target"] == arguments.get("ignore_index", -100)
    for grad in grads:
        assert not grad[ignored].any()
        assert grad[~ignored].isnan().any()


@TARGETS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("linear", "shape"),
    [(False, (4, 5)), (False, (4, 40)), (False, (4, 5, 3)), (True, (4, 5)), (True, (4, 40))],
    ids=lambda value: {False: "dense", True: "linear"}.get(value, str(value)),
)
def test_all_targets_of_weight_0(impl, linear, reduction, dtype, shape):
    """With smoothing the sum is not 0, so in PyTorch the mean is NaN, and so are the gradients of the other rows."""
    weight = torch.rand(shape[1])
    weight[:2] = 0
    input, target = torch.randn(shape), torch.randint(2, shape[:1] + shape[2:])
    target[0] = -100
    options = {"label_smoothing": 0.1, "reduction": reduction}

    def run(loss, dtype, **how):
        x = input.to(dtype).requires_grad_()
        layer = (x, torch.eye(shape[1], dtype=dtype)) if linear else (x,)
        value = loss(*layer, target, weight=weight.to(dtype), **options, **how)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    function = tlk.linear_cross_entropy if linear else tlk.cross_entropy
    with harness.forced(impl) as name:
        ours = run(function, dtype, impl=name)
    pytorch = LOSSES["linear_cross_entropy" if linear else "cross_entropy"].pytorch
    for result, right in zip(ours, run(pytorch, torch.float64), strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(result.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.usefixtures("needs_native")
def test_rows_of_a_later_chunk():
    """On a CPU 500 x 70001 logits are two chunks."""
    input, weight = torch.randn(500, 3), torch.randn(70001, 3)
    target = torch.randint(70001, (500,))
    target[[0, 249, 250, 499]] = -100

    def run(loss, fill, **how):
        tensors = leaves([input.masked_fill((target == -100).unsqueeze(1), fill), weight])
        value = loss(*tensors, target, **how)
        return [value.detach(), *torch.autograd.grad(value, tensors)]

    ours = run(tlk.linear_cross_entropy, math.nan, impl="native")
    right = run(LOSSES["linear_cross_entropy"].pytorch, 0)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-7)
    assert not ours[1][target == -100].any()
