"""Edge cases of cross entropy, and the known faults of its peers (each named where it was found)."""

import itertools
import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import pytorch

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
NAN, INF = math.nan, math.inf
impl = helpers.impl_fixture("cross_entropy")


def both(impl, input, target, upstream=1.0, **options):
    """Return loss and gradient in the input's dtype, then PyTorch's in float64."""

    def run(loss, x):
        value = loss(x)
        (grad,) = torch.autograd.grad(value, x, torch.full_like(value, upstream))
        return value.detach(), grad

    wide = target.double() if target.is_floating_point() else target
    ours = run(lambda x: tlk.cross_entropy(x, target, impl=impl, **options), input.detach().clone().requires_grad_())
    return *ours, *run(lambda x: pytorch(x, wide, **options), input.detach().double().requires_grad_())


def same(result, expected, **tolerance):
    torch.testing.assert_close(result.double(), expected.double(), equal_nan=True, **tolerance)


LINES = [(4, 9), (4, 4100), (4, 3, 5)]  # rows in registers, long rows, tiles


@pytest.mark.parametrize("shape", LINES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_position_ignored(impl, shape, smoothing):
    """As in PyTorch the mean is NaN and the gradient is 0, not infinite or NaN (aiter #5165)."""
    target = torch.full(shape[:1] + shape[2:], 3)
    loss, grad, *_ = both(impl, torch.randn(shape), target, ignore_index=3, label_smoothing=smoothing, z_loss=0.1)
    assert loss.isnan()
    assert torch.equal(grad, torch.zeros(shape))
    loss, grad, *_ = both(impl, torch.randn(shape), target, ignore_index=3, reduction="sum")
    assert loss == 0
    assert torch.equal(grad, torch.zeros(shape))


@pytest.mark.parametrize("shape", LINES, ids=str)
def test_ignored_positions_are_not_looked_at(impl, shape):
    """An ignored row of NaN does not change the others."""
    input = torch.randn(shape)
    input[0] = NAN
    target = torch.ones(shape[:1] + shape[2:], dtype=torch.long)
    target[0] = -100
    loss = tlk.cross_entropy(input, target, impl=impl)
    same(loss, F.cross_entropy(input[1:].double(), target[1:]))


@pytest.mark.parametrize("shape", LINES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_minus_infinity_is_probability_zero(impl, shape, smoothing):
    input = torch.randn(shape)
    input[:, 1:3] = -INF
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    same_all(both(impl, input, target, label_smoothing=smoothing, reduction="none"))
    target[2] = 1  # a class of probability 0: the loss is infinite in that row alone
    result = both(impl, input, target, label_smoothing=smoothing, reduction="none")
    assert result[0][2].isinf().all()
    same_all(result)


def same_all(result):
    loss, grad, right, right_grad = result
    same(loss, right, rtol=1e-5, atol=1e-6)
    same(grad, right_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", LINES, ids=str)
def test_row_of_minus_infinity_is_nan_alone(impl, shape):
    input = torch.randn(shape)
    input[1] = -INF
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    loss, grad, right, right_grad = both(impl, input, target, reduction="none")
    assert loss[1].isnan().all()
    assert grad[1].isnan().all()
    same_all((loss, grad, right, right_grad))


@pytest.mark.parametrize("block", [slice(0, 4096), slice(4096, 8192), slice(1, None)], ids=str)
def test_a_whole_block_of_minus_infinity(impl, block):
    """Must not be NaN when a whole block is -inf (flash-attn #1930)."""
    input = torch.randn(2, 9001)
    input[:, block] = -INF
    target = torch.tensor([8999, 8998]) if block.start == 0 else torch.tensor([0, 0])
    result = both(impl, input, target)
    assert result[0].isfinite()
    same_all(result)


def test_a_low_peak_after_a_block_of_minus_infinity(impl):
    """The block's exponentials stay 0, though the step from its peak to the row's exceeds the exponent's range."""
    input = torch.full((2, 9001), -443.6)
    input[:, :4096] = -INF
    same_all(both(impl, input, torch.tensor([5000, 9000])))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("shape", LINES, ids=str)
def test_nan_and_infinity_stay_in_their_row(impl, shape, value):
    input = torch.randn(shape)
    input[2, 1] = value
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    same_all(both(impl, input, target, reduction="none"))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"temperature": 0.5}], ids=str)
@pytest.mark.parametrize("shape", LINES, ids=str)
def test_logits_of_ten_thousand(impl, shape, options):
    """No overflow, and a common offset costs no accuracy."""
    input = torch.randn(shape).mul(4).round().div(4)  # still exact with the offset added
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for offset in (1e4, -1e4):
        same_all(both(impl, input + offset, target, reduction="none", **options))
    huge = torch.randn(shape).sign() * 1e4
    same_all(both(impl, huge, target, reduction="none", **options))


