"""Linear distillation: the dense form, chunks, matrix products, memory, errors, the module."""

import itertools
import re

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import BF16, DIVERGENCES, F32, F64, HARD
from linear_distillation_cases import LAYERS, make, pytorch

import tlkernels as tlk
from tlkernels._core import native

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("linear_distillation")


def gradients(loss, arguments, names):
    leaves = [arguments[name].detach().clone().requires_grad_() for name in names]
    value = loss(**{**arguments, **dict(zip(names, leaves, strict=True))})
    upstream = torch.linspace(0.5, 1, value.numel(), dtype=F64).view(value.shape).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


_HARD = {name: value for name, value in HARD.items() if name != "temperature"}
OPTIONS = [
    {"divergence": divergence, "temperature": temperature, "beta": beta, "reduction": reduction, **hard}
    for divergence, temperature, beta, reduction in itertools.product(
        DIVERGENCES, (1.0, 2.5), (0.5, 0.2), ("none", "sum", "mean", "batchmean")
    )
    for hard in (
        {},
        _HARD,
        {"target": True, "ignore_index": 2},
        {**_HARD, "softcap": (1.0, 2.0)},
        {"softcap": (None, 0.5)},
    )
    if beta == 0.5 or divergence == "js"
]


@pytest.mark.parametrize("options", OPTIONS, ids=harness.words)
def test_as_the_dense_form(impl, options):
    """`linear_distillation` is `distillation` of `F.linear`, for every option."""
    arguments = make((2, 5), 37, F64, **options)(0)

    def dense(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, **rest):
        student = F.linear(student_input, student_weight, student_bias)
        return tlk.distillation(student, F.linear(teacher_input, teacher_weight, teacher_bias), impl=impl, **rest)

    ours = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, LAYERS)
    for result, expected in zip(ours, gradients(dense, arguments, LAYERS), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_strides(impl):
    """Transposed matrices, and biases that are every second element of a larger tensor."""
    arguments = make((6,), 37, F64)(0)
    layouts = {"input": "transposed", "weight": "transposed", "bias": "sliced"}
    strided = {
        name: harness.lay_out(arguments[name], layouts[name.partition("_")[2]]).requires_grad_() for name in LAYERS
    }
    value = tlk.linear_distillation(**{**arguments, **strided}, impl=impl)
    right, *expected = gradients(pytorch, arguments, LAYERS)
    torch.testing.assert_close(value, right)
    grads = torch.autograd.grad(value, list(strided.values()), torch.full_like(value, 0.5))
    torch.testing.assert_close(list(grads), expected)


# The logits take gigabytes, and the chunks are the same for every instruction set: one is enough in the quick part.
MANY_CHUNKS = [
    pytest.param(target, marks=[] if target.isa in (native.isa(), harness.CUDA_HOST) else [pytest.mark.full])
    for target in harness.targets(loss="linear_distillation")
]


@pytest.mark.parametrize("target", MANY_CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_many_chunks(target, dtype, monkeypatch):
    """Gradients of weights and biases add up over chunks, in float32 (in bf16: axolotl #1601)."""
    rows, classes = 900 if dtype == BF16 else 600, 60_013  # a chunk has 279 rows in float32
    if target.isa == harness.CUDA_HOST:
        classes = 13
        monkeypatch.setenv("TLKERNELS_CHUNK_BYTES", str(200 * classes * dtype.itemsize))
    arguments = make((rows,), classes, dtype, depths=(3, 2), temperature=2.0)(0)
    if harness.too_large(target.impl, *arguments.values()):
        pytest.skip("left out by the size rule of the interpreter")
    names = [name for name in LAYERS if name.startswith("student")]
    with harness.forced(target) as impl:
        ours = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, names)
    eager = gradients(pytorch, arguments, names)
    right = gradients(pytorch, harness.widened(arguments), names)
    harness.check_results(dtype, zip(("loss", *names), ours, eager, right, strict=True))


def test_only_the_gradients_that_are_needed(impl):
    arguments = make((6,), 37, F32)(0)
    for reduction in ("mean", "none"):
        arguments["reduction"] = reduction
        loss = lambda **a: tlk.linear_distillation(**a, impl=impl)  # noqa: E731
        everything = dict(zip(("loss", *LAYERS), gradients(loss, arguments, LAYERS), strict=True))
        for name in LAYERS:
            torch.testing.assert_close(gradients(loss, arguments, [name])[1], everything[name])


@pytest.mark.usefixtures("needs_native")
def test_no_gemm_that_nobody_needs():
    """The forward makes two products, each gradient of an input or a weight one more."""
    arguments = make((6,), 37, F32)(0)
    expected = {(): 2, ("student_input",): 3, ("student_weight",): 3, ("student_bias",): 2, LAYERS[:2]: 4, LAYERS: 6}
    for names, count in expected.items():
        given = {**arguments, **{name: arguments[name].clone().requires_grad_() for name in names}}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = tlk.linear_distillation(**given, impl="native")
            if names:
                loss.backward()
        assert sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")) == count


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_second_gradient(impl, divergence):
    arguments = make((3,), 4, F64, divergence=divergence, **HARD)(0)
    leaves = {name: arguments[name].requires_grad_() for name in LAYERS}
    results = []
    for loss in (lambda **a: tlk.linear_distillation(**a, impl=impl), pytorch):
        for reduction in ("mean", "none"):
            value = loss(**arguments, reduction=reduction).sum()
            grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            total = sum((grad * torch.cos(grad)).sum() for grad in grads)
            results.append(torch.autograd.grad(total, list(leaves.values())))
    for ours, right in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


def test_two_backwards(impl):
    arguments = make((6,), 37, F32)(0)
    weight = arguments["student_weight"].requires_grad_()
    loss = tlk.linear_distillation(**arguments, impl=impl) * 3
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    first.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], kept)


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_no_rows(impl, rows):
    arguments = make(rows, 5, F32, reduction="sum")(0)
    assert tlk.linear_distillation(**{**arguments, "reduction": "mean"}, impl=impl).isnan()
    loss, *grads = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, LAYERS)
    assert loss == 0
    for name, grad in zip(LAYERS, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(arguments[name])), name


