"""Linear cross entropy: the dense form, the matrix products that run, chunks, edge cases, statistics, memory."""

import itertools
import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import BF16, F16, F32, F64, LAYER, MIXED, call, dense, layer, pytorch, same

import tlkernels as tlk

native = pytest.mark.usefixtures("needs_native")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("linear_cross_entropy")


OPTIONS = [
    dict(zip(("label_smoothing", "temperature", "softcap", "z_loss", "reduction", "ignore_index"), values, strict=True))
    for values in itertools.product((0.0, 0.1), (1.0, 2.5), (None, 5.0), (0.0, 0.01), ("mean", "none", "sum"), (-100,))
] + [{"ignore_index": 3}, {"ignore_index": -1, "reduction": "none"}]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=harness.words)
def test_the_dense_form_agrees(any_impl, options, target, weighted):
    if target == "probabilities" and options["ignore_index"] >= 0:
        return
    arguments = call(target=target, weighted=weighted, **options)
    loss = tlk.linear_cross_entropy(**arguments, impl=any_impl)
    expected = dense(tlk.cross_entropy, arguments)
    same(loss, expected)
    upstream = torch.rand_like(loss)
    same(torch.autograd.grad(loss, layer(arguments), upstream),
         torch.autograd.grad(expected, layer(arguments), upstream))  # fmt: skip


SAMPLES = [(F32, 25), *(pytest.param(dtype, 1, marks=pytest.mark.full) for dtype in (F64, F32, BF16, F16))]


@pytest.mark.parametrize(("dtype", "step"), SAMPLES, ids=str)
def test_pytorch_samples(impl, dtype, step):
    """PyTorch's own samples, except those of several layers (a linear_weight with more dimensions)."""

    def draw(seed):
        torch.manual_seed(seed)
        samples = helpers.pytorch_samples("nn.functional.linear_cross_entropy", dtype)
        samples = [sample for sample in samples if sample.args[0].dim() == 2 and "options" not in sample.kwargs]
        assert len(samples) > 20
        return [triple for sample in samples[::step] for triple in of_sample(sample)]

    def of_sample(sample):
        arguments = dict(zip(("linear_weight", "target"), sample.args, strict=True)) | sample.kwargs

        def run(function, input, rest):
            leaves = [t.detach().requires_grad_() for t in (input, rest["linear_weight"])]
            value = function(leaves[0], **rest | {"linear_weight": leaves[1]}).sum()
            return value, *torch.autograd.grad(value, leaves, torch.full_like(value, 1.5))

        def ours(*args, **kwargs):
            return tlk.linear_cross_entropy(*args, **kwargs, impl=impl)

        values = (run(ours, sample.input, arguments), run(F.linear_cross_entropy, sample.input, arguments),
                  run(F.linear_cross_entropy, sample.input.double(), harness.widened(arguments)))  # fmt: skip
        shown = {name: "given" if isinstance(value, torch.Tensor) else value for name, value in sample.kwargs.items()}
        which = f"{tuple(sample.input.shape)} {shown}"
        for name, *triple in zip(("loss", "input", "linear_weight"), *values, strict=True):
            yield f"{name} of {which}", *triple

    harness.check_budgets(dtype, draw)


def products(function):
    """Return how many matrix products a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events())


@native
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", [
    (), ("input",), ("linear_weight",), ("linear_bias",), ("input", "linear_weight"), ("linear_weight", "linear_bias"),
    LAYER,
], ids=str)  # fmt: skip
def test_only_needed_products_are_made(needed, reduction):
    arguments = call(reduction=reduction)
    expected = torch.autograd.grad(tlk.linear_cross_entropy(**arguments).sum(), layer(arguments))
    for name in LAYER:
        arguments[name] = arguments[name].detach().requires_grad_(name in needed)
    leaves = [arguments[name] for name in needed]

    def run():
        loss = tlk.linear_cross_entropy(**arguments, impl="native").sum()
        grads = torch.autograd.grad(loss, leaves) if needed else ()
        for name, grad in zip(needed, grads, strict=True):
            same(grad, expected[LAYER.index(name)])

    logits = 2 if reduction == "none" and needed else 1  # "none" recomputes them in the backward
    assert products(run) == logits + sum(name in needed for name in LAYER[:2])
    with torch.no_grad():
        assert products(lambda: tlk.linear_cross_entropy(**arguments, impl="native")) == 1


@native
@pytest.mark.parametrize("gemm", ["0", "1"])
@pytest.mark.parametrize("rows", [33, pytest.param(1100, marks=pytest.mark.full)])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_bfloat16_products_of_either_kind(monkeypatch, gemm, rows, target):
    """In float32 tiles and in bfloat16; the weight's gradient is summed over chunks in float32 (axolotl #1601)."""
    monkeypatch.setenv("TLKERNELS_BF16_GEMM", gemm)
    classes = 70001 if rows > 1000 else 3001  # in several chunks, and both in several tiles
    if target == "probabilities" and rows > 1000:
        rows = 400
    arguments = call((rows,), 1000 if classes == 3001 else 16, classes, BF16, target)

    def run(function, arguments):
        loss = function(**arguments)
        return loss, *torch.autograd.grad(loss, layer(arguments))

    ours = run(tlk.linear_cross_entropy, arguments)
    eager = run(pytorch, arguments)
    wide = harness.widened(arguments)
    wide |= {name: wide[name].detach().requires_grad_() for name in LAYER}
    harness.check_results(BF16, zip(("loss", *LAYER), ours, eager, run(pytorch, wide), strict=True))


