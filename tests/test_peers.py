"""Mistakes of other libraries in the values and gradients of losses on logits, each on every implementation.

Each test also makes the mistake, and sees that it would fail.
"""

import math

import harness
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import DIVERGENCES as NAMES
from distillation_cases import pytorch as divergence_of
from peers import (
    CAPPED,
    DIVERGENCES,
    HARD_LOSSES,
    SELECTED,
    exact_cross_entropy,
    gradient,
    over,
    right,
    rounded_once,
    running,
    takes,
)

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INF = math.inf
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


def sure_logits(dtype, rows=8, classes=64, seed=0):
    """Return logits whose targets have probabilities from 0.4 to 0.999, and the targets."""
    generator = harness.generator(seed)
    logits = torch.randn(rows, classes, generator=generator) / 2
    target = torch.randint(classes, (rows,), generator=generator)
    logits[torch.arange(rows), target] = torch.linspace(4, 11, rows)
    return logits.to(dtype), target


@HALVES
@over(HARD_LOSSES)
def test_the_gradient_at_a_sure_target_is_rounded_once(loss, run, dtype):
    """With p rounded to 16 bits before the label is subtracted, p - 1 has no correct digit (fla #1231)."""
    logits, target = sure_logits(dtype)
    value, grad = gradient(HARD_LOSSES[loss], run, logits, target, reduction="sum")
    exact_value, exact = exact_cross_entropy(logits, target, reduction="sum")
    rounded_once(value, exact_value, dtype, slack=1e-5)
    rounded_once(grad, exact, dtype)
    label = F.one_hot(target, logits.shape[1])
    mistaken = logits.float().softmax(1).to(dtype) - label.to(dtype)
    with pytest.raises(AssertionError):
        rounded_once(mistaken, exact, dtype)


@HALVES
@pytest.mark.parametrize("divergence", NAMES)
@over(DIVERGENCES)
def test_the_gradient_of_a_divergence_is_rounded_once(loss, run, divergence, dtype):
    """Near a sure teacher p - q has no correct digit if p and q are rounded first (fla #1231).

    The 16-bit gradient of Jensen-Shannon's divergence was wrong by 15 % (speculators #951).
    """
    student, _ = sure_logits(dtype)
    teacher = student + torch.randn(student.shape, generator=harness.generator(1)).to(dtype) / 4
    options = {"divergence": divergence, "reduction": "sum"}
    value, grad = gradient(DIVERGENCES[loss], run, student, teacher, **options)
    exact_value, exact = right(divergence_of, student, teacher, **options)
    rounded_once(value, exact_value, dtype, slack=1e-5)
    rounded_once(grad, exact, dtype)
    with pytest.raises(AssertionError):
        rounded_once(mistaken_divergence(student, teacher, divergence), exact, dtype)


def mistaken_divergence(student, teacher, divergence):
    """Return the gradient of a divergence of log-probabilities in 16 bits."""
    leaf = student.float().log_softmax(1).to(student.dtype).float().requires_grad_()
    value = divergence_of(leaf, teacher.float().log_softmax(1).to(teacher.dtype).float(), divergence=divergence)
    return torch.autograd.grad(value * len(student), leaf)[0]


PADDED = [(where, divergence) for where in ("both", "student", "teacher") for divergence in NAMES]


@pytest.mark.parametrize(("where", "divergence"), PADDED, ids=lambda word: word)
@over(DIVERGENCES)
def test_vocabularies_padded_by_minus_infinity(loss, run, where, divergence):
    """A teacher padded by -inf made the reverse KL NaN (trl #5594), through 0 * (-inf - -inf).

    Padding of both sides changes nothing. Padding of one side is infinite where the divergence divides by that side,
    and finite elsewhere; it is never NaN.
    """
    generator = harness.generator(2)
    student, teacher = torch.randn(2, 5, 40, generator=generator)
    biases = torch.zeros(2, 40)
    biases[{"student": slice(0, 1), "teacher": slice(1, 2), "both": slice(2)}[where], 37:] = -INF
    options = {"divergence": divergence, "reduction": "none"}
    value, grad = gradient(DIVERGENCES[loss], run, student, teacher, biases=biases, **options)
    if (where, divergence) in (("student", "forward_kl"), ("teacher", "reverse_kl")):
        assert (value == INF).all()
        return
    low = biases.double().clamp(-1e4)
    exact_value, exact = right(lambda s, t: divergence_of(s + low[0], t + low[1], **options), student, teacher)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 3, 17, 100, 257, 1025])
