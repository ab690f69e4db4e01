"""Cases of distillation, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import itertools
import math

import harness
import torch
import torch.nn.functional as F
from module_case import SUM, ModuleCase, X, Y

import tlkernels as tlk
from tlkernels.losses.distillation import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv")


def divergence_of(log_q, log_p, name, beta):
    """Return the divergence of each row, the sum over its classes."""

    def kl(log_a, log_b):
        zero = log_a.exp() == 0  # filled before the product too: its backward would turn the fill into NaN
        log_a, log_b = log_a.masked_fill(zero, 0), log_b.masked_fill(zero, 0)
        return (log_a.exp() * (log_a - log_b)).masked_fill(zero, 0).sum(-1)

    if name == "forward_kl":
        return kl(log_q, log_p)
    if name == "reverse_kl":
        return kl(log_p, log_q)
    if name == "tv":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    zero = (log_q == -math.inf) & (log_p == -math.inf)
    parts = (log_q + math.log(beta)).masked_fill(zero, 0), (log_p + math.log(1 - beta)).masked_fill(zero, 0)
    log_m = torch.logaddexp(*parts)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def pytorch(student_logits, teacher_logits, target=None, *, temperature=1.0, divergence="forward_kl", beta=0.5,
            hard_weight=0.0, ignore_index=-100, row_weight=None, label_smoothing=0.0, softcap=None,
            reduction="mean"):  # fmt: skip
    """The PyTorch lines of the docstring, in the dtype of the logits."""
    student_cap, teacher_cap = softcap if isinstance(softcap, (tuple, list)) else (softcap, softcap)
    if student_cap is not None:
        student_logits = student_cap * torch.tanh(student_logits / student_cap)
    if teacher_cap is not None:
        teacher_logits = teacher_cap * torch.tanh(teacher_logits / teacher_cap)
    log_q = (teacher_logits / temperature).log_softmax(-1)
    log_p = (student_logits / temperature).log_softmax(-1)
    rows = divergence_of(log_q, log_p, divergence, beta)
    rows = (1 - hard_weight) * temperature**2 * rows
    count = rows.numel()
    if hard_weight:
        flat = student_logits.reshape(-1, student_logits.shape[-1])
        hard = F.cross_entropy(flat, target.reshape(-1).long(), reduction="none", ignore_index=ignore_index,
                               label_smoothing=label_smoothing)  # fmt: skip
        rows = rows + hard_weight * hard.view(target.shape)
    if row_weight is not None:
        rows = rows * row_weight
    if target is not None:
        ignored = target == ignore_index
        rows, count = rows.masked_fill(ignored, 0), (~ignored).sum()
    return {"none": lambda: rows, "sum": rows.sum}.get(reduction, lambda: rows.sum() / count)()


def make(shape, dtype, teacher_dtype=None, layout="contiguous", target=False, weighted=False, scale=1.0, **options):
    """Return a function of the seed that gives the arguments."""

    def arguments(seed):
        generator = harness.generator(seed)
        axis = len(shape) - 1
        student = harness.logits(shape, dtype, generator, axis) * scale
        noise = torch.randn(shape, generator=generator, dtype=F64)
        near = torch.rand((*shape[:-1], 1), generator=generator) < 0.5  # half the rows' teachers are like the student
        teacher = torch.where(near, student.double() + 0.3 * noise, 2 * noise * scale).to(teacher_dtype or dtype)
        given = {"student_logits": harness.lay_out(student, layout), "teacher_logits": harness.lay_out(teacher, layout)}
        rows = shape[:-1]
        if target:
            given["target"] = harness.class_indices(rows, shape[-1], generator, options.get("ignore_index", -100))
        if weighted:
            given["row_weight"] = torch.rand(rows, generator=generator).to(dtype)
        return {**given, **options}

    return arguments


def case(shape, dtype=F32, wants_grad=("student_logits",), small=False, **options):
    words = ["x".join(map(str, shape)), str(dtype).removeprefix("torch.")]
    words += [f"{name}={value}" for name, value in options.items()]
    words += ["both"] * (len(wants_grad) > 1)
    promoted = torch.promote_types(dtype, options.get("teacher_dtype") or dtype)
    return harness.LossCase("-".join(words), promoted, make(shape, dtype, **options), wants_grad, small)


def both(impl, student, teacher, upstream=1.0, **options):
    """Return loss and gradients: ours in the logits' dtype, and PyTorch's in float64."""

    def run(loss, *logits):
        leaves = [x.detach().clone().requires_grad_() for x in logits]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, upstream))

    return (
        run(lambda s, t: tlk.distillation(s, t, impl=impl, **options), student, teacher),
        run(lambda s, t: pytorch(s, t, **options), student.double(), teacher.double()),
    )


def same(result, expected, rtol=1e-5, atol=1e-6):
    for ours, right in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=rtol, atol=atol, equal_nan=True)


BOTH = ("student_logits", "teacher_logits")
HARD = {"target": True, "weighted": True, "hard_weight": 0.3, "label_smoothing": 0.1, "temperature": 2.0}

# Every combination of options that the kernel combines.
OPTIONS = [
    case((6, 37), dtype, wants, **{**dict(HARD if hard else {}), "divergence": divergence, "reduction": reduction})
    for divergence, dtype, wants, hard, reduction in itertools.product(
        DIVERGENCES, (F64, F32), (BOTH[:1], BOTH[1:], BOTH), (False, True), ("mean", "none")
    )
]
# One class; less than a vector; whole vectors; odd; a block and one more; several blocks; many.
SHAPES = [(5,), (1, 1), (7, 1), (3, 2), (5, 16), (4, 65), (9, 129), (3, 2048), (3, 2049), (2, 6151), (2, 3, 5, 7),
          (2, 65537)]  # fmt: skip
GRID = [
    case(shape, dtype, BOTH, divergence=divergence, **options)
    for shape in SHAPES
    for dtype in ((F64, F32, BF16, F16) if shape[-1] < 10000 else (F32, BF16))
    for divergence, options in zip(DIVERGENCES, ({"temperature": 2.0}, HARD, {"beta": 0.2}, {"reduction": "sum"}),
                                   strict=True)
]  # fmt: skip
# One softcap for both sides, one each, and one for a side alone.
SOFTCAPS = (5.0, (2.0, 30.0), (3.0, None), (None, 4.0))
CAPPED = [
    *(case((6, 37), dtype, wants, divergence=divergence, softcap=softcap, **options)
      for divergence, softcap in itertools.product(DIVERGENCES, SOFTCAPS)
      for dtype in (F64, F32, BF16, F16)
      for wants, options in ((BOTH, HARD), (BOTH[:1], {"temperature": 0.5}), (BOTH[1:], {"reduction": "none"}))),
    *(case(shape, dtype, BOTH, divergence=divergence, softcap=softcap, **HARD)
      for shape in ((5,), (1, 1), (3, 2), (5, 16), (4, 65), (3, 2049), (2, 6151), (2, 3, 5, 7), (2, 20001))
      for dtype in (F32, BF16)
      for divergence, softcap in zip(DIVERGENCES, SOFTCAPS, strict=True)),
    *(case((6, 37), dtype, BOTH, layout=layout, softcap=SOFTCAPS[1], **HARD)
      for layout in harness.LAYOUTS[1:] for dtype in (F32, BF16)),
    case((6, 37), BF16, BOTH, teacher_dtype=F32, softcap=SOFTCAPS[1], **HARD),
]  # fmt: skip
LAID_OUT = [
    case(shape, dtype, BOTH, layout=layout, **HARD)
    for layout in harness.LAYOUTS[1:]
    for shape in ((6, 37), (3, 5, 4, 18))
    for dtype in (F32, BF16)
]
MIXED = [
    case((6, 37), student, BOTH, teacher_dtype=teacher, **HARD)
    for student, teacher in ((BF16, F32), (F32, BF16), (BF16, F16))
]
SMALL = [
    case((4, 5), F64, BOTH, small=True, scale=0.1, divergence=divergence, **options)
    for divergence in DIVERGENCES
    for options in (
        {"temperature": 2.0},
        {**HARD, "reduction": "none"},
        {**HARD, "ignore_index": 1},
        {**HARD, "softcap": (0.5, 0.2)},
        {"softcap": (None, 0.3)},
    )
]


def registered():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5, dtype=BF16)
    target, rows = torch.tensor([[0, 1, -100], [2, 3, 4]]), torch.rand(2, 3)
    options = (target, rows, 2.0, "js", 0.3, 0.5, -100, 0.1, 30.0, None)
    strided = student.transpose(0, 1).contiguous().transpose(0, 1)
    seconds = [
        (ops.TRITON.second, (student, None, rows, strided, teacher, *options, [True, False])),
        (ops.TRITON.second, (student, teacher, rows, student, teacher, *options, [True, True])),
    ]
    return seconds + [
        call
        for made in (ops.NATIVE, ops.TRITON)
        for call in (
            (made.forward, (student, teacher, *options)),
            (made.backward, (rows, student, teacher, *options, [True, True])),
            (made.backward, (rows, strided, teacher, *options, [True, False])),
            (made.step, (student, teacher, *options, True, [True, False])),
        )
    ]


LOSS = harness.Loss(
    tlk.distillation,
    pytorch,
    [*OPTIONS, *GRID, *CAPPED, *LAID_OUT, *MIXED, *SMALL],
    tlk.DistillationLoss,
    registered,
)
OPTIONS_OF_MODULE = {"temperature": 2.0, "divergence": "reverse_kl", "beta": 0.3, "hard_weight": 0.9, "ignore_index": 1,
                     "label_smoothing": 0.2, "softcap": 0.5, **SUM}  # fmt: skip
BASE_OF_MODULE = {"divergence": "js", "hard_weight": 0.5}
MODULE = ModuleCase(tlk.DistillationLoss, tlk.distillation, (X, X.flip(0), Y), OPTIONS_OF_MODULE, BASE_OF_MODULE)
