"""Cross entropy under torch.func, torch.compile and checkpointing, and with inplace_grad."""

import helpers
import pytest
import torch
import torch.nn.functional as F

import tlkernels as tlk

OPTIONS = {"label_smoothing": 0.1, "temperature": 1.5}


@pytest.fixture(params=helpers.IMPLEMENTATIONS)
def impl(request):
    return request.param


def ours(x, y, impl, **options):
    return tlk.cross_entropy(x, y, impl=impl, **OPTIONS, **options)


def right(x, y, **options):
    return F.cross_entropy(x / OPTIONS["temperature"], y, label_smoothing=OPTIONS["label_smoothing"], **options)


def same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (3, 5, 2), (5,)], ids=str)
class TestFunc:
    """torch.func gives PyTorch's values (a Function registered with custom_op would fail, or give zeros under jvp)."""

    def make(self, shape, probabilities, *batch):
        axis = min(len(shape) - 1, 1)
        x = torch.randn(*batch, *shape, dtype=torch.float64)
        if probabilities:
            return x, torch.randn(*batch, *shape, dtype=torch.float64).softmax(len(batch) + axis)
        return x, torch.randint(0, 5, (*batch, *shape[:axis], *shape[axis + 1 :]))

    @pytest.mark.parametrize("transform", [
        torch.func.grad, torch.func.grad_and_value, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.grad(f)), lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
        lambda f: lambda x, y: torch.func.vjp(lambda x: f(x, y), x)[1](torch.tensor(2.0, dtype=x.dtype)),
    ], ids=["grad", "grad_and_value", "jacrev", "jacfwd", "hessian",
            "jacrev(grad)", "jacrev(jacfwd)", "vjp"])  # fmt: skip
    def test_transforms(self, impl, shape, probabilities, transform):
        x, y = self.make(shape, probabilities)
        result = transform(lambda x, y: ours(x, y, impl))(x, y)
        same(result, transform(lambda x, y: right(x, y))(x, y))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 0)], ids=str)
    def test_vmap(self, impl, shape, probabilities, in_dims, reduction):
        x, y = self.make(shape, probabilities, 3)
        x = x if in_dims[0] == 0 else x.movedim(0, 1) if in_dims[0] == 1 else x[0]
        y = y if in_dims[1] == 0 else y[0]
        batch = lambda t, d, i: t if d is None else t.select(d, i)  # noqa: E731
        expected = [right(batch(x, in_dims[0], i), batch(y, in_dims[1], i), reduction=reduction) for i in range(3)]
        same(torch.func.vmap(lambda x, y: ours(x, y, impl, reduction=reduction), in_dims)(x, y), torch.stack(expected))

    @pytest.mark.parametrize("of", [torch.func.grad, torch.func.hessian], ids=["grad", "hessian"])
    def test_vmap_of_derivatives(self, impl, shape, probabilities, of):
        x, y = self.make(shape, probabilities, 3)
        same(torch.func.vmap(of(lambda x, y: ours(x, y, impl)))(x, y), torch.func.vmap(of(right))(x, y))

    def test_jvp(self, impl, shape, probabilities):
        x, y = self.make(shape, probabilities)
        v = torch.randn_like(x)
        same(torch.func.jvp(lambda x: ours(x, y, impl), (x,), (v,)), torch.func.jvp(lambda x: right(x, y), (x,), (v,)))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, v)
            tangent = torch.autograd.forward_ad.unpack_dual(ours(dual, y, impl)).tangent
        same(tangent, torch.func.jvp(lambda x: right(x, y), (x,), (v,))[1])

    def test_jvp_of_jvp(self, impl, shape, probabilities):
        """An autograd.Function would get zeros from forward over forward: kernels raise, auto takes the reference."""
        x, y = self.make(shape, probabilities)
        twice = lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(x, y)  # noqa: E731
        if impl in ("native", "triton"):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                twice(lambda x, y: ours(x, y, impl))
            impl = "auto"
        same(twice(lambda x, y: ours(x, y, impl)), twice(right))

    def test_gradient_of_probabilities(self, impl, shape, probabilities):
        if not probabilities:
            return
        x, y = self.make(shape, probabilities)
        for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
            try:
                result = transform(lambda x, y: ours(x, y, impl), argnums=1)(x, y)
            except NotImplementedError:  # allowed; a wrong result is not
                assert impl != "reference"
                continue
            same(result, transform(right, argnums=1)(x, y))