def test_every_row_ignored(impl):
    """Inf or NaN gradients (aiter #5165): PyTorch gives a NaN mean and gradient 0."""
    for reduction in ("mean", "sum", "none"):
        arguments = call(dtype=F32, reduction=reduction, **{k: MIXED[k] for k in ("label_smoothing", "z_loss")})
        arguments["target"] = torch.full((6,), -100)
        loss = tlk.linear_cross_entropy(**arguments, impl=impl)
        assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
        for grad in torch.autograd.grad(loss.sum(), layer(arguments)):
            assert torch.equal(grad, torch.zeros_like(grad))


@native
def test_a_chunk_of_ignored_rows():
    """All rows of the second of two chunks are ignored; then those of the first."""
    for ignored in (slice(260, None), slice(0, 260)):
        arguments = call((500,), 2, 70001, F32)
        arguments["target"] = torch.arange(500)
        arguments["target"][ignored] = -100
        loss = tlk.linear_cross_entropy(**arguments, impl="native")
        expected = dense(F.cross_entropy, arguments)
        same(loss, expected, rtol=1e-5, atol=0)
        for ours, right in zip(torch.autograd.grad(loss, layer(arguments)),
                               torch.autograd.grad(expected, layer(arguments)), strict=True):  # fmt: skip
            same(ours, right, rtol=1e-4, atol=1e-7)


def test_no_rows(impl):
    for rows in ((0,), (2, 0)):
        for reduction in ("mean", "sum", "none"):
            arguments = call(rows, dtype=F32, reduction=reduction)
            loss = tlk.linear_cross_entropy(**arguments, impl=impl)
            same(loss, pytorch(**arguments))
            for grad, tensor in zip(torch.autograd.grad(loss.sum(), layer(arguments)), layer(arguments), strict=True):
                assert torch.equal(grad, torch.zeros_like(tensor))


def test_minus_infinity_in_the_bias_is_probability_zero(impl):
    arguments = call(reduction="none")
    with torch.no_grad():
        arguments["linear_bias"][3:5] = -math.inf
    arguments["target"] = torch.tensor([0, 1, 2, 3, -100, 7])
    loss = tlk.linear_cross_entropy(**arguments, impl=impl)
    assert loss[3] == math.inf and loss.isinf().sum() == 1
    same(loss, pytorch(**arguments))
    good = torch.tensor([1.0, 1, 1, 0, 1, 1], dtype=F64)
    same(torch.autograd.grad(loss, layer(arguments), good)[1], torch.autograd.grad(
        pytorch(**arguments), layer(arguments), good)[1])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes_of_targets(impl, dtype):
    arguments = call(ignore_index=0)
    other = arguments | {"target": arguments["target"].to(dtype)}
    same(tlk.linear_cross_entropy(**other, impl=impl), pytorch(**arguments))


