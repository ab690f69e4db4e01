"""What is particular to linear cross entropy: the dense form, products run and not run, chunks, edges, errors."""

import itertools
import math
import subprocess
import sys

import harness
import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import LAYER, MIXED, make, pytorch

import tlkernels as tlk
from tlkernels._core import triton

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
IMPLEMENTATIONS = sorted({target.impl for target in harness.targets()})
native = pytest.mark.usefixtures("needs_native")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=harness.targets(loss="linear_cross_entropy"), ids=str)
def impl(request):
    with harness.forced(request.param) as name:
        yield name


@pytest.fixture(params=IMPLEMENTATIONS)
def any_isa(request):
    return request.param


def same(result, expected, **tolerance):
    torch.testing.assert_close(result, expected, **{"rtol": 1e-10, "atol": 1e-12, "equal_nan": True} | tolerance)


def call(rows=(6,), features=5, classes=37, dtype=F64, target="indices", weighted=False, seed=0, **options):
    """The arguments of a call with a bias, its layer's tensors as leaves."""
    arguments = make(rows, features, classes, dtype, target, True, weighted, options, seed)
    return arguments | {name: arguments[name].requires_grad_() for name in LAYER}


def layer(arguments):
    return tuple(arguments[name] for name in LAYER)


def dense(function, arguments, **more):
    """The same call of a loss of logits."""
    options = dict(arguments)
    input, linear_weight, linear_bias, target = (options.pop(name) for name in (*LAYER, "target"))
    weight = options.pop("weight", None)
    return function(F.linear(input, linear_weight, linear_bias), target, weight, **options, **more)


OPTIONS = [
    dict(zip(("label_smoothing", "temperature", "softcap", "z_loss", "reduction", "ignore_index"), values, strict=True))
    for values in itertools.product((0.0, 0.1), (1.0, 2.5), (None, 5.0), (0.0, 0.01), ("mean", "none", "sum"), (-100,))
] + [{"ignore_index": 3}, {"ignore_index": -1, "reduction": "none"}]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS, ids=harness.words)
def test_the_dense_form_agrees(any_isa, options, target, weighted):
    if target == "probabilities" and options["ignore_index"] >= 0:
        return
    arguments = call(target=target, weighted=weighted, **options)
    loss = tlk.linear_cross_entropy(**arguments, impl=any_isa)
    expected = dense(tlk.cross_entropy, arguments)
    same(loss, expected)
    upstream = torch.rand_like(loss)
    same(torch.autograd.grad(loss, layer(arguments), upstream),
         torch.autograd.grad(expected, layer(arguments), upstream))  # fmt: skip


SAMPLES = [(F32, 25), *(pytest.param(dtype, 1, marks=pytest.mark.full) for dtype in (F64, F32, BF16, F16))]


@pytest.mark.parametrize(("dtype", "step"), SAMPLES, ids=str)
def test_pytorch_samples(impl, dtype, step):
    """PyTorch's own samples of the function, but for those of several layers (linear_weight of more dimensions)."""
    from torch.testing._internal.common_methods_invocations import op_db

    ops = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]

    def draw(seed):
        torch.manual_seed(seed)
        samples = [sample for op in ops for sample in op.sample_inputs("cpu", dtype)]
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
    """How many matrix products a call makes."""
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

    logits = 2 if reduction == "none" and needed else 1  # "none" makes them again in the backward
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
    budgets = {}
    arguments = call((rows,), 1000 if classes == 3001 else 16, classes, BF16, target)

    def run(function, arguments):
        loss = function(**arguments)
        return loss, *torch.autograd.grad(loss, layer(arguments))

    ours = run(tlk.linear_cross_entropy, arguments)
    eager = run(pytorch, arguments)
    wide = harness.widened(arguments)
    wide |= {name: wide[name].detach().requires_grad_() for name in LAYER}
    for name, *values in zip(("loss", *LAYER), ours, eager, run(pytorch, wide), strict=True):
        budgets[name] = harness.Budget(BF16)
        budgets[name].add(*values)
        budgets[name].check(name)


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
    """Two chunks, of which the second counts nothing; then the first."""
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


