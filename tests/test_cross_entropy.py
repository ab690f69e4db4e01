"""Cross entropy against float64: every combination of its options, PyTorch's samples, and hypothesis."""

import harness
import helpers
import pytest
import torch
from cross_entropy_cases import BF16, F16, F32, F64, MIXED, OPTIONS, Case, pytorch
from hypothesis import given, settings
from hypothesis import strategies as st

import tlkernels as tlk
from tlkernels._core import triton

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
    Case((4, 5), F64), Case((3, 5), F64, "probabilities", True, options=MIXED),
    *(pytest.param(case, marks=pytest.mark.full) for case in (
        Case((4, 5), F64, weighted=True, options=MIXED), Case((2, 3, 4), F64, options=MIXED),
        Case((5,), F64, options=MIXED[:4]))),
], ids=str)  # fmt: skip
def test_gradcheck(case, target):
    input, classes, weight, options = case.make(0)
    input = (input / 20).requires_grad_()
    inputs = (input, classes.requires_grad_()) if classes.is_floating_point() else (input,)
    with harness.forced(target) as impl:

        def loss(x, t=classes):
            return tlk.cross_entropy(x, t, weight, impl=impl, **options)

        def lse(x, t=classes):
            return tlk.cross_entropy_stats(x, t, weight, impl=impl, **options).lse

        fast = impl == "triton" and triton.INTERPRETED  # random directions: the interpreter is slow
        for function, by in ((loss, inputs), (lse, inputs[:1])):
            assert torch.autograd.gradcheck(function, by, fast_mode=fast)
            assert torch.autograd.gradgradcheck(function, by, fast_mode=fast)


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
        "reduction": st.sampled_from(["mean", "sum", "none"]), "ignore_index": st.sampled_from([-1, -100]),
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
