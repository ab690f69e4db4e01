"""mse and rmse: PyTorch's samples, broadcasting, dtypes, the gradient at 0, derivatives, memory, errors, modules."""

import math
import warnings

import harness
import helpers
import mse_cases
import pytest
import rmse_cases
import torch
import torch.nn.functional as F
from mse_cases import BF16, F16, F32, F64

import tlkernels as tlk

native = pytest.mark.usefixtures("needs_native")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
PAIRS = [(tlk.mse, mse_cases.pytorch), (tlk.rmse, rmse_cases.pytorch)]
both = pytest.mark.parametrize(("ours", "pytorch"), PAIRS, ids=["mse", "rmse"])
impl = helpers.impl_fixture()


def same(result, expected, **tolerance):
    torch.testing.assert_close(result, expected, **{"rtol": 1e-12, "atol": 1e-14, "equal_nan": True} | tolerance)


def leaves(*shapes, dtype=F64):
    return tuple(torch.randn(shape, dtype=F64).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_pytorch_samples(impl, dtype):
    samples = helpers.pytorch_samples("nn.functional.mse_loss", dtype)
    assert len(samples) > 5
    for sample in samples:

        def run(function, *tensors, kwargs=sample.kwargs):
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
            value = function(*tensors, **kwargs).sum()
            return value, *torch.autograd.grad(value, tensors, torch.full_like(value, 1.5))

        tensors = (sample.input, *sample.args)
        results = (run(lambda *t, **options: tlk.mse(*t, impl=impl, **options), *tensors), run(F.mse_loss, *tensors),
                   run(F.mse_loss, *(tensor.double() for tensor in tensors)))  # fmt: skip
        names = [f"{name} of {tuple(sample.input.shape)} {sample.kwargs}" for name in ("loss", "input", "target")]
        harness.check_results(dtype, zip(names, *results, strict=True))


@both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((2, 3), ())], ids=str)
def test_broadcasting_is_pytorchs(impl, ours, pytorch, shapes, reduction, weighted):
    tensors = leaves(*shapes)
    weight = torch.rand(shapes[0], dtype=F64) if weighted else None
    with pytest.warns(UserWarning, match=r"target: expected the input's shape .* broadcast"):
        loss = ours(*tensors, weight=weight, reduction=reduction, impl=impl)
    with warnings.catch_warnings(action="ignore"):
        expected = pytorch(*tensors, weight=weight, reduction=reduction)
    same(loss, expected)
    upstream = torch.rand_like(loss)
    same(torch.autograd.grad(loss, tensors, upstream), torch.autograd.grad(expected, tensors, upstream))


