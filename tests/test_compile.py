"""torch.compile, torch.export, make_fx and compiled autograd: every loss, reduced and by row, with a dynamic batch."""

import contextlib

import harness
import helpers
import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import tlkernels as tlk

# The reference is PyTorch's own operators; test_every_loss.py compiles it.
IMPLEMENTATIONS = [impl for impl in helpers.IMPLEMENTATIONS if impl != "reference"]


def head(y):
    """Return the weight of a linear layer with seven classes."""
    return torch.outer(torch.arange(7, dtype=y.dtype), y.mean(0)).cos()


# Losses of two matrices with five columns; the first one gets the gradient.
LOSSES = {
    "cross_entropy": lambda x, y, **how: tlk.cross_entropy(x, y.argmax(1), **how),
    "probabilities": lambda x, y, **how: tlk.cross_entropy(x, y.softmax(1), label_smoothing=0.1, **how),
    "stats": lambda x, y, **how: sum(tlk.cross_entropy_stats(x, y.argmax(1), z_loss=0.1, **how)[:2]),
    "linear": lambda x, y, **how: tlk.linear_cross_entropy(x, head(y), y.argmax(1), **how),
    "linear_stats": lambda x, y, **how: sum(tlk.linear_cross_entropy_stats(x, head(y), y.argmax(1), **how)[:2]),
    "distillation": lambda x, y, **how: tlk.distillation(x, y, temperature=2.0, **how),
    "with_hard_targets": lambda x, y, **how: tlk.distillation(x, y, y.argmax(1), hard_weight=0.5, **how),
    "linear_distillation": lambda x, y, **how: tlk.linear_distillation(x, head(y), y, head(y.flip(1)), **how),
    "one_head_for_both": lambda x, y, **how: tlk.linear_distillation(x, x, y, x, **how),
    "info_nce": lambda x, y, **how: tlk.info_nce(x, y, temperature=0.5, **how),
    "negatives": lambda x, y, **how: tlk.info_nce(x, y, logit_scale=y.mean().exp(), negatives=y.cos(), **how),
    "symmetric": lambda x, y, **how: tlk.info_nce(x, y, symmetric=True, mask=(y.argmax(1), y.argmax(1)), **how),
    "nt_xent": lambda x, y, **how: tlk.nt_xent(x, y, temperature=0.5, **how),
    "sup_con": lambda x, y, **how: tlk.sup_con(x, y.argmax(1), temperature=0.5, **how),
    "sigmoid": lambda x, y, *, impl, reduction: tlk.sigmoid_contrastive(
        x, y, logit_scale=2.0, logit_bias=-1.0, impl=impl
    ),
    "mse": lambda x, y, **how: tlk.mse(x, y, **how),
    "weighted": lambda x, y, **how: tlk.mse(x, y, weight=y.detach().exp(), **how),
    "rmse": lambda x, y, **how: tlk.rmse(x, y, eps=0.1, **how),
}
BATCHES = [(torch.randn(n, 5, generator=harness.generator(n)), torch.randn(n, 5)) for n in (6, 9)]


@pytest.fixture(params=LOSSES)
def loss(request, impl, reduction):
    torch._dynamo.reset()
    return lambda x, y: LOSSES[request.param](x, y, impl=impl, reduction=reduction)


def full(value, id):
    return pytest.param(value, id=id, marks=[pytest.mark.full])


# Triton is in the full part alone: opcheck and test_every_loss.py cover its ops too.
@pytest.fixture(params=[f"impl={i}" if i == "native" else full(f"impl={i}", f"impl={i}") for i in IMPLEMENTATIONS])
def impl(request):
    return request.param.removeprefix("impl=")


@pytest.fixture(params=["reduction=mean", full("reduction=none", "reduction=none")])
def reduction(request):
    return request.param.removeprefix("reduction=")


def with_gradient(function, x, y):
    x = x.detach().requires_grad_()
    value = function(x, y)
    return value, torch.autograd.grad(value.sum() * 1.5, x)[0]