def test_vmap_over_weights(impl):
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(0, 5, (3, 4))
    w = torch.rand(3, 5, dtype=torch.float64)
    loss = lambda x, y, w: tlk.cross_entropy(x, y, w, impl=impl)  # noqa: E731
    for of in (lambda f: f, torch.func.grad):
        same(torch.func.vmap(of(loss))(x, y, w), torch.func.vmap(of(F.cross_entropy))(x, y, w))


def test_third_derivative(impl):
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 2])
    cube = lambda f: torch.func.jacrev(torch.func.jacrev(torch.func.grad(f)))  # noqa: E731
    same(cube(lambda x: tlk.cross_entropy(x, y, softcap=2.0, impl=impl))(x),
         cube(lambda x: F.cross_entropy(2.0 * torch.tanh(x / 2.0), y))(x))  # fmt: skip


def test_mixed_second_gradient_of_probabilities(impl):
    """In others create_graph=True silently gives a part (Liger, CCE, QuACK, flash-attn)."""
    results = []
    x0, y0 = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64).softmax(1)
    for loss in (lambda x, y: ours(x, y, impl), right):
        x, y = x0.clone().requires_grad_(), y0.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), (x, y)))
    same(*results)


def test_maml_step(impl):
    """The outer gradient goes through an inner step of gradient descent."""
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 4, (8,))
    results = []
    for loss in (lambda z, y: tlk.cross_entropy(z, y, impl=impl), F.cross_entropy):
        torch.manual_seed(1)
        w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        (inner,) = torch.autograd.grad(loss(x @ w, y), w, create_graph=True)
        results.append(torch.autograd.grad(loss(x @ (w - 0.5 * inner), y), w)[0])
    same(*results)


def test_gradient_of_weight_is_never_silent(impl):
    """PyTorch has it for probabilities; native raises, auto takes the reference."""
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64).softmax(1)
    w = torch.rand(5, dtype=torch.float64, requires_grad=True)
    if impl == "native":
        with pytest.raises(NotImplementedError, match="no gradient for weight"):
            tlk.cross_entropy(x, y, w, impl=impl)
        with pytest.raises(NotImplementedError, match="weight"):
            torch.func.grad(lambda w: tlk.cross_entropy(x, y, w, impl=impl))(w.detach())
    (expected,) = torch.autograd.grad(F.cross_entropy(x, y, w), w)
    same(torch.autograd.grad(tlk.cross_entropy(x, y, w), w)[0], expected)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradient_of_row_weight(impl, probabilities, reduction, dtype):
    """Exact at weights of 0 too, in the dtype of the weights."""
    x = torch.randn(6, 5, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.randn(6, 5).softmax(1).to(dtype) if probabilities else torch.tensor([0, 4, 2, -100, 1, 1])
    w = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.25], dtype=dtype).requires_grad_()
    loss = tlk.cross_entropy(x, y, row_weight=w, reduction=reduction, impl=impl)
    upstream = torch.linspace(0.5, 1.5, 6, dtype=dtype) if reduction == "none" else torch.tensor(0.75, dtype=dtype)
    ours = loss, *torch.autograd.grad(loss, (x, w), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    rows = F.cross_entropy(wide[0], y.double() if probabilities else y, reduction="none") * wide[1]
    count = 6 if probabilities else 5
    loss = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}[reduction]
    expected = loss, *torch.autograd.grad(loss, wide, upstream.double())
    assert ours[2].dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    for result, right_result in zip(ours, expected, strict=True):
        torch.testing.assert_close(result.detach().double(), right_result.detach(), rtol=tolerance, atol=tolerance)


def _batched(function, argnums):
    return torch.func.vmap(torch.func.grad(function, argnums))