@pytest.mark.parametrize("bad", [37, -1, 2**40])
def test_class_index_out_of_range(impl, bad, monkeypatch):
    monkeypatch.setenv("TLKERNELS_CHECK", "1")  # for CUDA's kernels
    for reduction in ("mean", "none"):
        arguments = call(reduction=reduction)
        arguments["target"] = torch.tensor([0, 1, bad, 3, 4, 5])
        with pytest.raises(IndexError):
            tlk.linear_cross_entropy(**arguments, impl=impl)
    assert tlk.linear_cross_entropy(**arguments | {"ignore_index": bad, "reduction": "mean"}, impl=impl).isfinite()


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards(impl, reduction):
    """A second backward fails or doubles (QuACK #209); a gradient changed by its owner does not change the next."""
    arguments = call(dtype=F32, reduction=reduction)
    loss = tlk.linear_cross_entropy(**arguments, impl=impl).sum() * 3
    first = torch.autograd.grad(loss, layer(arguments), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss, layer(arguments), retain_graph=True)
    third = torch.autograd.grad(loss, layer(arguments))
    for a, b, c in zip(kept, second, third, strict=True):
        same(a, b, rtol=1e-5, atol=1e-7)
        assert torch.equal(b, c)


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
    assert ours.lse.dtype == ours.entropy.dtype == (F64 if dtype == F64 else F32) and not ours.entropy.requires_grad
    upstream = torch.rand(2, 3)
    for factor in (0, 2):  # of the loss beside lse
        ours_sum = (ours.lse * upstream).sum() + factor * ours.loss.sum()
        right_sum = (right.lse * upstream.flatten()).sum() + factor * right.loss.sum()
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
    for a, b in zip(torch.autograd.grad(ours.lse, layer(arguments), upstream),
                    torch.autograd.grad(right.lse, layer(arguments), upstream), strict=True):  # fmt: skip
        same(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_ignored_rows_have_statistics(any_isa):
    arguments = call()
    arguments["target"] = torch.full((6,), -100)
    ours = tlk.linear_cross_entropy_stats(**arguments, impl=any_isa)
    right = dense(tlk.cross_entropy_stats, arguments)
    same(ours.lse, right.lse)
    same(ours.entropy, right.entropy)
    same(torch.autograd.grad(ours.lse.sum(), layer(arguments)), torch.autograd.grad(right.lse.sum(), layer(arguments)))


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("options", [{}, MIXED | {"reduction": "none"}], ids=str)
def test_higher_derivatives(any_isa, target, options):
    """create_graph=True silently partial (Liger, CCE, QuACK, flash-attn)."""
    arguments = call((3,), 2, 4, target=target, **options)

    def loss(*tensors):
        return tlk.linear_cross_entropy(**arguments | dict(zip(LAYER, tensors, strict=True)), impl=any_isa)

    def lse(*tensors):
        return tlk.linear_cross_entropy_stats(**arguments | dict(zip(LAYER, tensors, strict=True)), impl=any_isa).lse

    fast = any_isa == "triton" and triton.INTERPRETED  # along random directions: it takes its time
    for function in (loss, lse):
        assert torch.autograd.gradcheck(function, layer(arguments), fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, layer(arguments), fast_mode=fast)


def test_partial_second_derivative(any_isa):
    arguments = call((3,), 2, 4)
    arguments["linear_weight"] = arguments["linear_weight"].detach()
    results = []
    for function in (lambda **a: tlk.linear_cross_entropy(**a, impl=any_isa), pytorch):
        (grad,) = torch.autograd.grad(function(**arguments), arguments["input"], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), (arguments["input"], arguments["linear_bias"])))
    same(*results)


