"""Cases of NT-Xent, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from info_nce_cases import BF16, DTYPES, F32, F64, embeddings
from module_case import SCALE, SUM, A, B, ModuleCase

import tlkernels as tlk


def pytorch(z1, z2, *, temperature=None, logit_scale=None, normalize=True, reduction="mean"):
    """The PyTorch lines of the docstring, in the dtype of the views."""
    z = torch.cat([z1, z2])
    z = F.normalize(z, dim=-1) if normalize else z
    logits = z @ z.T
    if logit_scale is not None:
        logits = logits * logit_scale
    if temperature is not None:
        logits = logits / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)), reduction=reduction)


def case(n, d, dtype, *, tensor=True, small=False, **options):
    def make(seed):
        generator = harness.generator(seed)
        z1 = embeddings((n, d), generator, F64)
        z2 = (z1 + embeddings((n, d), generator, F64)).to(dtype)
        scale = torch.tensor(8.5).to(dtype) if tensor else 8.5
        return {"z1": z1.to(dtype), "z2": z2, "logit_scale": scale, **options}

    words = [f"{n}x{d}", str(dtype).removeprefix("torch.")] + [f"{name}={value}" for name, value in options.items()]
    wants = ("z1", "z2", "logit_scale") if tensor else ("z1", "z2")
    return harness.LossCase("-".join(words), dtype, make, wants, small)


CASES = [
    *(case(n, d, dtype) for dtype in DTYPES for n, d in ((1, 1), (1, 3), (7, 16), (33, 40))),
    *(
        case(12, 20, dtype, normalize=normalize, reduction=reduction, tensor=False)
        for dtype in DTYPES
        for normalize in (False, True)
        for reduction in ("mean", "sum", "none")
    ),
    case(256, 8, F32), case(257, 8, F32), case(600, 20, F32, normalize=False), case(300, 20, BF16, reduction="none"),
    case(2, 2, F64, small=True),
]  # fmt: skip


LOSS = harness.Loss(tlk.nt_xent, pytorch, CASES, tlk.NTXentLoss, rowwise=False, cuda="info_nce")
MODULE = ModuleCase(tlk.NTXentLoss, tlk.nt_xent, (A, B), {**SCALE, "normalize": False, **SUM})
