"""Top-k distillation and its linear form: the tail, rows that do not count, errors. The battery has the rest.

The oracle is distillation in float64 over the classes that the teacher kept and one that holds the others.
"""

import itertools
import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import DIVERGENCES, divergence_of
from distillation_cases import pytorch as distillation
from topk_distillation_cases import BF16, F16, F32, F64, TAILS, teacher

import tlkernels as tlk
from tlkernels.losses.topk_distillation import api

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("selective_log_softmax")
INF = math.inf


def merged(logits, index):
    """Return the log-probabilities of the selected classes and of all others together, from all logits."""
    log_p, rows = logits.log_softmax(-1), []
    for row, selected in zip(log_p, index, strict=True):
        kept = selected[selected >= 0]
        others = torch.ones(row.numel(), dtype=torch.bool, device=row.device)
        others[kept] = False
        values = row.new_full((selected.numel(),), -INF).masked_scatter(selected >= 0, row[kept])
        rows.append(torch.cat([values, row[others].logsumexp(0, keepdim=True)]))
    return torch.stack(rows)


def oracle(logits, index, log_q, temperature, divergence, tail, beta=0.5):
    """Return the loss of each row in float64."""
    logits, log_q = logits.double() / temperature, log_q.double()
    log_p, rest = merged(logits, index), torch.log1p(-log_q.exp().sum(-1, keepdim=True))
    options = {"temperature": temperature, "divergence": divergence, "beta": beta, "reduction": "none"}
    if tail == "renormalize":
        return distillation(temperature * log_p[:, :-1], log_q, **options)
    log_q = torch.cat([log_q, rest], -1)
    if tail == "bucket":
        return distillation(temperature * log_p, log_q, **options)
    log_q = (log_q / temperature).log_softmax(-1)
    return temperature**2 * divergence_of(log_q[:, :-1], log_p[:, :-1], divergence, beta)


def same(results, expected, rtol=1e-4, atol=1e-6):
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=rtol, atol=atol, equal_nan=True)


