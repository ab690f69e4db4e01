"""Cases of the sigmoid contrastive loss, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from info_nce_cases import DTYPES, F32, F64, embeddings
from module_case import A, B, ModuleCase

import tlkernels as tlk
from tlkernels.losses.sigmoid_contrastive import ops


def pytorch(query, key, *, logit_scale, logit_bias):
    """The PyTorch lines of the docstring, in the dtype of the query."""
    logits = query @ key.T * logit_scale + logit_bias
    sign = 2 * torch.eye(len(query), dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(query)


def case(n, d, dtype, *, tensor=True, small=False, bias=-10.0):
    def make(seed):
        generator = harness.generator(seed)
        query = embeddings((n, d), generator, F64)
        key = (query + embeddings((n, d), generator, F64)).to(dtype)
        scale, offset = (torch.tensor(value).to(dtype) if tensor else value for value in (8.5, bias))
        return {"query": query.to(dtype), "key": key, "logit_scale": scale, "logit_bias": offset}

    id = f"{n}x{d}-{str(dtype).removeprefix('torch.')}-bias={bias}" + "-tensor" * tensor
    wants = ("query", "key", "logit_scale", "logit_bias") if tensor else ("query", "key")
    return harness.LossCase(id, dtype, make, wants, small)


CASES = [
    *(
        case(n, d, dtype, tensor=tensor)
        for dtype in DTYPES
        for n, d, tensor in ((1, 1, True), (2, 3, False), (7, 16, True), (33, 40, True))
    ),
    *(case(24, 8, dtype, bias=bias) for dtype in DTYPES for bias in (0.0, 4.0)),
    case(512, 8, F32), case(513, 8, F32), case(1100, 20, F32),
    case(3, 2, F64, small=True, bias=-1.0),
]  # fmt: skip


def registered():
    generator = harness.generator(0)
    query, key = (embeddings((5, 4), generator, F32).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, dtype=F64, requires_grad=True)
    arguments = (query, key, scale, bias, 0)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    return [
        call
        for made in (ops.NATIVE, ops.TRITON)
        for call in (
            (made.forward, arguments),
            (made.step, (torch.tensor(2.0), *detached, [True, True, True, True])),
            (made.step, (torch.tensor(2.0), *detached, [False, True, False, True])),
        )
    ]


LOSS = harness.Loss(tlk.sigmoid_contrastive, pytorch, CASES, tlk.SigmoidContrastiveLoss, registered, rowwise=False)
MODULE = ModuleCase(
    tlk.SigmoidContrastiveLoss,
    tlk.sigmoid_contrastive,
    (A, B),
    {"logit_scale": 3.0, "logit_bias": torch.tensor([-2.0]), "impl": "reference"},
    {"logit_scale": 10.0, "logit_bias": -10.0},
)
