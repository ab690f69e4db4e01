"""Cases of selective_log_softmax, and the PyTorch lines that it replaces, which in float64 are the oracle."""

from functools import partial

import harness
import torch

import tlkernels as tlk
from tlkernels.losses.selective_log_softmax import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def joined(results, index, logits):
    """Return one tensor of log-probabilities and entropy, the entropy as another class of each row."""
    if not isinstance(results, tuple):
        return results
    log_probs, entropy = results
    log_probs = log_probs.unsqueeze(-1) if index.dim() < logits.dim() else log_probs
    return torch.cat([log_probs, entropy.unsqueeze(-1)], -1)


def function(logits, index, *, temperature=1.0, softcap=None, return_entropy=False, impl="auto"):
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": return_entropy, "impl": impl}
    return joined(tlk.selective_log_softmax(logits, index, **options), index, logits)


def lines(logits, index, *, temperature=1.0, softcap=None, return_entropy=False):
    """The PyTorch lines of the docstring, in the dtype of the logits."""
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = (x / temperature).log_softmax(-1)
    if index.dim() < logits.dim():
        log_probs = torch.gather(log_p, -1, index.long().unsqueeze(-1)).squeeze(-1)
    else:
        log_probs = torch.gather(log_p, -1, index.long())
    if not return_entropy:
        return log_probs
    p = log_p.exp()
    return log_probs, -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def pytorch(logits, index, **options):
    return joined(lines(logits, index, **options), index, logits)


def make(shape, selected, dtype, layout="contiguous", index_dtype=torch.int64, **options):
    """Return a function of the seed that gives the arguments; `selected` is K, or 0 for an index of shape (...)."""

    def arguments(seed):
        generator = harness.generator(seed)
        logits = harness.lay_out(harness.logits(shape, dtype, generator, len(shape) - 1), layout)
        rows = (*shape[:-1], selected) if selected else shape[:-1]
        index = torch.randint(0, shape[-1], rows, generator=generator).to(index_dtype)
        return {"logits": logits, "index": index, **options}

    return arguments


def case(shape, selected, dtype=F32, small=False, **options):
    words = ["x".join(map(str, shape)), f"K={selected}", str(dtype).removeprefix("torch.")]
    words += [f"{name}={str(value).removeprefix('torch.')}" for name, value in options.items()]
    return harness.LossCase("-".join(words), dtype, make(shape, selected, dtype, **options), ("logits",), small)


ENTROPY = {"return_entropy": True}
BENT = {"temperature": 0.7, "softcap": 20.0}
# One class; less than a vector; whole vectors; odd; a block and one more; several blocks; many.
SHAPES = [(5,), (1, 1), (7, 1), (3, 2), (5, 16), (4, 65), (9, 129), (3, 2049), (2, 6151), (2, 3, 5, 7), (2, 65537)]
CASES = [
    *(
        case(shape, selected, dtype, **options)
        for shape in SHAPES
        for dtype in ((F64, F32, BF16, F16) if shape[-1] < 10000 else (F32, BF16))
        for selected, options in ((0, ENTROPY), (3, {}), (1, BENT), (5, {**BENT, **ENTROPY}))
    ),
    # More selected classes than classes, and many.
    case((4, 5), 40, F32, **ENTROPY),
    case((3, 300), 130, BF16, **ENTROPY),
    *(
        case(shape, 3, dtype, layout=layout, **ENTROPY)
        for layout in harness.LAYOUTS[1:]
        for shape in ((6, 37), (3, 5, 4, 18))
        for dtype in (F32, BF16)
    ),
    *(case((6, 100), 2, F32, index_dtype=kind) for kind in (torch.int32, torch.int8, torch.uint8, torch.uint16)),
    *(case((4, 5), selected, F64, small=True, **options)
      for selected, options in ((0, ENTROPY), (3, {}), (3, {"temperature": 2.0, "softcap": 3.0, **ENTROPY}))),
]  # fmt: skip


def op_calls():
    """Return each op with arguments, for opcheck."""
    calls, draw = [], partial(torch.randn, 3)
    strided = torch.randn(5, 3).T
    index = torch.tensor([[0, 4, 4], [-1, -1, -1], [2, -1, 1]])
    empty = torch.empty(0)
    for each in (ops.NATIVE, ops.TRITON):
        for logits in (draw(5), draw(5).to(BF16), strided):
            entropy = torch.rand(3)
            calls += [
                (each.forward, (logits, index, 2.0, 3.0, True)),
                (each.forward, (logits, index, 1.0, None, False)),
                (each.backward, (draw(3), draw(), logits, index, draw(), draw(), entropy, 2.0, 3.0)),
                (each.backward, (draw(3), None, logits, index, draw(), draw(), empty, 1.0, None)),
            ]
    return calls


LOSS = harness.Loss(function, pytorch, CASES, None, op_calls)