def value_and_gradients(loss, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    g = torch.linspace(0.5, 1.5, max(1, value.numel())).view_as(value).to(value)
    return value.detach(), *torch.autograd.grad(value, leaves, g)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_distillation_with_the_tail_merged_into_one_class(impl, divergence, tail, temperature, dtype):
    logits = torch.randn(5, 40, dtype=dtype) * 1.5
    index, log_q = teacher((5,), 40, 6, dtype, harness.generator(1), ragged=True)
    options = {"temperature": temperature, "divergence": divergence, "tail": tail}

    def ours(x, log_q):
        return tlk.topk_distillation(x, index, log_q, reduction="none", impl=impl, **options)

    results = value_and_gradients(ours, logits, log_q)
    expected = value_and_gradients(lambda x, log_q: oracle(x, index, log_q, **options), logits.double(), log_q.double())
    there = index >= 0  # -inf has no derivative
    results, expected = (((*r[:2], r[2][there])) for r in (results, expected))
    same(results, expected, *(() if dtype == F32 else (1e-9, 1e-11)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_all_classes_it_is_distillation(impl, divergence, tail, temperature):
    """There is no rest, not even one of rounding errors, which a temperature would raise."""
    student, logits = torch.randn(2, 6, 11) * 3
    log_q, index = logits.log_softmax(-1).sort(-1)
    options = {"temperature": temperature, "divergence": divergence, "reduction": "none"}
    ours = value_and_gradients(
        lambda x: tlk.topk_distillation(x, index, log_q, tail=tail, impl=impl, **options), student
    )
    right = value_and_gradients(lambda x: distillation(x, logits.double(), **options), student.double())
    same(ours, right)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_stored_probabilities_of_sum_over_one(impl, divergence, tail):
    """As float16 rounds them. Loss and gradients are finite, and near those of the float32 values."""
    logits = torch.randn(64, 100)
    exact = (torch.randn(64, 100).mul(3).log_softmax(-1).topk(60).values * 1.0).log_softmax(-1)
    stored = exact.half()
    assert (stored.float().exp().sum(-1) > 1).any()
    index = torch.randn(64, 100).topk(60).indices
    options = {"divergence": divergence, "tail": tail, "impl": impl}
    ours = value_and_gradients(lambda x, q: tlk.topk_distillation(x, index, q, **options), logits, stored)
    assert all(value.isfinite().all() for value in ours)
    if (divergence, tail) == ("reverse_kl", "bucket"):
        return  # the logarithm of a rest of nearly 0 decides
    near = value_and_gradients(lambda x: tlk.topk_distillation(x, index, exact, **options), logits)
    same(ours[:1], near[:1], rtol=2e-2)
    same(ours[1:2], near[1:], rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_sure_student_and_a_sure_teacher(impl, divergence, tail, dtype):
    """No rest is left on one side or both: everything is finite."""
    logits = torch.randn(3, 50).to(dtype)
    logits[:, 4] += torch.tensor([20.0, 200.0, 10000.0]).to(dtype)
    index = torch.tensor([[4, 1], [4, 2], [4, 3]])
    for log_q in (torch.tensor([0.0, -INF]), torch.tensor([-1e-9, -20.0]), torch.tensor([-0.1, -3.0])):
        if divergence == "reverse_kl" and log_q[1] == -INF:
            continue  # infinite: the student has the class, and the teacher says that it is impossible
        results = value_and_gradients(
            lambda x, q: tlk.topk_distillation(x, index, q, divergence=divergence, tail=tail, impl=impl),
            logits, log_q.expand(3, 2).contiguous(),
        )  # fmt: skip
        assert all(value.isfinite().all() for value in results)


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity(impl, divergence, where):
    logits = torch.randn(3, 9)
    index, log_q = teacher((3,), 9, 3, F32, harness.generator(0))
    if where != "teacher":
        logits[1].index_fill_(0, index[1, 1:2], -INF)
    if where != "student":
        log_q[1, 1] = -INF
    options = {"divergence": divergence, "reduction": "none"}
    value, grad = value_and_gradients(lambda x: tlk.topk_distillation(x, index, log_q, impl=impl, **options), logits)
    right = oracle(logits, index, log_q, 1.0, divergence, "bucket")
    same([value], [right])
    infinite = (divergence, where) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert bool(value[1].isinf()) == infinite
    assert grad[[0, 2]].isfinite().all() and (infinite or grad[1].isfinite().all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_hard_part(impl, temperature, monkeypatch):
    """At temperature 1 the target is one more class of the same call; otherwise it takes a second one."""
    calls = []
    resolve = api.resolve
    monkeypatch.setattr(api, "resolve", lambda *args: calls.append(args) or resolve(*args))
    logits, target = torch.randn(6, 20), torch.tensor([0, 5, -100, 19, 3, 3])
    index, log_q = teacher((6,), 20, 4, F32, harness.generator(0))
    options = {"temperature": temperature, "reduction": "none"}

    def right(x):
        soft = oracle(x, index, log_q, temperature, "forward_kl", "bucket")
        rows = 0.7 * soft + 0.3 * F.cross_entropy(3 * (x / 3), target, reduction="none")
        return rows.masked_fill(target == -100, 0)

    ours = value_and_gradients(
        lambda x: tlk.topk_distillation(x, index, log_q, target, hard_weight=0.3, impl=impl, **options), logits
    )
    same(ours, value_and_gradients(right, logits.double()))
    assert len(calls) == (1 if temperature == 1 else 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("fill", [math.nan, INF, -INF])
def test_rows_that_do_not_count(impl, tail, temperature, fill):
    """An ignored row and one of weight 0: their gradients are 0, whatever student and teacher hold."""
    logits, target = torch.randn(4, 9), torch.tensor([3, -100, 0, 1])
    weight = torch.tensor([2.0, 1.0, 0.0, 0.5])
    index, log_q = teacher((4,), 9, 3, F32, harness.generator(0))
    logits[1:3], log_q[1:3] = fill, fill
    options = {"hard_weight": 0.4, "tail": tail, "temperature": temperature, "impl": impl}

    def loss(x, q, rows=slice(None), **more):
        return tlk.topk_distillation(x, index[rows], q, target[rows], row_weight=weight[rows], **options | more)

    ours = value_and_gradients(loss, logits, log_q)
    kept = [0, 3]
    right = value_and_gradients(lambda x, q: loss(x, q, kept, reduction="sum") / 3, logits[kept], log_q[kept])
    same((ours[0], *(grad[kept] for grad in ours[1:])), right)
    assert all(torch.equal(grad[1:3], torch.zeros_like(grad[1:3])) for grad in ours[1:])
    none = value_and_gradients(
        lambda x, q: tlk.topk_distillation(x, index, q, torch.full((4,), -100), **options), logits, log_q
    )
    assert none[0].isnan() and not any(grad.any() for grad in none[1:])


def test_gradient_of_row_weight(impl):
    """Exact, also of a weight of 0."""
    logits, weight = torch.randn(4, 9), torch.tensor([2.0, -1.0, 0.0, 0.5])
    index, log_q = teacher((4,), 9, 3, F32, harness.generator(0))
    target = torch.tensor([1, 2, 3, -100])

    def loss(x, w, reduction="mean"):
        return tlk.topk_distillation(
            x, index, log_q, target, hard_weight=0.5, row_weight=w, reduction=reduction, impl=impl
        )

    rows = loss(logits, torch.ones(4), "none")
    _, by_logits, by_weight = value_and_gradients(loss, logits, weight)
    same([by_weight], [0.5 * rows / 3])
    same([by_logits], value_and_gradients(lambda x: loss(x, weight), logits)[1:])


def test_a_row_without_a_class_adds_no_divergence(impl):
    logits = torch.randn(3, 9)
    index, log_q = teacher((3,), 9, 3, F32, harness.generator(0))
    index[1], log_q[1] = -1, -INF
    target = torch.tensor([0, 1, 2])
    for tail, hard in itertools.product(TAILS, (0.0, 0.5)):
        value, grad = value_and_gradients(
            lambda x, tail=tail, hard=hard: tlk.topk_distillation(
                x, index, log_q, target, hard_weight=hard, tail=tail, reduction="none", impl=impl
            ),
            logits,
        )
        same([value[1]], [hard * F.cross_entropy(logits[1], target[1])])
        assert grad.isfinite().all() and bool(grad[1].any()) == (hard > 0)


def test_reductions(impl):
    logits = torch.randn(2, 3, 9)
    index, log_q = teacher((2, 3), 9, 3, F32, harness.generator(0))
    target = torch.tensor([[0, -100, 1], [2, 3, -100]])
    rows, mean, batchmean, total = (
        tlk.topk_distillation(logits, index, log_q, target, reduction=reduction, impl=impl)
        for reduction in ("none", "mean", "batchmean", "sum")
    )
    assert rows.shape == (2, 3)
    same((mean, batchmean, total), (rows.sum() / 4, rows.sum() / 4, rows.sum()))
    empty = tlk.topk_distillation(logits[:0], index[:0], log_q[:0], impl=impl)
    assert empty.isnan()
    assert tlk.topk_distillation(logits[:0], index[:0], log_q[:0], reduction="none", impl=impl).shape == (0, 3)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("stored", [F64, BF16, F16], ids=str)
def test_dtypes_of_the_teacher(impl, kind, stored):
    logits = torch.randn(3, 9)
    index, log_q = teacher((3,), 9, 3, stored, harness.generator(0))
    ours = tlk.topk_distillation(logits, index.to(kind), log_q, impl=impl)
    assert ours.dtype == torch.promote_types(F32, stored)
    same([ours], [tlk.topk_distillation(logits.double(), index, log_q.double(), impl="reference")])


def test_explain_names_the_loss():
    logits, (index, log_q) = torch.randn(3, 9), teacher((3,), 9, 3, F32, harness.generator(0))
    assert tlk.explain(tlk.topk_distillation, logits, index, log_q).startswith("topk_distillation(impl='auto'): served")
    text = tlk.explain(tlk.linear_topk_distillation, logits, torch.randn(9, 9), index, log_q)
    assert text.startswith("linear_topk_distillation(impl='auto'): served")


@pytest.fixture(params=harness.targets(loss="linear_selective_log_softmax"), ids=str)
def linear_impl(request):
    with harness.forced(request.param) as name:
        yield name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_linear_form_is_that_of_the_logits(linear_impl, temperature):
    """Also of features that are NaN in rows that do not count."""
    x, w, b = torch.randn(4, 5), torch.randn(9, 5), torch.randn(9)
    index, log_q = teacher((4,), 9, 3, F32, harness.generator(0))
    target, weight = torch.tensor([3, -100, 0, 1]), torch.tensor([2.0, 1.0, 0.0, 0.5])
    options = {"temperature": temperature, "hard_weight": 0.4, "softcap": 3.0, "row_weight": weight}
    right = value_and_gradients(
        lambda x, w, b: tlk.topk_distillation(F.linear(x, w, b), index, log_q, target, impl="reference", **options),
        x, w, b,
    )  # fmt: skip
    x[1:3] = math.nan
    ours = value_and_gradients(
        lambda x, w, b: tlk.linear_topk_distillation(
            x, w, index, log_q, target, student_bias=b, impl=linear_impl, **options
        ),
        x, w, b,
    )  # fmt: skip
    same(ours, right)


L, K = torch.randn(2, 5), torch.tensor([[0, 1], [4, -1]])
Q = torch.tensor([[-1.0, -2.0], [-0.5, -INF]])


@pytest.mark.parametrize(("args", "options", "error", "message"), [
    (([1.0], K, Q), {}, TypeError, "student_logits: expected a Tensor, got list"),
    ((L.long(), K, Q), {}, TypeError, "student_logits: expected float64, .* got torch.int64"),
    ((L[:, :0], K, Q), {}, ValueError, r"student_logits: expected shape \(..., C\) with C above 0, got \(2, 0\)"),
    ((L, K.tolist(), Q), {}, TypeError, "teacher_index: expected a Tensor, got list"),
    ((L, K.float(), Q), {}, TypeError, "teacher_index: expected class indices of an integer dtype, got torch.float32"),
    ((L, K[0], Q), {}, ValueError, r"teacher_index: expected shape \(2, 'K'\) with K above 0, got \(2,\)"),
    ((L, K[:, :0], Q[:, :0]), {}, ValueError, "teacher_index: expected shape"),
    ((L, K, Q.tolist()), {}, TypeError, "teacher_log_probs: expected a Tensor, got list"),
    ((L, K, Q.long()), {}, TypeError, "teacher_log_probs: expected float64, .* got torch.int64"),
    ((L, K, Q[:, :1]), {}, ValueError, r"teacher_log_probs: expected the shape of teacher_index \(2, 2\), got \(2, 1"),
    ((L, K.to("meta"), Q), {}, ValueError, "teacher_index: expected it on the student's device cpu, got meta"),
    ((L, K + 1, Q), {}, IndexError, r"teacher_index: expected class indices in \[-1, 5\), got 5"),
    ((L, K - 1, Q), {}, IndexError, r"teacher_index: expected class indices in \[-1, 5\), got -2"),
    ((L, K, Q, torch.tensor([0, 5])), {}, IndexError, r"target: expected class indices in \[0, 5\), got 5"),
    ((L, K, Q, torch.tensor([-1, 0])), {}, IndexError, r"target: expected class indices in \[0, 5\), got -1"),
    ((L, K, Q, torch.tensor([0])), {}, ValueError, r"target: expected class indices of shape \(2,\), got \(1,\)"),
    ((L, K, Q), {"hard_weight": 0.5}, ValueError, "target: expected class indices, since hard_weight is 0.5, got None"),
    ((L, K, Q), {"tail": "none"}, ValueError, r"tail: expected one of \('bucket', 'renormalize', 'ignore'\), got 'no"),
    ((L, K, Q), {"divergence": "kl"}, ValueError, "divergence: expected one of"),
    ((L, K, Q), {"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ((L, K, Q), {"softcap": (1.0, 2.0)}, TypeError, "softcap: expected a number, got tuple"),
    ((L, K, Q), {"row_weight": torch.ones(3)}, ValueError, r"row_weight: expected shape \(2,\)"),
    ((L, K, Q), {"reduction": "max"}, ValueError, "reduction: expected one of"),
])  # fmt: skip
def test_errors(any_impl, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tlk.topk_distillation(*args, **options, impl=any_impl)


@pytest.mark.parametrize(("args", "error", "message"), [
    ((L, L[:, :4], K, Q), ValueError, r"student_weight: expected shape \(classes, in_features\) with in_features 5"),
    ((L, L.double(), K, Q), TypeError, "student_weight: expected the dtype of student_input, torch.float32, got"),
    ((L, L.repeat(3, 1), K[:1], Q), ValueError, "teacher_index: expected shape"),
    ((L, L, K, Q), IndexError, r"teacher_index: expected class indices in \[-1, 2\), got 4"),
])  # fmt: skip
def test_errors_of_the_linear_form(any_impl, args, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tlk.linear_topk_distillation(*args, impl=any_impl)
