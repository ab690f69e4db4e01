"""Cross entropy against float64: every combination of its options, PyTorch's samples, and hypothesis."""

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import BF16, F16, F32, F64, MIXED, OPTIONS, Case, pytorch
from hypothesis import given, settings
from hypothesis import strategies as st

import tlkernels as tlk
from tlkernels._core import triton
from tlkernels.losses.cross_entropy.ops import NATIVE, TRITON

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TARGETS = harness.targets(loss="cross_entropy")


@pytest.mark.core
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_combination_of_options(case, target):
    case.check(target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", [case._replace(shape=(2, 5, 19)) for case in OPTIONS], ids=str)
def test_every_combination_of_options_on_tiles(case, target):
    case.check(target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", [
    Case((6, 37)), Case((6, 37), target="probabilities"), Case((6, 37), weighted=True, options=MIXED[:4]),
    Case((6, 37), target="probabilities", weighted=True, options=MIXED[:4]), Case((2, 5, 7), options=MIXED[:4]),
    Case((9,), options=MIXED[:4]),
], ids=str)  # fmt: skip
def test_second_gradient(case, reduction, target):
    def draw(seed):
        input, classes, weight, options = case.make(seed)
        options["reduction"] = reduction
        direction = torch.randn(input.shape)
        with harness.forced(target) as impl:
            functions = case.functions(classes, weight, options, impl)
            upstream = 0.5 + torch.rand(functions[2](input.double()).shape)
            ours = harness.second_gradients(functions[0], input, upstream, direction)
        eager = harness.second_gradients(functions[1], input, upstream, direction)
        right = harness.second_gradients(functions[2], input.double(), upstream.double(), direction.double())
        return zip(("by input", "by upstream"), ours, eager, right, strict=True)

    harness.check_budgets(torch.float32, draw)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", [
    Case((4, 5), F64), Case((3, 5), F64, "probabilities", True, options=(*MIXED, ("row_weight", True))),
    *(pytest.param(case, marks=pytest.mark.full) for case in (
        Case((4, 5), F64, weighted=True, options=MIXED), Case((2, 3, 4), F64, options=MIXED),
        Case((5,), F64, options=MIXED[:4]))),
], ids=str)  # fmt: skip
def test_gradcheck(case, target):
    input, classes, weight, options = case.make(0)
    input = (input / 20).requires_grad_()
    classes.requires_grad_(classes.is_floating_point())
    weights = (options.pop("row_weight").requires_grad_(),) if "row_weight" in options else ()
    with harness.forced(target) as impl:

        def loss(x, t, row_weight=None):
            return tlk.cross_entropy(x, t, weight, row_weight=row_weight, impl=impl, **options)

        def stats(x):
            return tlk.cross_entropy_stats(x, classes, weight, impl=impl, **options)[1:3]

        fast = impl == "triton" and triton.INTERPRETED  # random directions: the interpreter is slow
        for function, by in ((loss, (input, classes, *weights)), (stats, (input,))):
            assert torch.autograd.gradcheck(function, by, fast_mode=fast)
            assert torch.autograd.gradgradcheck(function, by, fast_mode=fast)


def statistics(input, axis, softcap=None, temperature=1.0):
    """The PyTorch lines of lse and entropy, in the dtype of the input."""
    x = (input if softcap is None else softcap * torch.tanh(input / softcap)) / temperature
    log_p = x.log_softmax(axis)
    return torch.logsumexp(x, axis), -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(axis)


@pytest.mark.core
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "temperature": 1.5}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (6, 37), (5, 300), (5, 9001), (3, 7, 19), (11,)], ids=str)
def test_gradient_of_entropy(shape, options, dtype, target):
    axis = min(len(shape) - 1, 1)
    capping = {name: value for name, value in options.items() if name != "label_smoothing"}

    def draw(seed):
        generator = harness.generator(seed)
        input = harness.logits(shape, dtype, generator)
        input.select(axis, 1).view(-1)[:1] = -torch.inf  # probability 0, unless the softcap bounds it
        classes = harness.class_indices(input.select(axis, 0).shape, shape[axis], generator)
        counted = (classes != -100).to(F64)
        upstream = [torch.randn(classes.shape, generator=generator).to(dtype).to(F32) for _ in range(3)]

        def derivatives(function, input, wide):
            leaf = input.detach().requires_grad_()
            results = function(leaf)
            total = sum((value.to(wide) * by.to(wide)).sum() for value, by in zip(results, upstream, strict=True))
            return [results[2].detach().double(), torch.autograd.grad(total, leaf)[0]]

        def pytorch_stats(x):
            lse, entropy = statistics(x, axis, **capping)
            return pytorch(x, classes, reduction="none", **options), lse * counted.to(x), entropy * counted.to(x)

        with harness.forced(target) as impl:
            call = {"reduction": "none", "impl": impl, **options}
            ours = derivatives(lambda x: tlk.cross_entropy_stats(x, classes, **call)[:3], input, F64)
        eager = derivatives(pytorch_stats, input, F64)
        right = derivatives(pytorch_stats, input.double(), F64)
        return zip(("entropy", "gradient"), ours, eager, right, strict=True)

    harness.check_budgets(dtype, draw)


