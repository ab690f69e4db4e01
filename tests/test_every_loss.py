"""The battery that every loss goes through; a loss joins by a `LOSS` in tests/<loss>_cases.py."""

import inspect
from functools import partial

import harness
import helpers
import pytest
import torch
from battery import LOSSES, Call, draw, gradients, leaves, targets, upstream_of

import tlkernels as tlk
from tlkernels._core import triton


def over(which=lambda loss, case: True, quick=lambda loss, case: True):
    """Parametrise by the cases for which `which` is true; mark those full for which `quick` is false."""
    chosen = [
        pytest.param(loss, case, id=f"{name}-{case.id}", marks=[] if quick(loss, case) else [pytest.mark.full])
        for name, loss in LOSSES.items()
        for case in loss.cases
        if which(loss, case)
    ]
    return pytest.mark.parametrize(("loss", "case"), chosen)


def over_targets():
    """Parametrise by all cases and their targets."""
    chosen = [
        pytest.param(
            loss, case, target, id=f"{name}-{case.id}-{target}", marks=[pytest.mark.full] if case.large else []
        )
        for name, loss in LOSSES.items()
        for target in targets(name)
        for case in loss.cases
        if not (case.large and target.isa == harness.CUDA_HOST)
    ]
    return pytest.mark.parametrize(("loss", "case", "target"), chosen)


def one_each(loss, case):
    return case is loss.cases[0]


def small(loss, case):
    return case.small


def first_small(loss, case):
    return case is next(filter(partial(small, loss), loss.cases))


@pytest.fixture(params=helpers.IMPLEMENTATIONS)
def impl(request):
    return request.param


def same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.core
@pytest.mark.usefixtures("poisoned_memory")
@over_targets()
def test_value_and_gradients(loss, case, target):
    interpreted = target.impl == "triton" and triton.INTERPRETED  # slow
    harness.check_budgets(case.dtype, partial(draw, loss, case, target), first=1 if interpreted else 3)


@pytest.mark.core
@pytest.mark.usefixtures("poisoned_memory")
@over(lambda loss, case: case.small or case is loss.cases[0])
def test_only_the_gradients_that_are_asked_for(loss, case, impl):
    call = Call(loss, case, impl)
    _, expected = gradients(call.ours, call.tensors)
    for k, right in enumerate(expected):
        inputs = [tensor.detach().requires_grad_(i == k) for i, tensor in enumerate(call.tensors)]
        value = call.ours(*inputs)
        (grad,) = torch.autograd.grad(value, inputs[k], upstream_of(value))
        torch.testing.assert_close(grad, right)
    assert not call.ours(*(tensor.detach() for tensor in call.tensors)).requires_grad