def test_every_row_ignored(impl):
    arguments = make((4,), 9, F32, hard_weight=0.5)(0)
    arguments["target"] = torch.full((4,), -100)
    loss, *grads = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, LAYERS)
    assert loss.isnan()
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_weight_0_do_not_take_part(impl, divergence, reduction):
    arguments = make((5,), 37, F64, divergence=divergence, reduction=reduction, **HARD)(0)
    arguments["row_weight"] = weight = torch.tensor([0.0, 2.0, 0.0, -1.0, 0.5], dtype=F64)
    right, *expected = gradients(pytorch, arguments, LAYERS)
    for side, fill in (("student", torch.nan), ("teacher", torch.inf)):
        arguments[f"{side}_input"] = arguments[f"{side}_input"].masked_fill((weight == 0).unsqueeze(-1), fill)
    loss, *grads = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, LAYERS)
    torch.testing.assert_close(loss, right)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


def test_autocast(impl):
    """The products are bfloat16, the loss is float32, the gradients have the parameters' dtype."""
    arguments = make((64,), 50, F32)(0)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        loss, *grads = gradients(lambda **a: tlk.linear_distillation(**a, impl=impl), arguments, LAYERS)
        right, *right_grads = gradients(pytorch, arguments, LAYERS)
    assert loss.dtype == F32
    torch.testing.assert_close(loss, right.float(), rtol=2e-2, atol=1e-3)
    for grad, expected in zip(grads, right_grads, strict=True):
        assert grad.dtype == F32
        torch.testing.assert_close(grad, expected, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("name", helpers.IMPLEMENTATIONS)
def test_compile(name):
    arguments = make((6,), 37, F32)(0)
    weight = arguments.pop("student_weight").requires_grad_()

    def loss(w):
        return tlk.linear_distillation(student_weight=w * 2, impl=name, **arguments) * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(weight)
    torch.testing.assert_close(compiled, loss(weight))
    (grad,) = torch.autograd.grad(compiled, weight)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(weight), weight)[0])