@pytest.mark.parametrize("transform", [
    torch.func.grad, torch.func.jacfwd, torch.func.hessian, _batched,
], ids=["grad", "jacfwd", "hessian", "vmap(grad)"])  # fmt: skip
def test_transforms_by_row_weight(impl, transform):
    """A weight of 0 that is differentiated does not leave its row out."""
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(0, 5, (3, 4))
    w = torch.tensor([[0.0, 1.0, -0.5, 2.0]] * 3, dtype=torch.float64)
    arguments = (x, y, w)
    if transform is not _batched:
        arguments = tuple(tensor[0] for tensor in arguments)
    ours_of = lambda x, y, w: tlk.cross_entropy(x, y, row_weight=w, impl=impl)  # noqa: E731
    right_of = lambda x, y, w: (F.cross_entropy(x, y, reduction="none") * w).mean()  # noqa: E731
    same(transform(ours_of, argnums=(0, 2))(*arguments), transform(right_of, argnums=(0, 2))(*arguments))


@pytest.mark.parametrize("transform", [
    torch.func.grad, torch.func.jacfwd, torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f)),
    lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
], ids=["grad", "jacfwd", "hessian", "jacrev(grad)", "jacrev(jacfwd)"])  # fmt: skip
def test_transforms_of_entropy(impl, transform):
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, -100, 2, 3])

    def ours_of(x):
        output = tlk.cross_entropy_stats(x, y, softcap=2.0, impl=impl)
        return output.loss + output.lse.square().sum() - output.entropy.square().sum()

    def right_of(x):
        x = 2.0 * torch.tanh(x / 2.0)
        log_p = x.log_softmax(1)
        lse, entropy = (value * (y != -100) for value in (torch.logsumexp(x, 1), -(log_p.exp() * log_p).sum(1)))
        return F.cross_entropy(x, y) + lse.square().sum() - entropy.square().sum()

    same(transform(ours_of)(x), transform(right_of)(x))
    same(torch.func.vmap(transform(ours_of))(torch.stack([x, x * 2])),
         torch.func.vmap(transform(right_of))(torch.stack([x, x * 2])))  # fmt: skip


def test_activation_checkpoint(impl):
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (4,))
    for reentrant in (False, True):
        loss = checkpoint(lambda x: ours(x * 2, y, impl), x, use_reentrant=reentrant)
        same(torch.autograd.grad(loss, x)[0] if not reentrant else _backward(loss, x),
             torch.autograd.grad(right(x * 2, y), x)[0])  # fmt: skip


def _backward(loss, leaf):
    leaf.grad = None
    loss.backward()
    return leaf.grad


@pytest.mark.parametrize("options", [
    {}, {"reduction": "none"}, {"reduction": "sum", "softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("probabilities", [False, True])
def test_compile(impl, probabilities, options):
    x = torch.randn(6, 50, requires_grad=True)
    y = torch.randn(6, 50).softmax(1) if probabilities else torch.randint(0, 50, (6,))

    def loss(x, y):
        return tlk.cross_entropy(x * 2, y, impl=impl, **options).sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(compiled, loss(x, y))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(loss(x, y), x))


def test_compile_with_dynamic_shapes(impl):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: tlk.cross_entropy(x, y, impl=impl), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 5, 9):
        x, y = torch.randn(rows, 50), torch.randint(0, 50, (rows,))
        torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))


