"""Cases of linear cross entropy, and the PyTorch lines that it replaces, which in float64 are the oracle."""

from functools import partial
from math import prod

import cross_entropy_cases
import harness
import torch
import torch.nn.functional as F
from module_case import A, ModuleCase, Y

import tlkernels as tlk
from tlkernels.losses.linear_cross_entropy import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LAYER = ("input", "linear_weight", "linear_bias")


def pytorch(input, linear_weight, target, *, linear_bias=None, weight=None, row_weight=None, **options):
    """The PyTorch lines of the docstring, in the dtype of the input."""
    rows, classes = input.shape[:-1], linear_weight.shape[0]
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, classes)
    if target.is_floating_point():
        target, weight = target.to(input.dtype), weight if weight is None else weight.to(input.dtype)
    target = target.reshape(-1, classes) if target.is_floating_point() else target.reshape(-1)
    row_weight = row_weight if row_weight is None else row_weight.reshape(-1)
    loss = cross_entropy_cases.pytorch(logits, target, weight, row_weight=row_weight, **options)
    return loss.reshape(rows) if options.get("reduction") == "none" else loss


def make(rows, features, classes, dtype, target, biased, weighted, options, seed):
    """Return the arguments: an input of shape (*rows, features), and a layer with logits of a trained one's size."""
    generator = harness.generator(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    arguments = {
        "input": draw(*rows, features).to(dtype),
        "linear_weight": (2 * draw(classes, features) / max(1, features) ** 0.5).to(dtype),
        "linear_bias": draw(classes).to(dtype) if biased else None,
    }
    if target == "indices":
        arguments["target"] = torch.randint(0, classes, rows, generator=generator)
        if prod(rows) > 2:
            ignored = torch.rand(rows, generator=generator) < 0.2
            ignored.view(-1)[0] = False
            arguments["target"] = arguments["target"].masked_fill(ignored, options.get("ignore_index", -100))
    else:
        arguments["target"] = draw(*rows, classes).softmax(-1).to(F32 if target == "probabilities32" else dtype)
    if weighted:
        arguments["weight"] = torch.rand(classes, generator=generator).to(dtype)
    if "row_weight" in options:  # some 0, some negative
        options = options | {"row_weight": (torch.randint(-2, 5, rows, generator=generator) * 0.375).to(dtype)}
    return arguments | options


def case(
    rows,
    features,
    classes,
    dtype=F32,
    target="indices",
    biased=False,
    weighted=False,
    small=False,
    large=False,
    by_row_weight=False,
    **options,
):
    words = ["x".join(map(str, (*rows, features, classes))), str(dtype).removeprefix("torch."), target]
    words += ["biased"] * biased + ["weighted"] * weighted + [f"{name}={value}" for name, value in options.items()]
    return harness.LossCase(
        "-".join(words),
        dtype,
        partial(make, rows, features, classes, dtype, target, biased, weighted, options),
        (LAYER if biased else LAYER[:2]) + ("row_weight",) * by_row_weight,
        small,
        large,
    )


def same(result, expected, **tolerance):
    torch.testing.assert_close(result, expected, **{"rtol": 1e-10, "atol": 1e-12, "equal_nan": True} | tolerance)


def call(rows=(6,), features=5, classes=37, dtype=F64, target="indices", weighted=False, seed=0, **options):
    """Return the arguments of a call with a bias; input, weight and bias are leaves."""
    arguments = make(rows, features, classes, dtype, target, True, weighted, options, seed)
    return arguments | {name: arguments[name].requires_grad_() for name in LAYER}


def layer(arguments):
    return tuple(arguments[name] for name in LAYER)


def dense(function, arguments, **more):
    """Make the same call of a loss that takes logits."""
    options = dict(arguments)
    input, linear_weight, linear_bias, target = (options.pop(name) for name in (*LAYER, "target"))
    weight = options.pop("weight", None)
    return function(F.linear(input, linear_weight, linear_bias), target, weight, **options, **more)


MIXED = {"label_smoothing": 0.1, "softcap": 8.0, "temperature": 1.5, "z_loss": 1e-3}
CASES = [
    # A single row has 17 features: with 5, eager's error in 16 bits would be a matter of luck.
    *(
        case(rows, features, classes, dtype, target, biased, weighted, **options)
        for rows, features, classes in (((), 17, 9), ((1,), 3, 1), ((7,), 1, 2), ((2, 5), 16, 37), ((300,), 48, 257))
        for dtype in (F64, F32, BF16, F16)
        for target, biased, weighted, options in (
            ("indices", False, False, {}),
            ("indices", True, True, MIXED | {"reduction": "none"}),
            ("probabilities", True, False, {"reduction": "sum"}),
        )
    ),
    case((9,), 8, 37, BF16, "probabilities32", True, True, **MIXED),
    *(case((30,), 17, 37, dtype, biased=True, row_weight=True) for dtype in (F64, F32, BF16, F16)),
    case((3, 8), 17, 37, F32, weighted=True, by_row_weight=True, row_weight=True, **MIXED),
    case((30,), 17, 37, F32, "probabilities", row_weight=True, reduction="none"),
    # Three tiles of the weight.
    case((5,), 2000, 1500, BF16, biased=True),
    case((5,), 2000, 1500, F16, "probabilities"),
    # Two chunks, and a number of classes that is prime and over 2**16.
    case((500,), 3, 70001, F32, biased=True, weighted=True, large=True, **MIXED | {"reduction": "none"}),
    case((500,), 3, 70001, BF16, biased=True, large=True),
    case((4,), 3, 5, F64, biased=True, small=True),
    case((2, 2), 2, 3, F64, biased=True, weighted=True, small=True, **MIXED),
    case((4,), 2, 3, F64, small=True, by_row_weight=True, row_weight=True, **MIXED),
    case((3,), 2, 4, F64, "probabilities", small=True, reduction="sum", **MIXED),
    case((), 3, 4, F64, small=True),
]


class Module(tlk.LinearCrossEntropyLoss):
    """The module, with a given layer."""

    def __init__(self, linear_weight, linear_bias=None, **options):
        classes, features = linear_weight.shape
        super().__init__(features, classes, bias=linear_bias is not None, dtype=linear_weight.dtype, **options)
        with torch.no_grad():
            self.linear.weight.copy_(linear_weight)
            if linear_bias is not None:
                self.linear.bias.copy_(linear_bias)


def op_calls():
    """Return each op with arguments, for opcheck."""
    calls = []
    for target in (torch.tensor([0, -100, 4]), torch.randn(3, 5).softmax(1)):
        layer = torch.randn(3, 2), torch.randn(5, 2), torch.randn(5)
        options = torch.rand(5), -100, 0.1, 2.0, 3.0, 0.01, None
        w, num_valid = torch.tensor([1.0, 2.0, 0.0]), 3 if target.is_floating_point() else 2
        g, peak, log_sum, entropy = torch.rand(4, 3)
        for each in (ops.NATIVE, ops.TRITON):
            for rows in ((None, None), (w, num_valid)):
                call = (*layer, target, *options, *rows)
                calls += [
                    (each.forward, call),
                    (each.forward_stats, call),
                    (each.backward, (g, g, g, *layer, target, peak, log_sum, entropy, *options, *rows, [True] * 3)),
                    (each.backward, (g, None, None, *layer[:2], None, target, peak, log_sum, None, *options, *rows,
                                     [True, False, False])),
                    (each.step, (*call, True, [False, True, False])),
                    (each.step, (*call, False, [True, True, True])),
                ]  # fmt: skip
    return calls


LOSS = harness.Loss(tlk.linear_cross_entropy, pytorch, CASES, Module, op_calls, rowwise=False)
MODULE = ModuleCase(
    tlk.LinearCrossEntropyLoss,
    tlk.linear_cross_entropy,
    (A, Y),
    cross_entropy_cases.OPTIONS_OF_MODULE,
    {"in_features": 4, "num_classes": 5},
)
