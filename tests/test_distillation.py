"""Distillation: edge cases, faults of its peers (each named where it was found), bits, the CUDA kernels on the host."""

import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import BF16, DIVERGENCES, F16, F32, F64, HARD, both, make, pytorch, same

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("distillation")
S, T, Y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


INF = math.inf


LINES = [(4, 9), (4, 5000), (2, 66000)]  # less than a vector, several blocks, many


@pytest.mark.parametrize("shape", LINES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_both(impl, shape, divergence):
    """0 * log 0 = 0: both distributions are those of the other classes."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    student[:, 1:3] = teacher[:, 1:3] = -INF
    left = torch.cat([torch.arange(1), torch.arange(3, shape[1])])
    options = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    ours, _ = both(impl, student, teacher, **options)
    _, right = both(impl, student[:, left], teacher[:, left], **options)
    same((ours[0], *(grad[:, left] for grad in ours[1:])), right)
    assert all(torch.equal(grad[:, 1:3], torch.zeros(shape[0], 2)) for grad in ours[1:])


@pytest.mark.parametrize("shape", LINES, ids=str)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_in_one(impl, shape, where, divergence):
    """Probability 0 on one side only: js and tv are finite; a KL is infinite in that row if it divides by that side."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    (student if where == "student" else teacher)[1, 2] = -INF
    ours, _ = both(impl, student, teacher, divergence=divergence, reduction="none")
    low = student.double().masked_fill(student == -INF, -1e4), teacher.double().masked_fill(teacher == -INF, -1e4)
    _, right = both(impl, *low, divergence=divergence, reduction="none")
    infinite = (divergence, where) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert bool(ours[0][1].isinf()) == infinite
    rows = [0, 2, 3] if infinite and shape[0] > 2 else [0] if infinite else slice(None)
    same([x[rows] for x in ours], [x[rows] for x in right])
    if infinite:  # the gradient of that side is p - q as ever
        side = 1 if where == "student" else 2
        same([ours[side]], [right[side]])


@pytest.mark.parametrize("shape", LINES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_row_of_minus_infinity_is_nan_alone(impl, shape, divergence, where):
    student, teacher = torch.randn(shape), torch.randn(shape)
    if where != "teacher":
        student[1] = -INF
    if where != "student":
        teacher[1] = -INF
    ours, _ = both(impl, student, teacher, divergence=divergence, reduction="none")
    assert ours[0].isnan().tolist() == [i == 1 for i in range(shape[0])]
    affected = {"student": ours[1:2], "teacher": ours[2:], "both": ours[1:]}[where]
    assert all(grad[1].isnan().any() for grad in affected)
    assert all(grad[0].isfinite().all() for grad in ours[1:])


@pytest.mark.parametrize("block", [slice(0, 2048), slice(2048, 4096), slice(1, None), slice(0, 4990)], ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e4, 128.0 * 100, -9.7e3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whole_blocks_of_minus_infinity(impl, block, divergence, offset):
    """Must not be NaN when a whole block is -inf (flash-attn #1930)."""
    values = torch.randn(2, 2, 5000).mul(4).round().div(4)
    student, teacher = values + offset
    student[:, block] = -INF
    teacher[:, block] = -INF
    ours, right = both(impl, student, teacher, divergence=divergence)
    assert ours[0].isfinite()
    finite = student.isfinite()
    same((ours[0], ours[1][finite], ours[2][finite]), (right[0], right[1][finite], right[2][finite]))


@pytest.mark.parametrize("peak", [-88.75, -443.5, -1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_low_peak_after_blocks_of_minus_infinity(impl, divergence, peak):
    """The factor from an empty sum to that peak would be 2^128, which has the bits of infinity."""
    student, teacher = torch.full((2, 2, 9001), peak)
    student[:, :4096] = teacher[:, :4096] = -INF
    student[:, 8000], teacher[:, 8001] = peak + 8, peak + 6  # a divergence large enough for float32
    ours, right = both(impl, student, teacher, divergence=divergence)
    same(ours, right)


@pytest.mark.parametrize("shape", [(4, 40), (3, 5000), (2, 66000)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_both_probabilities_underflow(impl, shape, divergence):
    """JSD must not be NaN where both underflow (Liger #1453)."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    student[:, 3:9] = teacher[:, 3:9] = -300
    student[:, 5] = -5000
    options = {"divergence": divergence, "reduction": "none"}
    ours, right = both(impl, student, teacher, **options)
    same(ours, right)


@pytest.mark.parametrize("shape", [(4, 9), (4, 5000)], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, HARD], ids=["plain", "cold", "hard"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(impl, shape, divergence, options):
    """No overflow, and a common offset costs no accuracy."""
    student, teacher = torch.randn(2, *shape).mul(4).round().div(4)  # still exact with the offset added
    options = {**options, "divergence": divergence, "reduction": "none"}
    if options.pop("target", False):
        options |= {"target": torch.zeros(shape[0], dtype=torch.long), "row_weight": torch.rand(shape[0])}
    if options.pop("weighted", False):
        options["row_weight"] = torch.rand(shape[0])
    for offset in (1e4, -1e4):
        same(*both(impl, student + offset, teacher - offset, **options))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_logits_of_a_sure_teacher(impl, divergence):
    """The divergence of equal distributions is 0, also where a probability is 1."""
    logits = torch.randn(4, 50)
    logits[:, 0] += torch.tensor([0.0, 20.0, 200.0, 2000.0])
    loss, *grads = both(impl, logits, logits.clone(), divergence=divergence, reduction="none")[0]
    assert loss.abs().max() < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in grads)


@pytest.mark.parametrize("options", [{}, HARD, {"reduction": "sum"}], ids=["mean", "hard", "sum"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_row_ignored(impl, divergence, options):
    """The mean is NaN and the gradients are 0, not infinite or NaN (aiter #5165)."""
    options = {"hard_weight": 0.5, **{k: v for k, v in options.items() if k not in ("target", "weighted")}}
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    student[0], teacher[1] = INF, math.nan  # in ignored rows
    target = torch.full((4,), 3)
    (loss, *grads), _ = both(impl, student, teacher, target=target, ignore_index=3, divergence=divergence, **options)
    assert loss == 0 if options.get("reduction") == "sum" else loss.isnan()
    assert all(torch.equal(grad, torch.zeros(4, 9)) for grad in grads)


def test_ignored_rows_count_in_neither_part(impl):
    student, teacher, target = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([3, -100, 0, -100])
    for hard in (0.0, 0.4):
        loss = tlk.distillation(student, teacher, target, hard_weight=hard, impl=impl)
        kept = tlk.distillation(student[::2], teacher[::2], target[::2], hard_weight=hard, impl="reference")
        torch.testing.assert_close(loss, kept)


def test_row_weight_leaves_the_denominator_alone(impl):
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    rows = tlk.distillation(student, teacher, reduction="none", impl=impl)
    weight = torch.tensor([0.0, 2.0, 3.0, 0.5])
    loss = tlk.distillation(student, teacher, row_weight=weight, impl=impl)
    torch.testing.assert_close(loss, (rows * weight).sum() / 4)


@pytest.mark.parametrize("hard", [{}, {"hard_weight": 0.4, "label_smoothing": 0.1}], ids=["soft", "hard"])
@pytest.mark.parametrize("fill", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_weight_0_do_not_take_part(impl, divergence, fill, hard):
    """Whatever they hold; the mean still divides by their number. Second derivatives are 0 too."""
    student, teacher = torch.randn(2, 5, 40, dtype=F64)
    weight = torch.tensor([0.0, 2.0, 0.0, -1.0, 0.5], dtype=F64)
    options = {"row_weight": weight, "target": torch.tensor([0, 1, 2, -100, 3]), "divergence": divergence, **hard}
    filled = [x.masked_fill((weight == 0).unsqueeze(-1), fill) for x in (student, teacher)]
    results = []
    for loss, logits in ((lambda *x: tlk.distillation(*x, impl=impl, **options), filled),
                         (lambda *x: pytorch(*x, **options), (student, teacher))):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in logits]
        value = loss(*leaves)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        total = sum((grad * torch.cos(grad)).sum() for grad in grads)
        results.append((value, *grads, *torch.autograd.grad(total, leaves)))
    same(*results, rtol=1e-9, atol=1e-11)


def test_a_derivative_by_row_weight_is_right_where_it_is_0():
    """Where one may be asked for, the row takes part."""
    student, teacher, weight = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0.0, 1.0, 0.0, 2.0])
    rows = tlk.distillation(student, teacher, reduction="none")
    loss = lambda w: tlk.distillation(student, teacher, row_weight=w, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.autograd.grad(loss(weight.requires_grad_()), weight)[0], rows)
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), rows)
    torch.testing.assert_close(torch.func.jvp(loss, (weight.detach(),), (torch.ones(4),))[1], rows.sum())
    torch.testing.assert_close(torch.func.jacfwd(loss)(weight.detach()), rows)


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 9)], ids=str)
def test_mean_is_batchmean_of_rows(impl, shape):
    """As F.kl_div's "batchmean"; its "mean" also divides by the number of classes."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    flat = student.view(-1, 9).log_softmax(-1), teacher.view(-1, 9).softmax(-1)
    expected = F.kl_div(*flat, reduction="batchmean")
    for reduction in ("mean", "batchmean"):
        torch.testing.assert_close(tlk.distillation(student, teacher, reduction=reduction, impl=impl), expected)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_pytorch_samples_of_kl_div(impl, dtype):
    """PyTorch's own samples, taken as logits."""
    tried = 0
    for sample in helpers.pytorch_samples("nn.functional.kl_div", dtype):
        reduction = sample.kwargs.get("reduction", "mean")
        student, (teacher,) = sample.input, sample.args
        if student.dim() == 0 or student.shape != teacher.shape or reduction not in ("sum", "batchmean"):
            continue
        tried += 1
        wide = student.double().log_softmax(-1), teacher.double().softmax(-1)
        expected = F.kl_div(*wide, reduction="sum")
        if reduction == "batchmean":
            expected = expected / student.shape[:-1].numel()
        ours = tlk.distillation(student, teacher, reduction=reduction, impl=impl)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype != F64 else 1e-12
        )
    assert tried > 3


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)], ids=str)
def test_no_rows(impl, shape):
    student = torch.randn(shape, requires_grad=True)
    assert tlk.distillation(student, student.detach(), impl=impl).isnan()
    assert tlk.distillation(student, student.detach(), reduction="none", impl=impl).shape == shape[:-1]
    tlk.distillation(student, student.detach(), reduction="sum", impl=impl).backward()
    assert student.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes_of_targets(impl, dtype):
    student, teacher, target = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([0, 6, 2, 3, 3])
    loss = tlk.distillation(student, teacher, target.to(dtype), hard_weight=0.5, impl=impl)
    torch.testing.assert_close(loss, pytorch(student, teacher, target, hard_weight=0.5))


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    student, teacher = torch.zeros(4096, 8, dtype=F16), torch.zeros(4096, 8, dtype=F16)
    student[:, 1:] = -12
    teacher[:, 1:] = -13
    ours, right = both(impl, student, teacher, 2.0**15)
    torch.testing.assert_close(ours[1].double(), right[1], rtol=5e-2, atol=0)