@over(lambda loss, case: case.small or case is loss.cases[0])
def test_two_backwards_and_a_third_that_is_too_much(loss, case, impl):
    """A second backward must neither fail nor double (QuACK #209), nor see that the first gradients were changed."""
    call = Call(loss, case, impl)
    inputs = leaves(call.tensors)
    value = call.ours(*inputs)
    first = torch.autograd.grad(value, inputs, upstream_of(value), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    torch.testing.assert_close(list(torch.autograd.grad(value, inputs, upstream_of(value))), kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, inputs, upstream_of(value))


@over(one_each)
def test_same_bits_run_after_run(loss, case, impl):
    def run():
        call = Call(loss, case, impl)
        value, grads = gradients(call.ours, call.tensors)
        return value, *grads

    threads = torch.get_num_threads()
    independent = loss.rowwise and impl != "reference"  # eager's sums depend on the number of threads
    first, *others = helpers.at_thread_counts((threads, threads, *[1] * independent), run)
    assert all(all(map(torch.equal, first, other)) for other in others)


@over(small, quick=first_small)
def test_gradcheck(loss, case, impl):
    call = Call(loss, case, impl)
    fast = impl == "triton" and triton.INTERPRETED  # random directions: the interpreter is slow
    assert torch.autograd.gradcheck(call.ours, leaves(call.tensors), fast_mode=fast)
    assert torch.autograd.gradgradcheck(call.ours, leaves(call.tensors), fast_mode=fast)


@over(small)
def test_second_gradient(loss, case, impl):
    """By every input and the upstream; in others create_graph=True silently gives a part (Liger, CCE, QuACK, ...)."""
    results = []
    call = Call(loss, case, impl)
    for function in (call.ours, call.right):
        inputs = leaves(call.wide_tensors)
        value = function(*inputs)
        upstream = upstream_of(value).requires_grad_()
        grads = torch.autograd.grad(value, inputs, upstream, create_graph=True)
        mixed = sum((grad.square() * torch.arange(1, grad.numel() + 1).view(grad.shape)).sum() for grad in grads)
        results.append(torch.autograd.grad(mixed, [*inputs, upstream], allow_unused=True, materialize_grads=True))
    same(*results)


@pytest.mark.parametrize("impl", [*helpers.IMPLEMENTATIONS, "auto"])
@over(small)
class TestFunc:
    """torch.func gives PyTorch's values or raises; with `auto` it never raises."""

    def compare(self, impl, run, call):
        try:
            result = run(call.ours)
        except NotImplementedError:
            assert impl not in ("auto", "reference")
            return
        same(result, run(call.right))

    @pytest.mark.parametrize("of", ["grad", "jacrev", "jacfwd", "hessian"])
    def test_derivatives(self, loss, case, impl, of):
        call = Call(loss, case, impl)
        scalar = {"grad", "hessian"}

        def run(function):
            reduced = (lambda *tensors: function(*tensors).sum()) if of in scalar else function
            return getattr(torch.func, of)(reduced, argnums=tuple(range(len(call.tensors))))(*call.wide_tensors)

        self.compare(impl, run, call)

    def test_jvp(self, loss, case, impl):
        call = Call(loss, case, impl)
        tangents = tuple(torch.randn_like(tensor) for tensor in call.wide_tensors)
        self.compare(impl, lambda function: torch.func.jvp(function, call.wide_tensors, tangents), call)

    @pytest.mark.parametrize("of", [lambda f: f, torch.func.grad], ids=["value", "grad"])
    def test_vmap(self, loss, case, impl, of):
        call = Call(loss, case, impl)
        stacked = [torch.stack([tensor, tensor * 0.5, tensor * 2]) for tensor in call.wide_tensors]

        def run(function):
            return torch.func.vmap(of(lambda *tensors: function(*tensors).sum()))(*stacked)

        try:
            expected = run(call.right)
        except RuntimeError:
            pytest.skip("the PyTorch lines cannot be vmapped")
        try:
            same(run(call.ours), expected)
        except NotImplementedError:
            assert impl not in ("auto", "reference")


@over(lambda loss, case: case.small or case is loss.cases[0], quick=one_each)
def test_compile(loss, case, impl):
    """Native by inductor, which takes seconds each. It calls every op alike, so aot_eager is enough for the others."""
    call = Call(loss, case, impl)
    torch._dynamo.reset()
    scaled = lambda *tensors: call.ours(*(tensor * 2 for tensor in tensors)) * 3  # noqa: E731
    backend = "inductor" if impl == "native" else "aot_eager"
    compiled, plain = torch.compile(scaled, fullgraph=True, backend=backend), scaled
    for result, expected in zip(gradients(compiled, call.tensors), gradients(plain, call.tensors), strict=True):
        torch.testing.assert_close(result, expected)


@over(lambda loss, case: case is next(case for case in loss.cases if case.dtype == torch.float32))
def test_autocast_gives_float32(loss, case, impl):
    arguments = {
        name: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.make(0).items()
    }
    tensors, put = harness.split(arguments, case.wants_grad)
    inputs = leaves(tensors)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        value = loss.function(**put(*inputs), impl=impl)
    assert value.dtype == torch.float32
    for tensor, grad in zip(inputs, torch.autograd.grad(value.sum(), inputs), strict=True):
        assert grad.dtype == tensor.dtype
        assert grad.isfinite().all()


@over(lambda loss, case: loss.module is not None)
def test_module_is_the_function(loss, case):
    arguments = case.make(0)
    names = arguments.keys() & inspect.signature(loss.module.forward).parameters.keys()
    tensors = {name: arguments[name] for name in names}
    module = loss.module(**{name: value for name, value in arguments.items() if name not in names})
    expected = loss.function(**arguments)
    torch.testing.assert_close(module(**tensors).detach(), expected.detach())
    assert repr(module)
    assert {name for name, _ in module.named_parameters()} <= {"linear.weight", "linear.bias", "log_logit_scale"}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", sorted({*helpers.IMPLEMENTATIONS} - {"reference"}))
@pytest.mark.parametrize("name", LOSSES)
def test_opcheck(name, impl):
    for op, arguments in LOSSES[name].ops():
        if ("_triton" in op.name()) == (impl == "triton"):
            torch.library.opcheck(op, arguments)


@over(one_each)
def test_explain_and_unknown_implementation(loss, case):
    arguments = case.make(0)
    assert "served by" in tlk.explain(partial(loss.function, **arguments))
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of"):
        loss.function(**arguments, impl="cuda")