@pytest.mark.parametrize("dynamic", [pytest.param(None, id="dynamic=later"), full(True, "dynamic=first")])
def test_compile(loss, dynamic):
    """A training step, then a validation step of the same function (pytorch #107824)."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in BATCHES:
        torch.testing.assert_close(with_gradient(compiled, *batch), with_gradient(loss, *batch))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(*batch), loss(*batch))


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"negatives", "one_head_for_both"}))
def test_one_tensor_in_two_places(name, impl):
    torch._dynamo.reset()
    twice = lambda x, _: LOSSES[name](x, x, impl=impl, reduction="mean")  # noqa: E731
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    x, _ = BATCHES[0]
    torch.testing.assert_close(with_gradient(compiled, x, x), with_gradient(twice, x, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, x), twice(x, x))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "one_head_for_both"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_as_many_rows_as_a_mask_has(name, impl):
    """The compiler does not know the number of rows; PyTorch's losses compile then."""
    torch._dynamo.reset()

    def picked(x, y):
        rows = (y[:, 0] > -0.5).nonzero().squeeze(1)
        return LOSSES[name](x[rows], y[rows], impl=impl, reduction="mean")

    compiled = torch.compile(picked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradient(compiled, *BATCHES[1]), with_gradient(picked, *BATCHES[1]))


def test_jit_trace(loss):
    """A traced program is differentiable, and takes other values."""
    traced = torch.jit.trace(loss, BATCHES[0], check_trace=False)
    other = [tensor.flip(0) for tensor in BATCHES[0]]
    torch.testing.assert_close(with_gradient(traced, *other), with_gradient(loss, *other))


class Scaled(torch.nn.Module):
    """A loss behind a parameter."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.scale = loss, torch.nn.Parameter(torch.ones(5))

    def forward(self, x, y):
        return self.loss(x * self.scale, y)


@pytest.mark.parametrize("strict", [pytest.param(False, id="strict=no"), full(True, "strict=yes")])
def test_export(loss, strict):
    """The exported program takes other batch sizes and is differentiable, as the module is."""
    rows = torch.export.Dim("rows", min=2, max=64)
    module = Scaled(loss)
    program = torch.export.export(module, BATCHES[0], dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    exported = program.module()
    decomposed = program.run_decompositions().module()
    for batch in BATCHES:
        expected = module(*batch)
        torch.testing.assert_close(exported(*batch), expected)
        torch.testing.assert_close(decomposed(*batch), expected)
        grads = torch.autograd.grad(exported(*batch).sum(), [*exported.parameters()])
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), [*module.parameters()]))


@pytest.mark.parametrize("tracing", [full("real", "real"), full("fake", "fake"), "symbolic"])
def test_make_fx(loss, tracing):
    step = lambda x, y: with_gradient(loss, x, y)  # noqa: E731
    traced = make_fx(step, tracing_mode=tracing)(*BATCHES[0])
    other = BATCHES[1] if tracing == "symbolic" else tuple(tensor.flip(0) for tensor in BATCHES[0])
    torch.testing.assert_close(traced(*other), step(*other))


@pytest.mark.parametrize("backend", [full("eager", "eager"), "aot_eager"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), full(torch.float16, "float16")])
def test_compiled_autograd_over_an_eager_forward(loss, backend, dtype):
    """The traced backward reads each batch's own tensors, never the first batch's (pytorch #134514)."""

    def compiling(graph):
        return torch.compile(graph, backend=backend, fullgraph=True, dynamic=True)

    results = []
    for around in (lambda: compiled_autograd._enable(compiling), contextlib.nullcontext):
        results.append([])
        for x, y in (*BATCHES, [tensor.flip(0) for tensor in BATCHES[0]]):
            x = x.to(dtype, copy=True).requires_grad_()
            value = (loss(x, y.to(dtype)).float().sum() * 1.5).sum()
            with around():
                value.backward()
            results[-1].append(x.grad)
    torch.testing.assert_close(*results)


def test_an_option_that_changes():
    """A number passed to the compiled function is not fixed at its first value."""
    torch._dynamo.reset()
    x, y = BATCHES[0]
    loss = lambda x, y, temperature: tlk.distillation(x, y, temperature=temperature)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.0, 3.5):
        torch.testing.assert_close(compiled(x, y, temperature), loss(x, y, temperature))


def test_options_of_compiled_autograd_are_in_its_key():
    x, y = BATCHES[0]
    grads = []
    for temperature in (1.0, 2.0):
        for reduction in ("mean", "none"):
            leaf = x.clone().requires_grad_()
            value = tlk.cross_entropy(leaf, y.argmax(1), temperature=temperature, reduction=reduction)
            with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
                value.sum().backward()
            right = x.clone().requires_grad_()
            torch.nn.functional.cross_entropy(right / temperature, y.argmax(1), reduction=reduction).sum().backward()
            torch.testing.assert_close(leaf.grad, right.grad)
            grads.append(leaf.grad)
    assert not torch.allclose(grads[0], grads[2])