@over(CAPPED)
def test_padded_lanes_stay_out_of_capped_logits(loss, run, classes):
    """The -inf of a lane past the last class becomes -softcap by tanh, and takes part (Liger #1456)."""
    softcap = 3.0
    logits = torch.full((2, classes), -5.0)
    target = torch.tensor([0, classes - 1])
    value, grad = gradient(CAPPED[loss], run, logits, target, softcap=softcap, reduction="none")
    torch.testing.assert_close(value, torch.full((2,), math.log(classes)), rtol=1e-6, atol=1e-6)
    capped = lambda x, target: F.cross_entropy(softcap * torch.tanh(x / softcap), target, reduction="sum")  # noqa: E731
    torch.testing.assert_close(grad.double(), right(capped, logits, target)[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [3, 17, 257])
@over(name for name in DIVERGENCES if takes(name, "softcap"))
def test_padded_lanes_stay_out_of_capped_divergences(loss, run, classes):
    """The same where both sides of a distillation are capped (Liger #1456)."""
    student, teacher = torch.full((2, classes), -5.0), torch.full((2, classes), -9.0)
    teacher[:, 0] = 4
    value, grad = gradient(DIVERGENCES[loss], run, student, teacher, softcap=(3.0, 5.0), reduction="none")

    def capped(student, teacher):
        return divergence_of(3 * torch.tanh(student / 3), 5 * torch.tanh(teacher / 5), reduction="none")

    exact_value, exact = right(capped, student, teacher)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("total", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@over(["cross_entropy", "linear_cross_entropy"])
def test_probabilities_that_do_not_sum_to_1(loss, run, label_smoothing, total):
    """The gradient is p * sum(target) - target; Automodel drops the sum in the backward (Automodel #2428)."""
    generator = harness.generator(3)
    logits = torch.randn(5, 37, generator=generator)
    target = total * torch.randn(5, 37, generator=generator).softmax(1)
    options = {"label_smoothing": label_smoothing, "reduction": "sum"}
    value, grad = gradient(HARD_LOSSES[loss], run, logits, target, **options)
    exact_value, exact = exact_cross_entropy(logits, target, **options)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)
    mass = (1 - label_smoothing) * target.double() + label_smoothing / 37
    torch.testing.assert_close(exact, logits.double().softmax(1) * mass.sum(1, keepdim=True) - mass)


LAYERS = {
    "cross_entropy": ("input",),
    "linear_cross_entropy": ("input", "linear_weight", "linear_bias"),
    "distillation": ("student_logits", "teacher_logits"),
    "linear_distillation": ("student_input", "student_weight", "student_bias", "teacher_input", "teacher_weight"),
}
MASKS = {
    "ignored": lambda: {"target": torch.full((4,), -100)},
    "weight 0": lambda: {"target": torch.arange(4), "row_weight": torch.zeros(4)},
    "no rows": lambda: {"target": torch.empty(0, dtype=torch.long)},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", MASKS)
@over(LAYERS)
def test_a_micro_batch_without_a_counted_row_is_in_the_graph(loss, run, mask, reduction):
    """Its loss has a graph, and every gradient is 0. TRL's was a constant, and other ranks waited for its backward."""
    if mask == "weight 0" and not takes(loss, "row_weight"):
        return
    masked = MASKS[mask]()
    rows, features, classes = len(masked["target"]), 5, 9
    shapes = {"input": (rows, features), "weight": (classes, features), "bias": (classes,), "logits": (rows, classes)}
    if loss == "cross_entropy":
        shapes["input"] = shapes["logits"]
    leaves = {name: torch.randn(shapes[name.split("_")[-1]]).requires_grad_() for name in LAYERS[loss]}
    hard = {"hard_weight": 0.3} if takes(loss, "hard_weight") else {}
    with running(run) as impl:
        value = getattr(tlk, loss)(**leaves, **masked, **hard, reduction=reduction, impl=impl)
        assert value.requires_grad
        value.sum().backward()
    undefined = reduction == "mean" and mask != "weight 0"
    assert value.isnan().all() if undefined else not value.any()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


# The hard part of a distillation has no temperature.
TEMPERED = {name: loss for name, loss in CAPPED.items() if "distillation" not in name}


@over(TEMPERED)
def test_the_heads_scale_counts(loss, run):
    """The logit scale of Cohere and Granite was dropped, and the loss off by 11 % (unsloth-zoo #930)."""
    scale = 0.0625
    logits, target = 40 * torch.randn(6, 37, generator=harness.generator(4)), torch.arange(6)
    value, grad = gradient(TEMPERED[loss], run, logits, target, temperature=1 / scale)
    scaled = lambda x, target, by=scale: F.cross_entropy(by * x, target)  # noqa: E731
    exact_value, exact = right(scaled, logits, target)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-8)
    dropped, _ = right(scaled, logits, target, by=1.0)
    assert abs(dropped / exact_value - 1) > 0.1


@over(TEMPERED)
def test_the_softcap_comes_before_the_temperature(loss, run):
    """The order of softcap and multiplier was exchanged (Liger #1390)."""
    cap, temperature = 5.0, 2.5
    logits, target = 8 * torch.randn(6, 37, generator=harness.generator(5)), torch.arange(6)
    value, grad = gradient(TEMPERED[loss], run, logits, target, softcap=cap, temperature=temperature)
    exact_value, exact = right(
        lambda x, target: F.cross_entropy(cap * torch.tanh(x / cap) / temperature, target), logits, target
    )
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-7)
    exchanged = F.cross_entropy(cap * torch.tanh(logits / temperature / cap), target)
    assert abs(exchanged / exact_value - 1) > 0.1