@pytest.mark.parametrize("transform", [
    lambda f: torch.func.grad(f, argnums=(0, 1)), lambda f: torch.func.jacrev(f), lambda f: torch.func.jacfwd(f),
    lambda f: torch.func.hessian(f), lambda f: lambda x, w: torch.func.jvp(f, (x, w), (x + 1, w - 1)),
    lambda f: lambda x, w: torch.func.vmap(f)(torch.stack([x, x + 1]), torch.stack([w, w - 1])),
    lambda f: lambda x, w: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([x, x + 1]), w),
], ids=["grad", "jacrev", "jacfwd", "hessian", "jvp", "vmap", "vmap(grad)"])  # fmt: skip
def test_func(transform):
    """`auto` gives PyTorch's values, through the reference; native says why it does not."""
    arguments = call((4,), 3, 5)
    input, linear_weight, target = (arguments[name].detach() for name in ("input", "linear_weight", "target"))
    right = transform(lambda x, w: F.cross_entropy(F.linear(x, w), target))(input, linear_weight)
    same(transform(lambda x, w: tlk.linear_cross_entropy(x, w, target))(input, linear_weight), right)
    with pytest.raises(NotImplementedError, match=r"torch\.func|forward-mode"):
        transform(lambda x, w: tlk.linear_cross_entropy(x, w, target, impl="native"))(input, linear_weight)


def test_forward_mode():
    arguments = call((4,), 3, 5)
    input, linear_weight, target = (arguments[name].detach() for name in ("input", "linear_weight", "target"))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, input + 1)
        tangent = torch.autograd.forward_ad.unpack_dual(tlk.linear_cross_entropy(dual, linear_weight, target)).tangent
        with pytest.raises(NotImplementedError, match="forward-mode"):
            tlk.linear_cross_entropy(dual, linear_weight, target, impl="native")
    right = torch.func.jvp(lambda x: F.cross_entropy(F.linear(x, linear_weight), target), (input,), (input + 1,))
    same(tangent, right[1])


@pytest.mark.parametrize("name", ["weight", "target"])
def test_gradients_of_the_rest_are_never_silent(name):
    arguments = call(target="probabilities", weighted=True)
    arguments[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"no gradient for {name}"):
        tlk.linear_cross_entropy(**arguments, impl="native")
    (grad,) = torch.autograd.grad(tlk.linear_cross_entropy(**arguments), arguments[name])
    same(grad, torch.autograd.grad(pytorch(**arguments), arguments[name])[0])


@pytest.mark.parametrize("options", [{}, MIXED | {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_compile(any_isa, options, target):
    arguments = call(dtype=F32, target=target, **options)

    def loss(*tensors):
        scaled = arguments | dict(zip(LAYER, tensors, strict=True)) | {"input": tensors[0] * 2}
        return tlk.linear_cross_entropy(**scaled, impl=any_isa).sum() * 3

    torch._dynamo.reset()
    compiled, plain = torch.compile(loss, fullgraph=True)(*layer(arguments)), loss(*layer(arguments))
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, layer(arguments)), torch.autograd.grad(plain, layer(arguments))
    )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacfwd])
def test_compiled_transforms(transform):
    arguments = call((4,), 3, 5)
    input, linear_weight, target = (arguments[name].detach() for name in ("input", "linear_weight", "target"))
    torch._dynamo.reset()
    function = transform(lambda x: tlk.linear_cross_entropy(x, linear_weight, target))
    same(torch.compile(function, backend="aot_eager")(input),
         transform(lambda x: F.cross_entropy(F.linear(x, linear_weight), target))(input))  # fmt: skip