def test_probability_zero_at_minus_infinity_is_as_in_pytorch(impl):
    """The product 0 * -inf is NaN in F.cross_entropy with probabilities; the gradient is finite."""
    input = torch.tensor([[1.0, -INF, 2.0]])
    same_all(both(impl, input, torch.tensor([[0.5, 0.0, 0.5]])))


def test_no_rows(impl):
    for shape in ((0, 5), (0, 5, 3), (2, 5, 0)):
        input = torch.randn(shape, requires_grad=True)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
        for reduction in ("mean", "sum", "none"):
            same(tlk.cross_entropy(input, target, reduction=reduction, impl=impl),
                 F.cross_entropy(input, target, reduction=reduction))  # fmt: skip
        tlk.cross_entropy(input, target, reduction="sum", impl=impl).backward()
        assert input.grad.shape == shape


def test_one_class(impl):
    loss, grad, *_ = both(impl, torch.randn(4, 1), torch.zeros(4, dtype=torch.long))
    assert loss == 0
    assert torch.equal(grad, torch.zeros(4, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes_of_targets(impl, dtype):
    input, target = torch.randn(5, 7), torch.tensor([0, 6, 2, 3, 3])
    loss = tlk.cross_entropy(input, target.to(dtype), impl=impl)
    same(loss, F.cross_entropy(input.double(), target))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 1e-4])
def test_upstream_gradient(impl, reduction, upstream):
    """In others wrong unless it is 1 (TransformerEngine #2139), or for reduction="none" (Liger #968, #678)."""
    target = torch.randint(0, 7, (5,))
    loss, grad, right, right_grad = both(impl, torch.randn(5, 7), target, upstream, reduction=reduction)
    same(loss, right, rtol=1e-5, atol=1e-6)
    same(grad, right_grad, rtol=1e-5, atol=1e-6 * abs(upstream))


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    input = torch.zeros(4096, 8, dtype=torch.float16)
    input[:, 1:] = -12  # p = 6e-6, and 1.5e-9 over the batch
    _, grad, _, right = both(impl, input, torch.zeros(4096, dtype=torch.long), 2.0**15)
    same(grad, right, rtol=1e-2, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_two_backwards(impl, reduction):
    """A second backward must neither fail nor double (QuACK #209), nor see that the first gradient was changed."""
    input = torch.randn(6, 50, requires_grad=True)
    loss = tlk.cross_entropy(input, torch.arange(6), reduction=reduction, impl=impl).sum() * 3
    (first,) = torch.autograd.grad(loss, input, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, input, retain_graph=True)
    (third,) = torch.autograd.grad(loss, input)
    same(second, kept, rtol=1e-6, atol=1e-9)
    assert torch.equal(second, third)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, input)


def test_input_may_change_after_the_loss(impl):
    """As in PyTorch, whose backward does not read the logits either."""
    values = torch.randn(6, 50)
    leaf = values.clone().requires_grad_()
    input = leaf * 1
    loss = tlk.cross_entropy(input, torch.arange(6), impl=impl)
    with torch.no_grad():
        input.detach().zero_()
    (grad,) = torch.autograd.grad(loss, leaf)
    reference = values.clone().requires_grad_()
    same(grad, torch.autograd.grad(F.cross_entropy(reference, torch.arange(6)), reference)[0], rtol=1e-5, atol=1e-7)