def test_a_causal_shift_is_not_copied(impl):
    """Sliced logits, as in language models."""
    student, teacher = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    target = torch.randint(0, 40, (2, 5))
    ours, _ = both(impl, student[:, :-1], teacher[:, :-1], target=target[:, 1:], hard_weight=0.5)
    _, right = both(impl, student[:, :-1].clone(), teacher[:, :-1].clone(), target=target[:, 1:], hard_weight=0.5)
    same(ours, right)


def test_expanded_teacher(impl):
    student, teacher = torch.randn(6, 40), torch.randn(40).expand(6, 40)
    same(*both(impl, student, teacher))


def test_teacher_in_float64(impl):
    """The loss is computed in float64, and the student's gradient has the student's dtype."""
    student, teacher = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40, dtype=F64)
    loss = tlk.distillation(student, teacher, impl=impl)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.dtype == F64
    assert grad.dtype == F32
    wide = student.detach().double().requires_grad_()
    right = pytorch(wide, teacher)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(right, wide)[0].float(), rtol=1e-6, atol=1e-9)


def test_inputs_are_not_changed(impl):
    arguments = make((6, 50), F32, target=True, weighted=True, hard_weight=0.5)(0)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    arguments["student_logits"].requires_grad_()
    tlk.distillation(**arguments, impl=impl).backward()
    assert all(torch.equal(arguments[name].detach(), value) for name, value in before.items())


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("shape", [(2000, 45), (70, 1000), (5, 9000)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_bits_at_any_number_of_threads(shape, divergence):
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(2)]

    def run():
        results = []
        for reduction in ("mean", "none"):
            loss = tlk.distillation(*tensors, divergence=divergence, reduction=reduction, impl="native")
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]
        return results

    first, *others = helpers.at_thread_counts((1, 2, 3, 1), run)
    assert all(all(map(torch.equal, first, other)) for other in others)