def test_activation_checkpoint(any_isa):
    from torch.utils.checkpoint import checkpoint

    arguments = call()

    def loss(input):
        return tlk.linear_cross_entropy(**arguments | {"input": input * 2}, impl=any_isa)

    expected = torch.autograd.grad(loss(arguments["input"]), layer(arguments))
    same(torch.autograd.grad(checkpoint(loss, arguments["input"], use_reentrant=False), layer(arguments)), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(impl, reduction):
    """As of the layer and the loss in PyTorch: products of bfloat16, a loss of float32."""
    arguments = call((64,), 16, 50, F32, reduction=reduction)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        loss = tlk.linear_cross_entropy(**arguments, impl=impl)
        expected = dense(F.cross_entropy, arguments)
    assert loss.dtype == expected.dtype == F32
    same(loss, expected, rtol=1e-2, atol=1e-2)
    upstream = torch.rand_like(loss)
    for ours, right in zip(torch.autograd.grad(loss, layer(arguments), upstream),
                           torch.autograd.grad(expected, layer(arguments), upstream), strict=True):  # fmt: skip
        assert ours.dtype == F32
        same(ours, right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
ERRORS = [
    (TypeError, "input: expected a Tensor, got list", ([[1.0]], W, Y), {}),
    (TypeError, "linear_weight: expected a Tensor, got NoneType", (X, None, Y), {}),
    (TypeError, "linear_bias: expected a Tensor, got float", (X, W, Y), {"linear_bias": 1.0}),
    (TypeError, "target: expected a Tensor, got int", (X, W, 3), {}),
    (TypeError, "input: expected float64, .* got torch.int64", (X.long(), W, Y), {}),
    (ValueError, "input: expected shape .* got a 0-d", (torch.tensor(1.0), W, Y), {}),
    (TypeError, "linear_weight: expected the input's dtype torch.float32, got torch.float64", (X, W.double(), Y), {}),
    (TypeError, "linear_bias: expected the input's dtype", (X, W, Y), {"linear_bias": torch.ones(5).double()}),
    (ValueError, "linear_weight: expected it on the input's device cpu, got meta", (X, W.to("meta"), Y), {}),
    (ValueError, r"linear_weight: .* in_features 3 .* got \(5, 4\)", (X, torch.randn(5, 4), Y), {}),
    (ValueError, r"linear_weight: .* got \(5, 2, 3\)", (X, torch.randn(5, 2, 3), Y), {}),
    (ValueError, r"linear_weight: .* at least one class, got \(0, 3\)", (X, torch.randn(0, 3), Y), {}),
    (ValueError, r"linear_bias: expected shape \(5,\), .* got \(4,\)", (X, W, Y), {"linear_bias": torch.ones(4)}),
    (ValueError, r"target: expected class indices of shape \(4,\), .* got \(3,\)", (X, W, Y[:3]), {}),
    (ValueError, r"target: .* logits' shape \(4, 5\), got \(4, 3\)", (X, W, X), {}),
    (TypeError, "target: expected class indices or floating-point probabilities, got torch.bool", (X, W, Y > 0), {}),
    (ValueError, "target: expected it on the input's device cpu, got meta", (X, W, Y.to("meta")), {}),
    (ValueError, r"weight: expected shape \(5,\)", (X, W, Y), {"weight": torch.ones(4)}),
    (ValueError, "reduction: expected one of .* got 'batchmean'", (X, W, Y), {"reduction": "batchmean"}),
    (ValueError, r"label_smoothing: expected a number in \[0, 1\]", (X, W, Y), {"label_smoothing": 1.5}),
    (ValueError, "temperature: expected a finite number above 0", (X, W, Y), {"temperature": 0}),
    (ValueError, "softcap: expected None or", (X, W, Y), {"softcap": -1}),
    (ValueError, "z_loss: expected", (X, W, Y), {"z_loss": -0.1}),
    (TypeError, "ignore_index: expected an int", (X, W, Y), {"ignore_index": 1.0}),
    (ValueError, "ignore_index: .* probabilities", (X, W, torch.ones(4, 5)), {"ignore_index": 2}),
    (ValueError, "impl: expected 'auto' or one of", (X, W, Y), {"impl": "cuda"}),
    (NotImplementedError, "triton", (X.to("meta"), W.to("meta"), Y.to("meta")), {"impl": "triton"}),
]


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"), ERRORS, ids=[f"{e[0].__name__}-{e[1][:24]}" for e in ERRORS]
)
@pytest.mark.parametrize("function", [tlk.linear_cross_entropy, tlk.linear_cross_entropy_stats])
def test_bad_arguments(function, error, message, args, kwargs):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


class TestModule:
    def test_takes_the_place_of_torchs(self):
        kwargs = {"bias": True, "weight": torch.rand(5), "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
        ours, torchs = tlk.LinearCrossEntropyLoss(3, 5, **kwargs), torch.nn.LinearCrossEntropyLoss(3, 5, **kwargs)
        assert list(ours.state_dict()) == list(torchs.state_dict()) == ["weight", "linear.weight", "linear.bias"]
        ours.load_state_dict(torchs.state_dict())
        torch.testing.assert_close(ours(X, Y), torchs(X, Y))
        ours(X, Y).backward()
        assert ours.linear.weight.grad.shape == (5, 3) and ours.linear.bias.grad.shape == (5,)
        assert "label_smoothing=0.1" in repr(ours)

    def test_device_and_dtype(self):
        made = tlk.LinearCrossEntropyLoss(3, 5, dtype=torch.float64, device="cpu")
        assert made.linear.weight.dtype == torch.float64 and made.linear.bias is None

    def test_every_option_reaches_the_function(self):
        """An option that is accepted and ignored leaves the loss as it is."""
        made = {}
        for option in ({}, {"ignore_index": 1}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"temperature": 2.0},
                       {"softcap": 1.0}, {"z_loss": 0.1}, {"weight": torch.rand(5)}, {"bias": True}):  # fmt: skip
            for impl in IMPLEMENTATIONS:
                torch.manual_seed(1)
                loss = tlk.LinearCrossEntropyLoss(3, 5, **option, impl=impl)(X, Y)
                assert not option or not torch.allclose(loss, made[impl])
                made.setdefault(impl, loss)
        with pytest.raises(NotImplementedError):
            tlk.LinearCrossEntropyLoss(3, 5, impl="triton", device="meta")(X.to("meta"), Y.to("meta"))

    @pytest.mark.parametrize("name", ["size_average", "reduce", "out_features", "options"])
    def test_what_is_not_taken_raises(self, name):
        with pytest.raises(TypeError, match=name):
            tlk.LinearCrossEntropyLoss(3, 5, **{name: None})


MEMORY = """
import sys, torch, tlkernels as tlk
dtype, rows, features, classes = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:])
input = torch.zeros(rows, features, dtype=dtype).requires_grad_()
weight = torch.zeros(classes, features, dtype=dtype).requires_grad_()
target = torch.zeros(rows, dtype=torch.long)
tlk.linear_cross_entropy(input[:2], weight[:10], target[:2], impl="native").backward()   # what a first call loads
input.grad = weight.grad = None

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
tlk.linear_cross_entropy(input, weight, target, impl="native").backward()
print((status("VmHWM") - before - (input.nbytes + weight.nbytes)) / 1e6)
"""


@native
@pytest.mark.parametrize(("dtype", "rows", "features", "classes", "most"), [
    # The logits would take 525 MB.
    ("float32", 4096, 16, 32064, 160), pytest.param("float32", 1024, 1024, 128256, 160, marks=pytest.mark.full),
    # Beside the float32 sum of the weight's gradient, 2.1 MB and 525 MB. The logits would take 263 MB.
    ("bfloat16", 4096, 16, 32064, 160 + 2.1),
    pytest.param("bfloat16", 1024, 1024, 128256, 160 + 525.4, marks=pytest.mark.full),
], ids=str)  # fmt: skip
def test_peak_memory(dtype, rows, features, classes, most):
    """Megabytes above the inputs and their gradients: nothing of the logits' size."""
    command = [sys.executable, "-c", MEMORY, dtype, *map(str, (rows, features, classes))]
    used = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert used < most