CALLS = [{}, {"softcap": 7.3}, {"temperature": 0.7}, {"softcap": 30.0, "temperature": 1.3}]


def sure_rows(dtype):
    """Return logits of all sizes, whose targets are level or far ahead, and the targets."""
    generator = harness.generator(6)
    rows = []
    for lead in (0, 3, 10, 17, 40, 1e3):
        for offset in (0, 1.7, -33.3, 1e3, -1e4):
            logits = 3 * torch.randn(29, generator=generator)
            logits[5] = logits.max() + lead
            rows.append(logits + offset)
    return torch.stack(rows).to(dtype), torch.full((len(rows),), 5)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", CALLS, ids=harness.words)
@over(HARD_LOSSES)
def test_no_log_probability_is_above_0(loss, run, options, dtype):
    """Rounding of the normaliser made log-probabilities of sure tokens positive (verl #2656)."""
    if options and loss not in CAPPED:
        return
    with running(run) as impl:
        value = HARD_LOSSES[loss](*sure_rows(dtype), reduction="none", impl=impl, **options)
    assert value.isfinite().all()
    assert (value >= 0).all(), f"log-probability {float(-value.min())}"


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", CALLS, ids=harness.words)
@over(SELECTED)
def test_no_selected_log_probability_is_above_0(loss, run, options, dtype):
    """The same of the log-probabilities that policy gradients take (verl #2656)."""
    with running(run) as impl:
        value = SELECTED[loss](*sure_rows(dtype), impl=impl, **options)
    assert value.isfinite().all()
    assert (value <= 0).all(), f"log-probability {float(value.max())}"