@both
@pytest.mark.parametrize(
    "dtypes", [(F32, F64), (BF16, F32), (torch.int64, F32), (F32, torch.int32), (F16, BF16)], ids=str
)
def test_dtypes_are_promoted(impl, ours, pytorch, dtypes):
    tensors = [torch.arange(12).reshape(3, 4).to(dtypes[0]), torch.arange(12).flip(0).reshape(3, 4).to(dtypes[1])]
    wanted = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    loss, expected = ours(*tensors, impl=impl), pytorch(*tensors)
    same(loss, expected, rtol=1e-6)
    for grad, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        same(grad, right, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_rmse_where_there_is_no_error(impl, eps, reduction):
    """Without eps the gradient is infinity times 0, NaN, as torch.sqrt's."""
    input = torch.ones(3, requires_grad=True)
    loss = tlk.rmse(input, torch.ones(3), eps=eps, reduction=reduction, impl=impl)
    same(loss, torch.full(loss.shape, math.sqrt(eps)), rtol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), input)
    assert grad.isnan().all() if eps == 0 else torch.equal(grad, torch.zeros(3))


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_no_elements(impl, ours, pytorch, weighted):
    for reduction in ("mean", "sum", "none"):
        tensors = leaves((0, 3), (0, 3), dtype=F32)
        weight = torch.rand(0, 3) if weighted else None
        loss = ours(*tensors, weight=weight, reduction=reduction, impl=impl)
        same(loss, pytorch(*tensors, weight=weight, reduction=reduction))
        assert all(grad.shape == (0, 3) for grad in torch.autograd.grad(loss.sum(), tensors))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinity_and_nan(impl, value):
    tensors = leaves((5,), (5,), dtype=F32)
    with torch.no_grad():
        tensors[0][3] = value
    loss, expected = tlk.mse(*tensors, reduction="none", impl=impl), F.mse_loss(*tensors, reduction="none")
    same(loss, expected)
    same(torch.autograd.grad(loss.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    input = torch.full((60000,), 1e-3, dtype=F16, requires_grad=True)
    loss = tlk.mse(input, torch.zeros_like(input), impl=impl)
    (grad,) = torch.autograd.grad(loss, input, torch.tensor(2.0**14, dtype=F16))
    same(grad.double(), 2 * input.detach().double() * 2.0**14 / 60000, rtol=2e-3, atol=0)


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards(impl, ours, pytorch, reduction):
    tensors = leaves((50, 100), (50, 100), dtype=F32)
    loss = ours(*tensors, reduction=reduction, eps=1.0, impl=impl) if ours is tlk.rmse else ours(
        *tensors, reduction=reduction, impl=impl
    )  # fmt: skip
    loss = 3 * loss.sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    same(torch.autograd.grad(loss, tensors, retain_graph=True), tuple(kept), rtol=1e-6)
    same(torch.autograd.grad(loss, tensors), tuple(kept), rtol=1e-6)


@both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_higher_derivatives(any_impl, ours, pytorch, reduction, weighted):
    weight = torch.rand(3, 4, dtype=F64) if weighted else None
    tensors = leaves((3, 4), (3, 4))

    def loss(*tensors):
        return ours(*tensors, weight=weight, reduction=reduction, impl=any_impl)

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


@both
@pytest.mark.parametrize("transform", [
    torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian,
    lambda f: lambda x: torch.func.jvp(f, (x,), (x + 1,)), torch.func.vmap,
    lambda f: torch.func.vmap(torch.func.grad(f)),
], ids=["grad", "jacrev", "jacfwd", "hessian", "jvp", "vmap", "vmap(grad)"])  # fmt: skip
def test_func(ours, pytorch, transform):
    """`auto` gives PyTorch's values, through the reference; native raises and says why."""
    input, target = torch.randn(3, 4, dtype=F64), torch.zeros(4, dtype=F64)
    input = input if transform is torch.func.vmap or "vmap" in str(transform.__code__.co_names) else input[0]
    same(transform(lambda x: ours(x, target))(input), transform(lambda x: pytorch(x, target))(input))
    with pytest.raises(NotImplementedError, match=r"torch\.func|forward-mode"):
        transform(lambda x: ours(x, target, impl="native"))(input)


@both
def test_gradient_of_weight_is_never_silent(ours, pytorch):
    tensors, weight = leaves((3, 4), (3, 4)), torch.rand(3, 4, dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient for weight"):
        ours(*tensors, weight=weight, impl="native")
    same(torch.autograd.grad(ours(*tensors, weight=weight), weight),
         torch.autograd.grad(pytorch(*tensors, weight=weight), weight))  # fmt: skip


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_compile(any_impl, ours, pytorch, reduction, weighted):
    tensors, weight = leaves((30, 40), (30, 40), dtype=F32), torch.rand(30, 40) if weighted else None

    def loss(x, t):
        return 3 * ours(x * 2, t, weight=weight, reduction=reduction, impl=any_impl).sum()

    torch._dynamo.reset()
    compiled, plain = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), loss(*tensors)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, tensors), torch.autograd.grad(plain, tensors))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@both
def test_autocast_gives_float32(impl, ours, pytorch, dtype):
    tensors = leaves((64, 50), (64, 50), dtype=dtype)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        loss = ours(*tensors, impl=impl)
    assert loss.dtype == F32
    same(loss.double(), pytorch(*(tensor.double() for tensor in tensors)), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, tensors)[0].dtype == dtype