MEMORY = """
import torch, tlkernels as tlk
rows, depth, classes = 2048, 8, 50_000
layers = [torch.randn(n, depth) for n in (rows, classes, rows, classes)]
layers = [layer.requires_grad_(i < 2) for i, layer in enumerate(layers)]
tlk.linear_distillation(*(layer[:10] for layer in layers)).backward()  # loads what a first call loads
print(peak(lambda: tlk.linear_distillation(*layers).backward()) / (rows * classes * 4))
"""


@pytest.mark.usefixtures("needs_native")
def test_neither_logits_tensor_is_held_whole():
    """128 MiB of logits at a time; both tensors have 390 MiB each."""
    (used,) = helpers.peak_memory(MEMORY)
    assert used < 0.45


S, W, T, U = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2), torch.randn(5, 2)
ERRORS = [
    (TypeError, "student_input: expected a Tensor, got list", ([[1.0]], W, T, U), {}),
    (TypeError, "teacher_bias: expected a Tensor, got list", (S, W, T, U), {"teacher_bias": [1.0]}),
    (ValueError, r"student_weight: expected shape (classes, 3) .* got (5, 2)", (S, U, T, U), {}),
    (ValueError, r"teacher_weight: expected 5 classes .* got (4, 2)", (S, W, T, U[:4]), {}),
    (ValueError, r"teacher_input: expected the rows of student_input (4,), got (3,)", (S, W, T[:3], U), {}),
    (ValueError, r"student_bias: expected shape (5,), got (4,)", (S, W, T, U), {"student_bias": torch.ones(4)}),
    (TypeError, "student_weight: .* student_input, torch.float32, got torch.float64", (S, W.double(), T, U), {}),
    (ValueError, "teacher_weight: .* device cpu, got meta", (S, W, T, U.to("meta")), {}),
    (ValueError, "target: expected class indices, since hard_weight", (S, W, T, U), {"hard_weight": 0.5}),
    (ValueError, "beta: expected a number between 0 and 1", (S, W, T, U), {"beta": 0.0}),
    (TypeError, "softcap: expected a number, got str", (S, W, T, U), {"softcap": "30"}),
    (ValueError, "softcap: expected None or a finite number above 0, got 0", (S, W, T, U), {"softcap": 0}),
    (ValueError, "softcap: expected one number or a pair .* got 1 values", (S, W, T, U), {"softcap": [1.0]}),
    (ValueError, "student_input: expected shape (..., features), got ()", (S[0, 0], W, T, U), {}),
    (NotImplementedError, "triton", tuple(t.to("meta") for t in (S, W, T, U)), {"impl": "triton"}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), ERRORS, ids=[e[1][:30] for e in ERRORS])
def test_bad_arguments(error, message, args, kwargs):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=pattern):
        tlk.linear_distillation(*args, **kwargs)


def test_class_index_out_of_range(impl, monkeypatch):
    monkeypatch.setenv("TLKERNELS_CHECK", "1")  # for CUDA's kernels
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError):
            tlk.linear_distillation(S, W, T, U, torch.tensor([0, 1, 5, 2]), reduction=reduction, impl=impl)


def test_every_option_reaches_the_module():
    target, options = torch.tensor([0, 1, 2, 3]), {"hard_weight": 0.5, "divergence": "js"}
    before = tlk.LinearDistillationLoss(**options)(S, W, T, U, target)
    for option in ({"temperature": 2.0}, {"divergence": "tv"}, {"beta": 0.2}, {"hard_weight": 0.1}, {"ignore_index": 1},
                   {"label_smoothing": 0.2}, {"softcap": (None, 0.5)}, {"reduction": "sum"}):  # fmt: skip
        module = tlk.LinearDistillationLoss(**{**options, **option})
        assert not torch.allclose(module(S, W, T, U, target), before)
        assert str(next(iter(option))) in repr(module)
    for tensor in ({"student_bias": torch.rand(5)}, {"teacher_bias": torch.rand(5)}, {"row_weight": torch.rand(4)}):
        assert not torch.allclose(tlk.LinearDistillationLoss(**options)(S, W, T, U, target, **tensor), before)
