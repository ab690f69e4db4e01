"""Linear cross entropy's derivatives: repeated and higher ones, torch.func, torch.compile, checkpointing, autocast."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import BF16, F32, LAYER, MIXED, call, dense, layer, pytorch, same

import tlkernels as tlk
from tlkernels._core import triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("linear_cross_entropy")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards(impl, reduction):
    """A second backward must neither fail nor double (QuACK #209), nor see that the first gradients were changed."""
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


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("options", [{}, MIXED | {"reduction": "none"}], ids=str)
def test_higher_derivatives(any_impl, target, options):
    """In others create_graph=True silently gives a part (Liger, CCE, QuACK, flash-attn)."""
    arguments = call((3,), 2, 4, target=target, **options)

    def loss(*tensors):
        return tlk.linear_cross_entropy(**arguments | dict(zip(LAYER, tensors, strict=True)), impl=any_impl)

    def lse(*tensors):
        return tlk.linear_cross_entropy_stats(**arguments | dict(zip(LAYER, tensors, strict=True)), impl=any_impl).lse

    fast = any_impl == "triton" and triton.INTERPRETED  # random directions: the interpreter is slow

    def entropy(*tensors):
        arguments_of = arguments | dict(zip(LAYER, tensors, strict=True))
        return tlk.linear_cross_entropy_stats(**arguments_of, impl=any_impl).entropy

    for function in (loss, lse, entropy):
        assert torch.autograd.gradcheck(function, layer(arguments), fast_mode=fast)
        assert torch.autograd.gradgradcheck(function, layer(arguments), fast_mode=fast)


def test_partial_second_derivative(any_impl):
    arguments = call((3,), 2, 4)
    arguments["linear_weight"] = arguments["linear_weight"].detach()
    results = []
    for function in (lambda **a: tlk.linear_cross_entropy(**a, impl=any_impl), pytorch):
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
    """`auto` gives PyTorch's values, through the reference; native raises and says why."""
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
def test_compile(any_impl, options, target):
    arguments = call(dtype=F32, target=target, **options)

    def loss(*tensors):
        scaled = arguments | dict(zip(LAYER, tensors, strict=True)) | {"input": tensors[0] * 2}
        return tlk.linear_cross_entropy(**scaled, impl=any_impl).sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*layer(arguments))
    plain = loss(*layer(arguments))
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


def test_activation_checkpoint(any_impl):
    from torch.utils.checkpoint import checkpoint

    arguments = call()

    def loss(input):
        return tlk.linear_cross_entropy(**arguments | {"input": input * 2}, impl=any_impl)

    expected = torch.autograd.grad(loss(arguments["input"]), layer(arguments))
    same(torch.autograd.grad(checkpoint(loss, arguments["input"], use_reentrant=False), layer(arguments)), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(impl, reduction):
    """As PyTorch's layer and loss: bfloat16 products, a float32 loss."""
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
