"""Distillation with a softcap: values at the cap, -inf, padding, each side's own; the options' grid is in the cases."""

import math

import harness
import helpers
import pytest
import torch
from distillation_cases import BF16, BOTH, DIVERGENCES, F32, F64, HARD, SOFTCAPS, both, make, pytorch, same

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("distillation")
INF = math.inf
COLD = {**HARD, "temperature": 0.1}


@pytest.mark.parametrize("classes", [1, 3, 5, 17, 37, 129, 1025, 2049, 5003])
@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_has_probability_0(impl, classes, softcap, divergence):
    """Where all logits are near -softcap, tanh(-inf) of padding would count as much as a class (Liger #1456)."""
    student, teacher = torch.randn(2, 3, classes) - 30
    target = torch.tensor([0, classes - 1, classes // 2])
    options = {"target": target, "hard_weight": 0.5, "label_smoothing": 0.1, "reduction": "none"}
    same(*both(impl, student, teacher, softcap=softcap, divergence=divergence, **options), atol=2e-6)


@pytest.mark.parametrize("classes", [9, 5000])
@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_minus_softcap(impl, classes, softcap, divergence):
    """In single classes and in a whole row; without a softcap on that side it is probability 0 as ever."""
    student, teacher = torch.randn(2, 4, classes)
    student[0, 1:3] = teacher[0, 1:3] = -INF
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    for logits, cap in zip((student, teacher), caps, strict=True):
        if cap is not None:
            logits[1, 1], logits[2] = -INF, -INF
    options = {"divergence": divergence, "softcap": softcap, "reduction": "none"}
    infinite = divergence in ("forward_kl", "reverse_kl") and caps[divergence == "forward_kl"] is not None
    infinite = infinite and caps[divergence != "forward_kl"] is None
    ours, right = both(impl, student, teacher, **options)
    rows = slice(1, None) if infinite else slice(None)  # a probability of 0 in that divergence's denominator
    same([x[rows] for x in ours], [x[rows] for x in right], atol=2e-6)
    assert bool(ours[0][0].isinf()) == infinite
    for grad, cap in zip(ours[1:], caps, strict=True):
        assert cap is None or infinite or not grad[0, 1:3].any()


@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_infinity_is_softcap(impl, softcap, divergence):
    student, teacher = torch.randn(2, 3, 40)
    for logits, cap in zip((student, teacher), softcap if isinstance(softcap, tuple) else (1, 1), strict=True):
        if cap is not None:
            logits[1, 3] = INF
    same(*both(impl, student, teacher, softcap=softcap, divergence=divergence, temperature=2.0))


@pytest.mark.parametrize("hard", [{}, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_side_has_its_own_softcap(impl, divergence, hard):
    """The losses of capped logits, also where the kernels swap student and teacher."""
    arguments = make((5, 37), F64, divergence=divergence, **hard)(0)
    tensors, put = harness.split(arguments, BOTH)

    def run(student_cap, teacher_cap, **options):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        capped = [x if cap is None else cap * torch.tanh(x / cap) for x, cap in
                  zip(leaves, (student_cap, teacher_cap), strict=True)]  # fmt: skip
        loss = tlk.distillation(**put(*capped), **options, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    for softcap in ((2.0, 7.0), (None, 7.0), (2.0, None)):
        same(run(None, None, softcap=softcap), run(*softcap), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_near_the_cap(impl, divergence, dtype):
    """The derivative of tanh is small there: computed from a rounded z it would have no correct digit."""

    def draw(seed):
        arguments = make((6, 70), dtype, divergence=divergence, softcap=(1.0, 1.5), **COLD)(seed)
        signs = torch.randn(2, 6, 70, generator=harness.generator(seed)).sign()
        for name, sign in zip(BOTH, signs, strict=True):
            arguments[name] = (torch.linspace(2, 12, 70).expand(6, 70) * sign).to(dtype)
        tensors, put = harness.split(arguments, BOTH)
        results = []
        for loss, given in ((tlk.distillation, tensors), (pytorch, tensors), (pytorch, [x.double() for x in tensors])):
            leaves = [x.detach().clone().requires_grad_() for x in given]
            value = loss(**put(*leaves), **({"impl": impl} if loss is tlk.distillation else {}))
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        return zip(("loss", *BOTH), *results, strict=True)

    harness.check_budgets(dtype, draw)


@pytest.mark.parametrize("softcap", SOFTCAPS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(impl, divergence, softcap):
    arguments = make((3, 6), F64, divergence=divergence, softcap=softcap, scale=0.3, **HARD)(1)
    tensors, put = harness.split(arguments, BOTH)
    loss = lambda *logits: tlk.distillation(**put(*logits), impl=impl)  # noqa: E731
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_a_pair_of_none_is_no_softcap(impl):
    student, teacher = torch.randn(2, 5, 40)
    for options in ({}, {"divergence": "js"}):
        plain = tlk.distillation(student, teacher, impl=impl, **options)
        assert torch.equal(tlk.distillation(student, teacher, softcap=(None, None), impl=impl, **options), plain)


def test_softcap_of_a_module_can_be_set():
    student, teacher = torch.randn(2, 5, 40)
    criterion = tlk.DistillationLoss(softcap=[2.0, None])
    assert criterion.softcap == [2.0, None]
    torch.testing.assert_close(criterion(student, teacher), pytorch(student, teacher, softcap=(2.0, None)))
    for softcap in (3.0, (None, 4), None):
        criterion.softcap = softcap
        torch.testing.assert_close(criterion(student, teacher), pytorch(student, teacher, softcap=softcap))
