"""Distillation's derivatives: upstream values, second ones, torch.func, torch.compile, autocast."""

import helpers
import pytest
import torch
from distillation_cases import BF16, DIVERGENCES, F64, HARD, both, make, pytorch, same

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("distillation")
S, T, Y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("upstream", [0.25, -3.0, 1e-4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_upstream_gradient(impl, reduction, upstream, divergence):
    """In others wrong unless it is 1 (TransformerEngine #2139), or for reduction="none" (Liger #968, #678)."""
    same(*both(impl, *torch.randn(2, 5, 7), upstream, reduction=reduction, divergence=divergence),
         atol=1e-6 * abs(upstream) + 1e-9 * (upstream == 0))  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_only_the_gradients_that_are_needed(impl, divergence):
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    options = {"divergence": divergence, "impl": impl}
    for reduction in ("mean", "none"):
        loss = lambda s, t: tlk.distillation(s, t, reduction=reduction, **options).sum()  # noqa: B023, E731
        both_grads = torch.autograd.grad(loss(student, teacher), (student, teacher))
        (alone,) = torch.autograd.grad(loss(student, teacher.detach()), student)
        (other,) = torch.autograd.grad(loss(student.detach(), teacher), teacher)
        same((alone, other), both_grads, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, (2.0, 3.0), (None, 1.0)], ids=str)
def test_second_gradient(impl, divergence, reduction, softcap):
    arguments = make((4, 6), F64, **HARD, scale=0.3, divergence=divergence, reduction=reduction, softcap=softcap)(0)
    student, teacher = (arguments.pop(name).requires_grad_() for name in ("student_logits", "teacher_logits"))
    results = []
    for loss in (lambda *x: tlk.distillation(*x, impl=impl, **arguments), lambda *x: pytorch(*x, **arguments)):
        value = loss(student, teacher)
        upstream = torch.linspace(0.5, 1, value.numel(), dtype=F64).view(value.shape).requires_grad_()
        grads = torch.autograd.grad(value, (student, teacher), upstream, create_graph=True)
        total = sum((grad * torch.cos(grad)).sum() for grad in grads)
        results.append(torch.autograd.grad(total, (student, teacher, upstream)))
    same(*results, rtol=1e-9, atol=1e-11)


def test_autocast_gives_float32(impl):
    student, teacher = torch.randn(2, 64, 50, dtype=BF16)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        for reduction in ("mean", "none"):
            loss = tlk.distillation(student, teacher, reduction=reduction, impl=impl)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, pytorch(student.double(), teacher.double(), reduction=reduction).float(),
                                       rtol=1e-5, atol=1e-6)  # fmt: skip


def test_gradient_of_row_weight_is_never_silent(impl):
    weight = torch.rand(4, requires_grad=True)
    if impl == "native":
        with pytest.raises(NotImplementedError, match="row_weight"):
            tlk.distillation(S, T, row_weight=weight, impl=impl)
    (grad,) = torch.autograd.grad(tlk.distillation(S, T, row_weight=weight), weight)
    torch.testing.assert_close(grad, tlk.distillation(S, T, reduction="none") / 4)


@pytest.mark.usefixtures("needs_native")
def test_transforms_take_the_reference():
    """`native` raises and says why; `auto` gives PyTorch's values."""
    grad = torch.func.grad(lambda s: tlk.distillation(s, T.double()))(S.double())
    torch.testing.assert_close(grad, torch.func.grad(lambda s: pytorch(s, T.double()))(S.double()))
    with pytest.raises(NotImplementedError, match="func transforms"):
        torch.func.grad(lambda s: tlk.distillation(s, T, impl="native"))(S)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        tlk.distillation(torch.autograd.forward_ad.make_dual(S, T), T, impl="native")


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"divergence": "js", "temperature": 2.0},
                                     {"softcap": (5.0, None)}], ids=str)  # fmt: skip
def test_compile(name, options):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)

    def loss(s, t):
        return tlk.distillation(s * 2, t, impl=name, **options).sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(compiled, loss(student, teacher))
    (grad,) = torch.autograd.grad(compiled, student)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(student, teacher), student)[0])
