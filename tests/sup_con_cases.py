"""Cases of SupCon, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import harness
import torch
import torch.nn.functional as F
from info_nce_cases import BF16, DTYPES, F32, F64, embeddings
from module_case import SCALE, SUM, A, ModuleCase, Y

import tlkernels as tlk


def pytorch(features, labels, *, temperature=None, logit_scale=None, normalize=True, reduction="mean"):
    """The PyTorch lines of the docstring, in the dtype of the features."""
    z = F.normalize(features, dim=-1) if normalize else features
    diagonal = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~diagonal
    logits = z @ z.T
    if logit_scale is not None:
        logits = logits * logit_scale
    if temperature is not None:
        logits = logits / temperature
    log_p = logits.masked_fill(diagonal, -torch.inf).log_softmax(1)
    some = positive.any(1)
    losses = torch.where(positive, -log_p, 0).sum(1) / positive.sum(1).clamp(min=1)
    return {"none": lambda: losses, "sum": losses.sum, "mean": lambda: losses.sum() / some.sum()}[reduction]()


def case(n, d, classes, dtype, *, tensor=True, small=False, labels=torch.int64, **options):
    def make(seed):
        generator = harness.generator(seed)
        of = torch.randint(0, classes, (n,), generator=generator)
        features = embeddings((n, d), generator, F64) + torch.randn(classes, d, generator=generator, dtype=F64)[of] / 4
        if n > 1:
            of[1] = of[0]  # at least one positive
        scale = torch.tensor(8.5).to(dtype) if tensor else 8.5
        return {"features": features.to(dtype), "labels": of.to(labels), "logit_scale": scale, **options}

    words = [f"{n}x{d}x{classes}", str(dtype).removeprefix("torch.")]
    words += [f"{name}={value}" for name, value in options.items()] + [str(labels).removeprefix("torch.")]
    return harness.LossCase(
        "-".join(words), dtype, make, ("features", "logit_scale") if tensor else ("features",), small
    )


CASES = [
    *(case(n, d, c, dtype) for dtype in DTYPES for n, d, c in ((2, 1, 1), (7, 16, 3), (33, 40, 20))),
    *(
        case(12, 20, 8, dtype, normalize=normalize, reduction=reduction, tensor=False)
        for dtype in DTYPES
        for normalize in (False, True)
        for reduction in ("mean", "sum", "none")
    ),
    case(512, 8, 30, F32), case(513, 8, 600, F32), case(1200, 20, 7, F32, normalize=False),
    case(600, 20, 100, BF16, reduction="none"), case(20, 8, 5, F32, labels=torch.int8),
    case(20, 8, 5, F32, labels=torch.uint8),
    case(5, 2, 2, F64, small=True),
]  # fmt: skip


LOSS = harness.Loss(tlk.sup_con, pytorch, CASES, tlk.SupConLoss, rowwise=False, cuda="info_nce")
MODULE = ModuleCase(tlk.SupConLoss, tlk.sup_con, (A, Y), {**SCALE, "normalize": False, **SUM})