def test_strides(impl):
    arguments = call((3, 4), 5, 37, target="probabilities")
    right = pytorch(**arguments)
    expected = torch.autograd.grad(right, layer(arguments))
    strided = dict(arguments)
    strided["input"] = arguments["input"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided["linear_weight"] = arguments["linear_weight"].detach().t().contiguous().t().requires_grad_()
    strided["linear_bias"] = harness.lay_out(arguments["linear_bias"].detach(), "sliced").requires_grad_()
    strided["target"] = harness.lay_out(arguments["target"], "sliced")
    loss = tlk.linear_cross_entropy(**strided, impl=impl)
    same(loss, right)
    same(torch.autograd.grad(loss, layer(strided)), expected)


def test_inputs_are_not_changed(impl):
    arguments = call(dtype=BF16, target="probabilities", weighted=True)
    before = {name: value.detach().clone() for name, value in arguments.items()}
    torch.autograd.grad(tlk.linear_cross_entropy(**arguments, impl=impl), layer(arguments))
    assert all(torch.equal(before[name], arguments[name]) for name in before)


@native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_every_run(dtype):
    arguments = call((300,), 40, 257, dtype)
    runs = []
    for _ in range(3):
        loss = tlk.linear_cross_entropy(**arguments, impl="native")
        runs.append((loss.detach(), *torch.autograd.grad(loss, layer(arguments))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    input = torch.full((4096, 1), 6.0, dtype=F16, requires_grad=True)
    linear_weight = torch.tensor([[1.0], [-1.0]], dtype=F16, requires_grad=True)
    target = torch.zeros(4096, dtype=torch.long)
    loss = tlk.linear_cross_entropy(input, linear_weight, target, impl=impl)
    grads = torch.autograd.grad(loss, (input, linear_weight), torch.tensor(2.0**15, dtype=F16))
    wide = [tensor.detach().double().requires_grad_() for tensor in (input, linear_weight)]
    right = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].t(), target), wide, torch.tensor(2.0**15))
    for ours, expected in zip(grads, right, strict=True):
        same(ours.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_stats(impl, target, reduction, dtype):
    arguments = call((2, 3), dtype=dtype, target=target, **MIXED | {"reduction": reduction})
    ours = tlk.linear_cross_entropy_stats(**arguments, impl=impl)
    assert ours.lse.shape == ours.entropy.shape == ours.correct.shape == (2, 3)
    flat = arguments | {"input": arguments["input"].flatten(0, 1), "target": arguments["target"].flatten(0, 1)}
    right = dense(tlk.cross_entropy_stats, harness.widened(flat))
    loose = {} if dtype == F64 else {"rtol": 2e-2, "atol": 2e-2}
    for name in ("loss", "lse", "entropy"):
        same(getattr(ours, name).double().flatten(), getattr(right, name).flatten(), **loose)
    if dtype == F64:
        assert torch.equal(ours.correct.flatten(), right.correct)
    assert ours.lse.dtype == ours.entropy.dtype == (F64 if dtype == F64 else F32)
    upstream = torch.rand(2, 3)
    for factors in ((1, 0, 0), (0, 1, 0), (3, 1, 2)):  # lse alone, entropy alone, then both and the loss
        ours_sum, right_sum = (
            factors[0] * (result.lse * each).sum() + factors[1] * (result.entropy * each).sum()
            + factors[2] * result.loss.sum() for result, each in ((ours, upstream), (right, upstream.flatten()))
        )  # fmt: skip
        for a, b in zip(torch.autograd.grad(ours_sum, layer(arguments), retain_graph=True),
                        torch.autograd.grad(right_sum, layer(arguments), retain_graph=True), strict=True):  # fmt: skip
            same(a.double(), b.double(), **loose)


@native
def test_statistics_over_chunks():
    arguments = call((500,), 2, 70001, F32)
    ours = tlk.linear_cross_entropy_stats(**arguments, impl="native")
    right = dense(tlk.cross_entropy_stats, arguments)
    for name in ("loss", "lse", "entropy"):
        same(getattr(ours, name), getattr(right, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.correct, right.correct)
    upstream = torch.rand(500)
    for a, b in zip(torch.autograd.grad([ours.lse, ours.entropy], layer(arguments), [upstream, upstream]),
                    torch.autograd.grad([right.lse, right.entropy], layer(arguments), [upstream, upstream]),
                    strict=True):  # fmt: skip
        same(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


MEMORY = """
import sys, torch, tlkernels as tlk
dtype, rows, features, classes = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:])
input = torch.zeros(rows, features, dtype=dtype).requires_grad_()
weight = torch.zeros(classes, features, dtype=dtype).requires_grad_()
target = torch.zeros(rows, dtype=torch.long)
loss = lambda *arguments: tlk.linear_cross_entropy(*arguments, impl="native")
loss(input[:2], weight[:10], target[:2]).backward()  # loads what a first call loads
input.grad = weight.grad = None
print((peak(lambda: loss(input, weight, target).backward()) - (input.nbytes + weight.nbytes)) / 1e6)
"""


@native
@pytest.mark.parametrize(("dtype", "rows", "features", "classes", "most"), [
    # The logits would take 525 MB.
    ("float32", 4096, 16, 32064, 160), pytest.param("float32", 1024, 1024, 128256, 160, marks=pytest.mark.full),
    # Plus the float32 sum of the weight's gradient, 2.1 MB and 525 MB. The logits would take 263 MB.
    ("bfloat16", 4096, 16, 32064, 160 + 2.1),
    pytest.param("bfloat16", 1024, 1024, 128256, 160 + 525.4, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_peak_memory(dtype, rows, features, classes, most):
    """Megabytes above the inputs and their gradients: nothing has the logits' size."""
    (used,) = helpers.peak_memory(MEMORY, dtype, rows, features, classes)
    assert used < most
