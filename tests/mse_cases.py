"""Cases of mse, and the PyTorch line that it replaces, which in float64 is the oracle."""

from functools import partial

import harness
import torch
import torch.nn.functional as F
from module_case import SUM, A, B, ModuleCase

import tlkernels as tlk
from tlkernels.losses.mse import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def pytorch(input, target, *, weight=None, reduction="mean"):
    """The PyTorch line of the docstring."""
    return F.mse_loss(input, target, reduction=reduction, weight=weight)


def make(shape, dtype, weighted, layout, options, seed):
    """Return the arguments."""
    generator = harness.generator(seed)

    def draw():
        return harness.lay_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)

    arguments = {"input": draw(), "target": draw()}
    if weighted:
        arguments["weight"] = draw().abs()
    return arguments | options


def case(shape, dtype=F32, weighted=False, layout="contiguous", small=False, wants=("input", "target"), **options):
    words = ["x".join(map(str, shape)), str(dtype).removeprefix("torch.")] + ["weighted"] * weighted
    words += [layout] * (layout != "contiguous") + ["+".join(wants)] * (len(wants) < 2)
    words += [f"{name}={value}" for name, value in options.items()]
    return harness.LossCase(
        "-".join(words), dtype, partial(make, shape, dtype, weighted, layout, options), wants, small
    )


# One element; less than a vector; an odd number; a block of the kernel and one less and more; several blocks.
SHAPES = [(), (1,), (3,), (7, 37), (1, 4095), (4096,), (4097,), (20, 1001)]


def cases(shapes, **options):
    """Return the cases of mse, or with rmse's `options` those of rmse."""
    return [
        *(
            case(shape, dtype, weighted, reduction=reduction, **options)
            for shape in shapes
            for dtype in (F64, F32, BF16, F16)
            for weighted, reduction in ((False, "mean"), (True, "mean"), (False, "sum"), (True, "none"))
        ),
        *(
            case((3, 5, 4, 18), dtype, True, layout, **options)
            for dtype in (F32, BF16)
            for layout in harness.LAYOUTS[1:]
        ),
        case((9, 37), F32, wants=("input",), **options),
        case((9, 37), F32, True, wants=("target",), reduction="none", **options),
        case((3, 4), F64, small=True, **options),
        case((3, 4), F64, True, small=True, reduction="none", **options),
    ]


def op_calls():
    """Return each op with arguments, for opcheck."""
    calls = []
    for weight in (None, torch.rand(3, 5)):
        tensors = torch.randn(3, 5), torch.randn(3, 5), weight
        for made, divided in ((ops.NATIVE, (3.0,)), (ops.TRITON, (torch.tensor(2.0), 0.5))):
            calls += [
                (made.forward, tensors),
                (made.total, tensors),
                (made.backward, (torch.rand(3, 5), *tensors, [True, False])),
                (made.backward, (torch.rand(()), *tensors, [True, True])),
                (made.step, (*tensors, *divided, [False, True])),
            ]
    return calls


LOSS = harness.Loss(tlk.mse, pytorch, cases(SHAPES), tlk.MSELoss, op_calls)
MODULE = ModuleCase(tlk.MSELoss, tlk.mse, (A, B), SUM)