def test_inputs_are_not_changed(impl):
    input, weight = torch.randn(6, 50, requires_grad=True), torch.rand(50)
    target = torch.randn(6, 50).softmax(1)
    before = [t.detach().clone() for t in (input, weight, target)]
    tlk.cross_entropy(input, target, weight, softcap=2.0, label_smoothing=0.1, impl=impl).backward()
    assert all(map(torch.equal, before, (input.detach(), weight, target)))


@pytest.mark.parametrize("classes", [3, 255, 257, 4095, 4097, 50257])
def test_class_counts_off_the_vector_width(impl, classes):
    """In others wrong where V % 256 != 0 (verl #2899), or padding gets into the lse with softcap (unsloth #10616)."""
    result = both(impl, torch.full((2, classes), -5.0), torch.tensor([0, classes - 1]), softcap=3.0)
    assert result[0].item() == pytest.approx(math.log(classes), rel=1e-6)
    same_all(result)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("shape", [(2000, 45), (70, 1000), (5, 9000), (2, 21, 64, 64)], ids=str)
def test_same_bits_at_any_number_of_threads(shape):
    """And in every run; gradients summed by atomics differ (CCE)."""
    input, target = torch.randn(shape, requires_grad=True), torch.randint(0, shape[1], shape[:1] + shape[2:])

    def run():
        results = [tlk.cross_entropy(input.detach(), target, impl="native")]
        for options in ({}, {"reduction": "none"}, {"softcap": 3.0, "reduction": "sum"}):
            loss = tlk.cross_entropy(input, target, label_smoothing=0.1, impl="native", **options)
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), input)]
        return results

    first, *others = helpers.at_thread_counts((1, 2, 3, 1), run)
    assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("shape", [(40, 45), (9, 5000), (3, 21, 30)], ids=str)
def test_a_row_does_not_depend_on_the_others(shape):
    input, target = torch.randn(shape), torch.randint(0, shape[1], shape[:1] + shape[2:])

    def run(x, t):
        x = x.clone().requires_grad_()
        loss = tlk.cross_entropy(x, t, reduction="none", impl="native")
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    loss, grad = run(input, target)
    for k in range(shape[0]):
        one_loss, one_grad = run(input[k : k + 1], target[k : k + 1])
        assert torch.equal(one_loss[0], loss[k])
        assert torch.equal(one_grad[0], grad[k])