@pytest.mark.usefixtures("needs_native")
class TestInplaceGrad:
    def loss(self, input, target, **options):
        return tlk.cross_entropy(input, target, inplace_grad=True, **options)

    @pytest.mark.parametrize("shape", [(6, 50), (3, 5000), (2, 21, 30)], ids=str)
    @pytest.mark.parametrize(
        "options", [{}, {"reduction": "none"}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1}], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_same_gradient_in_the_same_memory(self, shape, options, dtype):
        y = torch.randint(0, shape[1], shape[:1] + shape[2:])
        y[0] = -100
        leaf = torch.randn(shape).to(dtype).requires_grad_()
        input = leaf * 1
        pointer, seen = input.data_ptr(), []
        input.register_hook(lambda grad: seen.append(grad.data_ptr()))
        loss = self.loss(input, y, **options)
        upstream = torch.rand(loss.shape).to(dtype)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
        assert seen == [pointer]
        other = leaf.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(tlk.cross_entropy(other, y, impl="native", **options), other, upstream)
        torch.testing.assert_close(grad, expected)

    def test_any_later_use_raises(self):
        """In others in-place gradients corrupt an upstream tensor silently (Liger #343, #272; unsloth #5002)."""
        leaf = torch.randn(4, 50, requires_grad=True)
        input = leaf * 1
        view = input.view(2, 2, 50)
        self.loss(view.view(4, 50), torch.arange(4)).backward()
        for tensor in (input, view):
            with pytest.raises(RuntimeError, match="inplace_grad=True"):
                tensor + 1

    def test_upstream_that_saved_it_raises(self):
        leaf = torch.randn(4, 50, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            self.loss(torch.tanh(leaf), torch.arange(4)).backward()

    def test_later_users_in_the_graph_see_the_values(self):
        leaf = torch.randn(4, 50, requires_grad=True)
        results = []
        for inplace in (False, True):
            input = leaf * 1
            loss = tlk.cross_entropy(input, torch.arange(4), inplace_grad=inplace)
            results.append(torch.autograd.grad(loss + input.square().sum(), leaf)[0])
        torch.testing.assert_close(*results)

    def test_second_backward_and_create_graph_raise(self):
        leaf = torch.randn(4, 50, requires_grad=True)
        loss = self.loss(leaf * 1, torch.arange(4))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with pytest.raises(RuntimeError, match="inplace_grad=True"):
            torch.autograd.grad(self.loss(leaf * 1, torch.arange(4)), leaf, create_graph=True)

    def test_part_of_a_larger_tensor(self):
        leaf = torch.randn(4, 60, requires_grad=True)
        input = leaf * 1
        loss = self.loss(input[:, :50], torch.arange(4))
        (grad,) = torch.autograd.grad(loss, leaf)
        other = leaf[:, :50].detach().requires_grad_()
        torch.testing.assert_close(grad[:, :50], torch.autograd.grad(F.cross_entropy(other, torch.arange(4)), other)[0])
        assert torch.equal(input.detach()[:, 50:], leaf.detach()[:, 50:])

    def test_without_a_gradient_the_input_stays(self):
        input = torch.randn(4, 50)
        before = input.clone()
        self.loss(input, torch.arange(4))
        assert torch.equal(input, before)

    def test_stats(self):
        leaf = torch.randn(4, 50, requires_grad=True)
        output = tlk.cross_entropy_stats(leaf * 1, torch.arange(4), inplace_grad=True)
        (grad,) = torch.autograd.grad(output.loss + output.lse.sum() + output.entropy.square().sum(), leaf)
        entropy = torch.distributions.Categorical(logits=leaf).entropy()
        right = F.cross_entropy(leaf, torch.arange(4)) + leaf.logsumexp(1).sum() + entropy.square().sum()
        (expected,) = torch.autograd.grad(right, leaf)
        torch.testing.assert_close(grad, expected)

    def test_leaf_and_expanded_are_refused(self):
        with pytest.raises(ValueError, match="inplace_grad: expected an input that is the result"):
            self.loss(torch.randn(4, 50, requires_grad=True), torch.arange(4))
        with pytest.raises(ValueError, match="inplace_grad: expected an input whose elements"):
            self.loss(torch.randn(50, requires_grad=True).expand(4, 50), torch.arange(4))

    def test_compile_and_func_are_refused(self):
        with pytest.raises(NotImplementedError, match="plain autograd"):
            torch.func.grad(lambda x: self.loss(x * 1, torch.arange(4)))(torch.randn(4, 50))
        with pytest.raises(NotImplementedError, match="does not overwrite"):
            self.loss(torch.randn(4, 50), torch.arange(4), impl="reference")


MEMORY = """
import sys, torch, tlkernels as tlk
inplace, dtype = sys.argv[1] == "True", getattr(torch, sys.argv[2])
logits = torch.zeros(512, 100_000, dtype=dtype).requires_grad_()
y = torch.zeros(512, dtype=torch.long)
small = torch.zeros(2, 10, requires_grad=True) * 1
tlk.cross_entropy(small, y[:2], inplace_grad=inplace).backward()  # loads what a first call loads
x = logits.view_as(logits)
print(peak(lambda: tlk.cross_entropy(x, y, inplace_grad=inplace).backward()) / logits.nbytes)
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("inplace", "buffers"), [(False, 1), (True, 0)])
def test_peak_memory(inplace, buffers, dtype):
    """One gradient on top of the input; with inplace_grad none."""
    (used,) = helpers.peak_memory(MEMORY, inplace, dtype)
    assert buffers - 0.02 < used < buffers + 0.05
