"""Cases of top-k distillation, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import itertools
import math

import harness
import torch
import torch.nn.functional as F
from distillation_cases import DIVERGENCES, divergence_of
from module_case import SUM, ModuleCase, X, Y

import tlkernels as tlk

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TAILS = ("bucket", "renormalize", "ignore")


def pytorch(student_logits, teacher_index, teacher_log_probs, target=None, *, temperature=1.0, divergence="forward_kl",
            beta=0.5, tail="bucket", hard_weight=0.0, ignore_index=-100, row_weight=None, reduction="mean",
            softcap=None):  # fmt: skip
    """The PyTorch lines of the docstring, in the dtypes of the arguments."""

    def with_rest(log_probs):
        return torch.cat([log_probs, torch.log1p(-log_probs.exp().sum(-1, keepdim=True))], -1)

    x = student_logits if softcap is None else softcap * torch.tanh(student_logits / softcap)
    none, index = teacher_index < 0, teacher_index.clamp(min=0).long()
    log_p = (x / temperature).log_softmax(-1).gather(-1, index).masked_fill(none, -math.inf)
    if tail == "renormalize":
        log_q, log_p = (teacher_log_probs / temperature).log_softmax(-1), log_p.log_softmax(-1)
    else:
        log_q, log_p = (with_rest(teacher_log_probs) / temperature).log_softmax(-1), with_rest(log_p)
        if tail == "ignore":
            log_q, log_p = log_q[..., :-1], log_p[..., :-1]
    rows = (1 - hard_weight) * temperature**2 * divergence_of(log_q, log_p, divergence, beta)
    count = rows.numel()
    if hard_weight:
        flat = x.reshape(-1, x.shape[-1])
        hard = F.cross_entropy(flat, target.reshape(-1).long(), reduction="none", ignore_index=ignore_index)
        rows = rows + hard_weight * hard.view(target.shape)
    if row_weight is not None:
        rows = rows * row_weight
    if target is not None:
        ignored = target == ignore_index
        rows, count = rows.masked_fill(ignored, 0), (~ignored).sum()
    return {"none": lambda: rows, "sum": rows.sum}.get(reduction, lambda: rows.sum() / count)()


def teacher(rows, classes, kept, dtype, generator, ragged=False, low=0.0):
    """Return index and log-probabilities of the classes that a teacher kept; with `ragged`, the last ones are left out.

    `low` is subtracted from the log-probabilities: vmap's test takes half of them, which must not have a sum over 1.
    The rest of a distribution stays far above the rounding error of bfloat16.
    """
    log_q = torch.randn(*rows, classes, generator=generator, dtype=F64).log_softmax(-1)
    values, index = log_q.topk(kept, -1)
    if ragged:
        left = torch.arange(kept) >= torch.randint(1, kept + 1, (*rows, 1), generator=generator)
        index, values = index.masked_fill(left, -1), values.masked_fill(left, -math.inf)
    return index, (values - low).to(dtype)


def others(rows, classes, dtype, generator, target, weighted, options):
    """Return the arguments besides the student and the teacher."""
    given = {}
    if target:
        given["target"] = harness.class_indices(rows, classes, generator, options.get("ignore_index", -100))
    if weighted:
        given["row_weight"] = torch.rand(rows, generator=generator).to(dtype)
        given["row_weight"].view(-1)[::4] = 0
    return {**given, **options}


def make(shape, kept, dtype, teacher_dtype=None, layout="contiguous", target=False, weighted=False, ragged=False,
         low=0.0, **options):  # fmt: skip
    """Return a function of the seed that gives the arguments."""

    def arguments(seed):
        generator = harness.generator(seed)
        rows, classes = shape[:-1], shape[-1]
        student = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        index, log_probs = teacher(rows, classes, kept, teacher_dtype or dtype, generator, ragged, low)
        given = {"student_logits": harness.lay_out(student, layout), "teacher_index": index}
        given["teacher_log_probs"] = harness.lay_out(log_probs, layout)
        return {**given, **others(rows, classes, dtype, generator, target, weighted, options)}

    return arguments


BOTH = ("student_logits", "teacher_log_probs")


def case(shape, kept, dtype=F32, wants_grad=BOTH[:1], small=False, **options):
    words = ["x".join(map(str, shape)), f"K={kept}", str(dtype).removeprefix("torch.")]
    words += [f"{name}={value}" for name, value in options.items()] + ["both"] * (len(wants_grad) > 1)
    promoted = torch.promote_types(dtype, options.get("teacher_dtype") or dtype)
    return harness.LossCase("-".join(words), promoted, make(shape, kept, dtype, **options), wants_grad, small)


HARD = {"target": True, "weighted": True, "hard_weight": 0.3}
WARM = {"temperature": 2.0}

CASES = [
    *(
        case((6, 37), 5, dtype, divergence=divergence, tail=tail, **options)
        for divergence, tail, (dtype, options) in itertools.product(
            DIVERGENCES,
            TAILS,
            (
                (F64, {**HARD, **WARM, "ragged": True}),
                (F32, {**HARD, "softcap": 3.0}),
                (F32, {**WARM, "ragged": True, "reduction": "none"}),
                (BF16, {**HARD, "reduction": "sum"}),
                (F16, WARM),
            ),
        )
    ),
    *(
        case(shape, kept, dtype, **HARD, ragged=True)
        for shape, kept in (((5,), 2), ((1, 3), 1), ((7, 16), 15), ((2, 3, 5, 7), 3), ((3, 2049), 64))
        for dtype in (F32, BF16)
    ),
    *(case((6, 37), 5, dtype, layout=layout, **HARD) for layout in harness.LAYOUTS[1:3] for dtype in (F32, BF16)),
    *(
        case((6, 37), 5, student, teacher_dtype=stored, **HARD)
        for student, stored in ((BF16, F32), (F32, F16), (BF16, F16))
    ),
    *(
        case((6, 37), 5, F32, BOTH, divergence=divergence, tail=tail, **WARM)
        for divergence in DIVERGENCES
        for tail in TAILS
    ),
    *(
        case((4, 6), 3, F64, BOTH, small=True, low=2.0, divergence=divergence, tail=tail, **options)
        for divergence, tail, options in (
            ("forward_kl", "bucket", {**HARD, **WARM, "ragged": True, "reduction": "none"}),
            ("reverse_kl", "renormalize", HARD),
            ("js", "bucket", {**WARM, "beta": 0.3, "softcap": 3.0}),
            ("tv", "ignore", {**HARD, "ignore_index": 1}),
        )
    ),
]

LOSS = harness.Loss(tlk.topk_distillation, pytorch, CASES, tlk.TopkDistillationLoss, cuda="selective_log_softmax")
KEPT = torch.tensor([[0, 1, 2], [2, 1, 4], [3, 0, 4], [1, 2, 3], [0, 3, 4], [4, 2, 0]])
STORED = X.flip(0).log_softmax(-1).gather(1, KEPT)
OPTIONS_OF_MODULE = {"temperature": 2.0, "divergence": "reverse_kl", "beta": 0.3, "tail": "renormalize",
                     "hard_weight": 0.9, "ignore_index": 1, "softcap": 1.5, **SUM}  # fmt: skip
BASE_OF_MODULE = {"divergence": "js", "hard_weight": 0.5}
MODULE = ModuleCase(
    tlk.TopkDistillationLoss, tlk.topk_distillation, (X, KEPT, STORED, Y), OPTIONS_OF_MODULE, BASE_OF_MODULE
)