@pytest.mark.usefixtures("needs_native")
def test_more_than_two_to_the_31_logits():
    """In others an illegal access at N * V > 2**31 (CCE #37)."""
    rows, classes = 33000, 65537
    input = torch.zeros(rows, classes, dtype=torch.bfloat16)
    input[-1, -1] = 20
    target = torch.full((rows,), classes - 1)
    with torch.no_grad():
        loss = tlk.cross_entropy(input, target, reduction="none", impl="native").float()
    assert rows * classes > 2**31
    torch.testing.assert_close(loss[:-1], torch.full((rows - 1,), math.log(classes)), rtol=4e-3, atol=0)
    torch.testing.assert_close(loss[-1], torch.tensor(math.log1p((classes - 1) / math.exp(20))), rtol=4e-3, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (4, 4100), (4, 3, 5), (7,)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_stats(impl, shape, probabilities, dtype):
    axis = min(len(shape) - 1, 1)
    positions = shape[:axis] + shape[axis + 1 :]
    input = harness.logits(shape, dtype, harness.generator(1)).requires_grad_()
    target = torch.randn(shape).softmax(axis).to(dtype) if probabilities else torch.randint(0, shape[axis], positions)
    if not probabilities and positions:
        target.view(-1)[0] = -100
        target.view(-1)[1] = input.argmax(axis).view(-1)[1]
    options = {"temperature": 2.0, "softcap": 9.0, "label_smoothing": 0.1}
    output = tlk.cross_entropy_stats(input, target, impl=impl, **options)
    wide = input.detach().double().requires_grad_()
    x = 9.0 * torch.tanh(wide / 9.0) / 2.0
    lse = torch.logsumexp(x, axis)
    assert output.loss.dtype == dtype
    assert output.lse.dtype == output.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss = tlk.cross_entropy(input, target, impl=impl, **options)
    same(output.loss, loss, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    counted = torch.ones(positions, dtype=torch.bool) if probabilities else target != -100
    lse, entropy = lse * counted, torch.distributions.Categorical(logits=x.movedim(axis, -1)).entropy() * counted
    same(output.lse.detach(), lse.detach(), rtol=1e-6, atol=1e-6)
    same(output.entropy.detach(), entropy.detach(), rtol=1e-5, atol=1e-5)
    best = input.argmax(axis)
    correct = best == target.argmax(axis) if probabilities else (best == target) & (target != -100)
    assert torch.equal(output.correct, correct)
    upstream = torch.randn(2, *positions, dtype=torch.float64)
    (grad,) = torch.autograd.grad((output.lse, output.entropy), input, list(upstream.to(output.lse.dtype)))
    (right,) = torch.autograd.grad((lse, entropy), wide, list(upstream))
    same(grad, right, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_stats_with_minus_infinity_and_ties(impl):
    input = torch.tensor([[0.0, -INF, 0.0], [1.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    output = tlk.cross_entropy_stats(input, torch.tensor([0, 2, 0]), impl=impl)
    same(output.entropy[0], torch.tensor(math.log(2)), rtol=1e-6, atol=0)
    assert output.correct.tolist() == [True, False, True]  # the first of equals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("classes", "places"), [
    pytest.param(5, (0, 1, 3, 4), id="5"),
    pytest.param(700, (0, 15, 16, 255, 256, 699), id="ends of vectors and of a block on CPU"),
    pytest.param(2100, (0, 51, 2048, 2099), id="same columns of two blocks of Triton"),
])  # fmt: skip
def test_correct_is_the_first_largest_wherever_it_stands(impl, classes, places, dtype):
    """Two equal ones, the largest and NaN, and two NaN, at every pair of places."""
    pairs = list(itertools.product(places, places))
    input = -torch.rand(3 * len(pairs), classes).to(dtype)
    for k, (first, second) in enumerate(pairs):
        input[3 * k, [first, second]] = 1
        input[3 * k + 1, first], input[3 * k + 1, second] = 1, torch.nan
        input[3 * k + 2, [first, second]] = torch.nan
    for column in range(2):
        target = torch.tensor([pair[column] for pair in pairs for _ in range(3)])
        output = tlk.cross_entropy_stats(input, target, impl=impl)
        assert torch.equal(output.correct, input.argmax(1) == target)
        probabilities = input.nan_to_num(nan=2)
        output = tlk.cross_entropy_stats(input, probabilities, impl=impl)
        assert torch.equal(output.correct, input.argmax(1) == probabilities.argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_gives_float32(impl, dtype):
    """The loss is not rounded to the input's dtype on the way."""
    input, target = torch.randn(64, 50).to(dtype).requires_grad_(), torch.randint(0, 50, (64,))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        for reduction in ("mean", "none"):
            loss = tlk.cross_entropy(input, target, reduction=reduction, impl=impl)
            assert loss.dtype == torch.float32
            right = F.cross_entropy(input.detach().double(), target, reduction=reduction)
            same(loss.detach(), right, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), input)
    assert grad.dtype == dtype


def test_the_harness_sees_a_wrong_result():
    """As a test that compares an output with itself would not (TransformerEngine #2476)."""
    budget = harness.Budget(torch.float32)
    oracle = torch.randn(50, dtype=torch.float64)
    budget.add((oracle * (1 + 1e-5)).float(), oracle.float(), oracle)
    with pytest.raises(AssertionError, match="loss: error"):
        budget.check("loss")
    with pytest.raises(AssertionError, match="NaN"):
        budget.add(torch.full((50,), NAN), oracle.float(), oracle)
