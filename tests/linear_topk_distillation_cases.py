"""Cases of linear top-k distillation, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from module_case import A, ModuleCase, W, Y
from topk_distillation_cases import (
    BASE_OF_MODULE,
    BF16,
    DIVERGENCES,
    F16,
    F32,
    F64,
    HARD,
    KEPT,
    OPTIONS_OF_MODULE,
    STORED,
    TAILS,
    WARM,
    others,
    teacher,
)
from topk_distillation_cases import pytorch as dense

import tlkernels as tlk

LAYER = ("student_input", "student_weight", "student_bias")


def pytorch(student_input, student_weight, teacher_index, teacher_log_probs, target=None, *, student_bias=None,
            **options):  # fmt: skip
    """The PyTorch lines of the docstring."""
    logits = F.linear(student_input, student_weight, student_bias)
    return dense(logits, teacher_index, teacher_log_probs, target, **options)


def make(rows, features, classes, kept, dtype, teacher_dtype=None, target=False, weighted=False, ragged=False, low=0.0,
         **options):  # fmt: skip
    """Return a function of the seed that gives the arguments."""

    def arguments(seed):
        generator = harness.generator(seed)
        weight = torch.randn(classes, features, generator=generator, dtype=F64) / features**0.5
        index, log_probs = teacher(rows, classes, kept, teacher_dtype or dtype, generator, ragged, low)
        return {
            "student_input": torch.randn(*rows, features, generator=generator, dtype=F64).to(dtype),
            "student_weight": weight.to(dtype),
            "student_bias": (0.3 * torch.randn(classes, generator=generator, dtype=F64)).to(dtype),
            "teacher_index": index,
            "teacher_log_probs": log_probs,
            **others(rows, classes, dtype, generator, target, weighted, options),
        }

    return arguments


def case(rows, features, classes, kept, dtype=F32, wants_grad=LAYER, small=False, **options):
    words = ["x".join(map(str, (*rows, features, classes))), f"K={kept}", str(dtype).removeprefix("torch.")]
    words += [f"{name}={value}" for name, value in options.items()]
    promoted = torch.promote_types(dtype, options.get("teacher_dtype") or dtype)
    arguments = make(rows, features, classes, kept, dtype, **options)
    return harness.LossCase("-".join(words), promoted, arguments, wants_grad, small)


CASES = [
    *(
        case((6,), 16, 37, 5, dtype, divergence=divergence, tail=tail, **options)
        for divergence, tail, dtype, options in zip(
            DIVERGENCES * 3,
            [tail for tail in TAILS for _ in DIVERGENCES],
            (F64, F32, BF16, F16) * 3,
            ({**HARD, "ragged": True}, {**HARD, **WARM}, {"reduction": "none"}, {**WARM, "softcap": 3.0}) * 3,
            strict=True,
        )
    ),
    *(
        case(rows, features, classes, kept, dtype, **HARD)
        for rows, features, classes, kept in (((), 17, 9, 2), ((1,), 3, 2, 1), ((2, 5), 8, 257, 32))
        for dtype in (F32, BF16)
    ),
    case((6,), 16, 37, 5, BF16, teacher_dtype=F32, **HARD),
    *(
        case((3,), 3, 5, 2, F64, (*LAYER, "teacher_log_probs"), small=True, low=2.0, divergence=divergence, **options)
        for divergence, options in (("forward_kl", {**HARD, **WARM}), ("js", {"tail": "ignore", "reduction": "none"}))
    ),
]

LOSS = harness.Loss(
    tlk.linear_topk_distillation,
    pytorch,
    CASES,
    tlk.LinearTopkDistillationLoss,
    rowwise=False,
    cuda="linear_selective_log_softmax",
)
MODULE = ModuleCase(
    tlk.LinearTopkDistillationLoss,
    tlk.linear_topk_distillation,
    (A, W, KEPT, STORED, Y),
    OPTIONS_OF_MODULE,
    BASE_OF_MODULE,
)
