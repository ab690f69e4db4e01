"""Cases of linear distillation, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from distillation_cases import BASE_OF_MODULE, BF16, DIVERGENCES, F16, F32, F64, HARD, OPTIONS_OF_MODULE, SOFTCAPS
from distillation_cases import pytorch as distillation
from module_case import A, B, ModuleCase, V, W, Y

import tlkernels as tlk
from tlkernels.losses.linear_distillation import ops

LAYERS = ("student_input", "student_weight", "student_bias", "teacher_input", "teacher_weight", "teacher_bias")


def pytorch(student_input, student_weight, teacher_input, teacher_weight, target=None, *, student_bias=None,
            teacher_bias=None, **options):  # fmt: skip
    """The PyTorch lines of the docstring."""
    student = F.linear(student_input, student_weight, student_bias)
    return distillation(student, F.linear(teacher_input, teacher_weight, teacher_bias), target, **options)


def make(rows, classes, dtype, teacher_dtype=None, bias=True, layout="contiguous", target=False, weighted=False,
         depths=(5, 7), **options):  # fmt: skip
    """Return a function of the seed that gives the arguments."""

    def arguments(seed):
        generator = harness.generator(seed)
        given = {}
        for side, depth, kind in (("student", depths[0], dtype), ("teacher", depths[1], teacher_dtype or dtype)):
            input = torch.randn(*rows, depth, generator=generator, dtype=F64)
            weight = torch.randn(classes, depth, generator=generator, dtype=F64) / depth**0.5
            given[f"{side}_input"] = harness.lay_out(input.to(kind), layout)
            given[f"{side}_weight"] = harness.lay_out(weight.to(kind), layout)
            if bias:
                given[f"{side}_bias"] = torch.randn(classes, generator=generator, dtype=F64).to(kind)
        if target:
            given["target"] = harness.class_indices(rows, classes, generator, options.get("ignore_index", -100))
        if weighted:
            given["row_weight"] = torch.rand(rows, generator=generator).to(dtype)
        return {**given, **options}

    return arguments


def case(rows, classes, dtype=F32, wants_grad=LAYERS, small=False, **options):
    words = ["x".join(map(str, rows)), str(classes), str(dtype).removeprefix("torch.")]
    words += [f"{name}={value}" for name, value in options.items()]
    words += ["all" if len(wants_grad) > 2 else "+".join(wants_grad)]
    promoted = torch.promote_types(dtype, options.get("teacher_dtype") or dtype)
    return harness.LossCase("-".join(words), promoted, make(rows, classes, dtype, **options), wants_grad, small)


WITHOUT_BIAS = tuple(name for name in LAYERS if "bias" not in name)
CASES = [
    *(case((6,), 37, dtype, wants, divergence=divergence, **options)
      for divergence in DIVERGENCES
      for dtype in (F64, F32, BF16)
      for wants, options in ((LAYERS[:2], {"temperature": 2.0}), (LAYERS, HARD), (LAYERS[4:5], {"reduction": "none"}))),
    *(case(rows, classes, dtype) for rows, classes in (((), 5), ((1,), 1), ((2, 3), 129), ((9,), 2049))
      for dtype in (F32, F16)),
    case((6,), 37, F32, WITHOUT_BIAS, bias=False, **HARD),
    *(case((6,), 37, dtype, divergence=divergence, softcap=softcap, **options)
      for divergence in DIVERGENCES for dtype in (F64, F32, BF16)
      for softcap, options in zip(SOFTCAPS, (HARD, {"temperature": 2.0}, HARD, {"reduction": "none"}), strict=True)),
    *(case(rows, classes, dtype, softcap=softcap, **HARD)
      for rows, classes in (((), 5), ((1,), 1), ((2, 3), 129), ((9,), 2049))
      for dtype, softcap in ((F32, 2.0), (F16, (None, 2.0)))),
    *(case((6,), 37, dtype, layout=layout) for dtype in (F32, BF16) for layout in ("transposed", "sliced")),
    *(case((6,), 37, student, WITHOUT_BIAS[:2], teacher_dtype=teacher, **HARD)
      for student, teacher in ((BF16, F32), (F32, BF16))),
    *(case((3,), 4, F64, small=True, divergence=divergence, **options)
      for divergence in DIVERGENCES
      for options in ({"temperature": 2.0}, {**HARD, "reduction": "none"}, {**HARD, "softcap": (1.0, 2.0)})),
]  # fmt: skip


def registered():
    given = make((2, 3), 5, F32, BF16)(0)
    layers = [given[name] for name in LAYERS]
    rows = torch.rand(2, 3)
    options = (torch.tensor([[0, 1, -100], [2, 3, 4]]), rows, 2.0, "js", 0.3, 0.5, -100, 0.1, 30.0, None)
    needs = [True, True, True, False, True, False]
    return [
        call
        for each in (ops.NATIVE, ops.TRITON)
        for call in (
            (each.forward, (*layers, *options)),
            (each.backward, (rows, *layers, *options, needs)),
            (each.step, (*layers[:2], None, *layers[3:5], None, *options, True, [*needs[:2], *[False] * 4])),
        )
    ]


LOSS = harness.Loss(tlk.linear_distillation, pytorch, CASES, tlk.LinearDistillationLoss, registered, rowwise=False)
MODULE = ModuleCase(
    tlk.LinearDistillationLoss, tlk.linear_distillation, (A, W, B, V, Y), OPTIONS_OF_MODULE, BASE_OF_MODULE
)