@pytest.mark.parametrize("target", [t for t in harness.targets(loss="distillation") if t.impl == "native"], ids=str)
@pytest.mark.parametrize("shape", [(40, 45), (9, 5001)], ids=str)
def test_a_row_does_not_depend_on_the_others(shape, target):
    """Nor on its address: rows of odd length begin at every distance from an aligned one."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    with harness.forced(target):
        loss = tlk.distillation(student, teacher, reduction="none", divergence="js", impl="native")
        for k in range(shape[0]):
            one = tlk.distillation(student[k], teacher[k].clone(), reduction="none", divergence="js", impl="native")
            assert torch.equal(one, loss[k])


@pytest.fixture
def on_cuda_host():
    if not harness.on_cuda_host("distillation"):
        pytest.skip("CUDA kernels cannot run on this host")
    with harness.forced(harness.Target("native", harness.CUDA_HOST)):
        yield


@pytest.mark.usefixtures("on_cuda_host")
class TestCudaOnHost:
    """Properties of the CUDA kernels alone."""

    @pytest.mark.parametrize("bad", [5, -1, 2**40])
    @pytest.mark.parametrize("hard_weight", [0.0, 0.5])
    def test_a_class_index_out_of_range_makes_its_row_nan(self, bad, hard_weight):
        target = Y.clone()
        target[2] = bad
        student, teacher = (x.clone().requires_grad_() for x in (S, T))
        options = {"hard_weight": hard_weight, "reduction": "none", "impl": "native"}
        loss = tlk.distillation(student, teacher, target, **options)
        grads = torch.autograd.grad(loss.sum(), (student, teacher))
        expected = tlk.distillation(S, T, Y, **options)
        assert loss.isnan().tolist() == [False, False, True, False]
        assert torch.equal(loss[[0, 1, 3]], expected[[0, 1, 3]])
        for grad in grads:
            assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == loss.isnan().tolist()

    # A row in the shared memory of one, two, four and eight blocks, and in none; in whole packs and not.
    @pytest.mark.parametrize(
        ("sm", "classes", "dtype"),
        [(90, 13000, F32), (90, 13001, BF16), (90, 20001, F32), (90, 66000, BF16), (90, 66003, F32), (90, 300_001, F32),
         (80, 20001, F32), (80, 43001, BF16), (86, 20001, F32), (86, 7001, F64)],
    )  # fmt: skip
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("softcap", [None, (5.0, 30.0)], ids=["plain", "softcap"])
    def test_every_way_to_keep_a_row(self, monkeypatch, sm, classes, dtype, divergence, softcap):
        if classes > 100_000 and divergence != "js":
            pytest.skip("the largest rows once")
        monkeypatch.setenv("TLKERNELS_CUDA_HOST_SM", str(sm))
        arguments = make((2, classes), dtype, divergence=divergence, softcap=softcap, **HARD)(0)
        tensors, put = harness.split(arguments, ("student_logits", "teacher_logits"))
        results = []
        for loss, given in ((tlk.distillation, tensors), (pytorch, tensors), (pytorch, [x.double() for x in tensors])):
            leaves = [x.detach().requires_grad_() for x in given]
            value = loss(**put(*leaves), **({"impl": "native"} if loss is tlk.distillation else {}))
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        names = [f"{name}, {divergence} of {classes} on sm_{sm}" for name in ("loss", "student", "teacher")]
        harness.check_results(dtype, zip(names, *results, strict=True))