@native
def test_same_bits_at_any_number_of_threads():
    tensors = leaves((300, 1001), (300, 1001), dtype=F32)

    def run():
        loss = tlk.mse(*tensors, impl="native")
        return loss.detach(), *torch.autograd.grad(loss, tensors)

    first, *others = helpers.at_thread_counts((1, 2, 3), run)
    assert all(all(map(torch.equal, first, other)) for other in others)


MEMORY = """
import torch, tlkernels as tlk
input, target = torch.ones(1 << 25), torch.ones(1 << 25)
tlk.mse(input[:9].requires_grad_(), target[:9]).backward()  # loads what a first call loads
input.requires_grad_()
print(peak(lambda: tlk.mse(input, target).backward()) / input.nbytes)
"""


@native
def test_peak_memory():
    """One gradient, and nothing else of its size."""
    (used,) = helpers.peak_memory(MEMORY)
    assert 0.98 < used < 1.05


X = torch.randn(3, 4)
ERRORS = [
    (TypeError, "input: expected a Tensor, got list", ([1.0], X), {}),
    (TypeError, "target: expected a Tensor, got int", (X, 3), {}),
    (TypeError, "weight: expected a Tensor or None, got float", (X, X), {"weight": 1.0}),
    (TypeError, "input: expected float64, .* got torch.bool", (X > 0, X), {}),
    (TypeError, "target: expected float64, .* got torch.complex64", (X, X.to(torch.complex64)), {}),
    (TypeError, "input: expected a floating-point dtype with a target of .* got torch.int64", (X.long(), X.long()), {}),
    (ValueError, "target: expected it on the input's device cpu, got meta", (X, X.to("meta")), {}),
    (ValueError, r"target: expected the input's shape \(3, 4\), or .* got \(3,\)", (X, X[:, 0]), {}),
    (ValueError, r"weight: expected the input's shape \(3, 4\), got \(4,\)", (X, X), {"weight": X[0]}),
    (ValueError, "reduction: expected one of .* got 'batchmean'", (X, X), {"reduction": "batchmean"}),
    (ValueError, "impl: expected 'auto' or one of", (X, X), {"impl": "cuda"}),
    (NotImplementedError, "triton: supports|triton is not", (X.to("meta"), X.to("meta")), {"impl": "triton"}),
]


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"), ERRORS, ids=[f"{e[0].__name__}-{e[1][:24]}" for e in ERRORS]
)
@pytest.mark.parametrize("function", [tlk.mse, tlk.rmse])
def test_bad_arguments(function, error, message, args, kwargs):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "eps"), [(ValueError, -1.0), (ValueError, math.nan), (TypeError, "0"), (TypeError, True)]
)
def test_bad_eps(error, eps):
    with pytest.raises(error, match="eps: expected"):
        tlk.rmse(X, X, eps=eps)


class TestModule:
    def test_takes_the_place_of_torchs(self):
        for reduction in ("mean", "sum", "none"):
            same(tlk.MSELoss(reduction=reduction)(X, X + 1), torch.nn.MSELoss(reduction=reduction)(X, X + 1), rtol=1e-6)
        assert "reduction='sum'" in repr(tlk.MSELoss(reduction="sum"))
        assert "eps=0.5" in repr(tlk.RMSELoss(eps=0.5))

    def test_every_option_reaches_the_function(self):
        plain = tlk.RMSELoss()(X, X + 1)
        for loss in (tlk.RMSELoss(eps=0.5)(X, X + 1), tlk.RMSELoss(reduction="sum")(X, X + 1),
                     tlk.RMSELoss()(X, 2 * X + 1, weight=X.abs())):  # fmt: skip
            assert not torch.allclose(loss, plain)
        for made in (tlk.MSELoss, tlk.RMSELoss):
            with pytest.raises(NotImplementedError):
                made(impl="native")(X.to("meta"), X.to("meta"))

    @pytest.mark.parametrize("name", ["size_average", "reduce"])
    def test_deprecated_arguments_raise(self, name):
        with pytest.raises(TypeError, match=name):
            tlk.MSELoss(**{name: True})
