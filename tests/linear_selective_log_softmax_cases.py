"""Cases of linear_selective_log_softmax, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from selective_log_softmax_cases import BENT, BF16, ENTROPY, F16, F32, F64, joined
from selective_log_softmax_cases import pytorch as dense

import tlkernels as tlk
from tlkernels.losses.linear_selective_log_softmax import ops

LAYER = ("input", "linear_weight", "linear_bias")


def function(input, linear_weight, index, *, linear_bias=None, temperature=1.0, softcap=None, return_entropy=False,
             impl="auto"):  # fmt: skip
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": return_entropy, "impl": impl}
    results = tlk.linear_selective_log_softmax(input, linear_weight, index, linear_bias=linear_bias, **options)
    return joined(results, index, input)


def pytorch(input, linear_weight, index, *, linear_bias=None, **options):
    """The PyTorch lines of the docstring, in the dtype of the input."""
    return dense(F.linear(input, linear_weight, linear_bias), index, **options)


def make(rows, features, classes, selected, dtype, biased=False, layout="contiguous", **options):
    """Return a function of the seed that gives the arguments; `selected` is K, or 0 for an index of shape (...)."""

    def arguments(seed):
        generator = harness.generator(seed)
        input = torch.randn(*rows, features, generator=generator, dtype=F64).to(dtype)
        weight = (2 * torch.randn(classes, features, generator=generator, dtype=F64) / features**0.5).to(dtype)
        bias = torch.randn(classes, generator=generator, dtype=F64).to(dtype)
        return {
            "input": harness.lay_out(input, layout),
            "linear_weight": harness.lay_out(weight, layout),
            "index": torch.randint(0, classes, (*rows, selected) if selected else rows, generator=generator),
            **({"linear_bias": bias} if biased else {}),
            **options,
        }

    return arguments


def case(rows, features, classes, selected, dtype=F32, biased=False, small=False, large=False, **options):
    words = ["x".join(map(str, (*rows, features, classes))), f"K={selected}", str(dtype).removeprefix("torch.")]
    words += ["biased"] * biased + [f"{name}={value}" for name, value in options.items()]
    arguments = make(rows, features, classes, selected, dtype, biased, **options)
    return harness.LossCase("-".join(words), dtype, arguments, LAYER if biased else LAYER[:2], small, large)


CASES = [
    *(
        case(rows, features, classes, selected, dtype, biased, **options)
        for rows, features, classes in (((), 17, 9), ((1,), 3, 1), ((7,), 1, 2), ((2, 5), 16, 37), ((300,), 48, 257))
        for dtype in (F64, F32, BF16, F16)
        for selected, biased, options in (
            (0, False, ENTROPY), (3, True, {}), (2, True, {"temperature": 1.5, "softcap": 8.0, **ENTROPY}),
        )
    ),
    *(case((6,), 16, 37, 3, dtype, layout=layout) for dtype in (F32, BF16) for layout in ("transposed", "sliced")),
    # Three tiles of the weight.
    case((5,), 2000, 1500, 4, BF16, biased=True, **ENTROPY),
    # Two chunks, and a number of classes that is prime and over 2**16.
    case((500,), 3, 70001, 2, F32, biased=True, large=True, **BENT, **ENTROPY),
    case((4,), 3, 5, 0, F64, biased=True, small=True, **ENTROPY),
    case((2, 2), 2, 3, 2, F64, biased=True, small=True, temperature=2.0, softcap=3.0, return_entropy=True),
]  # fmt: skip


def op_calls():
    """Return each op with arguments, for opcheck."""
    calls = []
    layer = torch.randn(3, 2), torch.randn(5, 2), torch.randn(5)
    index = torch.tensor([[0, 4, 4], [-1, -1, -1], [2, -1, 1]])
    g, row = torch.randn(3, 3), torch.rand(3)
    for each in (ops.NATIVE, ops.TRITON):
        calls += [
            (each.forward, (*layer, index, 2.0, 3.0, True)),
            (each.forward, (*layer[:2], None, index, 1.0, None, False)),
            (each.backward, (g, row, *layer, index, row, row, row, 2.0, 3.0, [True, True, True])),
            (each.backward, (g, None, *layer[:2], None, index, row, row, row[:0], 1.0, None, [True, False, False])),
        ]
    return calls


LOSS = harness.Loss(function, pytorch, CASES, None, op_calls, rowwise=False)