@pytest.mark.core
@pytest.mark.parametrize("target", [target for target in TARGETS if target.impl != "reference"], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(6, 40), (5, 5000), (3, 30, 7)], ids=str)
def test_parts_of_a_vocabulary(shape, softcap, target):
    """The target may be in another part, and the backward takes the normaliser of the whole vocabulary."""
    input = torch.randn(shape, dtype=F64)
    classes = torch.randint(0, shape[1], shape[:1] + shape[2:])
    classes.view(-1)[0] = -100
    leaf, weight = input.clone().requires_grad_(), torch.rand(shape[1], dtype=F64)
    x = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    right = F.cross_entropy(x, classes, weight, reduction="none", label_smoothing=0.1)
    (right_grad,) = torch.autograd.grad(right.sum(), leaf)

    def part(begin, end):
        here = (classes >= begin) & (classes < end)
        index = torch.where(here, classes - begin, torch.where(classes == -100, -100, -1))
        options = (weight[begin:end], -100, 0.1, 1.0, softcap, 0.0, shape[1])
        return input[:, begin:end], index, options

    with harness.forced(target) as impl:
        ops = {"native": NATIVE, "triton": TRITON}[impl]
        parts = [part(0, shape[1] // 3), part(shape[1] // 3, shape[1])]
        results = [ops.forward(x, index, *options) for x, index, options in parts]
        lse = torch.stack([peak * (softcap or 1) + log_sum for _, peak, log_sum in results]).logsumexp(0)
        counted = (classes != -100).to(F64)
        loss = torch.zeros_like(lse)
        spread, grads = [], []
        for (_, index, options), (rows, peak, log_sum) in zip(parts, results, strict=True):
            q = options[0].sum() * 0.1 / shape[1] + torch.where(index >= 0, options[0][index.clamp(0)] * 0.9, 0)
            spread.append(q * counted)
            loss += rows + q * counted * (lse - peak * (softcap or 1) - log_sum)
        torch.testing.assert_close(loss, right.detach(), rtol=1e-10, atol=1e-12)
        for own, (x, index, options), (_, peak, _) in zip(spread, parts, results, strict=True):
            normaliser = peak, lse - peak * (softcap or 1)
            upstream = torch.ones_like(lse), sum(spread) - own, None
            grads.append(ops.backward(*upstream, x, index, *normaliser, None, *options))
    torch.testing.assert_close(torch.cat(grads, 1), right_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, *(pytest.param(d, marks=pytest.mark.full) for d in (F64, F16))], ids=str)
def test_pytorch_samples(dtype, target):
    samples = helpers.pytorch_samples("nn.functional.cross_entropy", dtype, requires_grad=True)
    assert len(samples) > 20
    for sample in samples:
        classes, *rest = sample.args
        check_sample(sample.input, classes, {**dict(zip(("weight",), rest, strict=False)), **sample.kwargs}, target)


def check_sample(input, classes, kwargs, target):
    kwargs["target"] = classes

    def run(loss, input, kwargs):  # summed, so that one upstream value fits every reduction
        return harness.gradients(lambda x: loss(x, **kwargs).sum(), input, torch.tensor(1.5))

    with harness.forced(target) as impl:
        ours = run(tlk.cross_entropy, input, {**kwargs, "impl": impl})
    results = ours, run(pytorch, input, kwargs), run(pytorch, input.double(), harness.widened(kwargs))
    names = [f"{name} of {tuple(input.shape)} {kwargs}" for name in ("loss", "gradient")]
    harness.check_results(input.dtype, zip(names, *results, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_any_options_and_shapes(target, data):
    shape = data.draw(st.one_of(
        st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 9), st.integers(1, 300)),
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 20)),
    ))  # fmt: skip
    options = data.draw(st.fixed_dictionaries({}, optional={
        "label_smoothing": st.sampled_from([0.1, 0.5, 1.0]), "temperature": st.sampled_from([0.3, 4.0]),
        "softcap": st.sampled_from([1.0, 30.0]), "z_loss": st.sampled_from([1e-4, 0.1]),
        "row_weight": st.just(True), "reduction": st.sampled_from(["mean", "sum", "none"]),
        "ignore_index": st.sampled_from([-1, -100]),
    }))  # fmt: skip
    case = Case(
        shape,
        data.draw(st.sampled_from([F64, F32])),
        data.draw(st.sampled_from(["indices", "probabilities"])),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(harness.LAYOUTS)),
        tuple(options.items()),
    )
    case.check(target, most=60)  # of a small case's few values, eager may be lucky in all
