"""Cases of InfoNCE, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import itertools

import harness
import torch
import torch.nn.functional as F
from module_case import SCALE, SUM, A, B, ModuleCase

import tlkernels as tlk
from tlkernels.losses.info_nce import ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def pytorch(query, key, target=None, *, temperature=None, logit_scale=None, negatives=None, mask=None,
            symmetric=False, normalize=False, label_smoothing=0.0, reduction="mean"):  # fmt: skip
    """The PyTorch lines of the docstring, in the dtype of the query."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    logits = query @ key.T
    if negatives is not None:
        further = query @ negatives.T if negatives.dim() == 2 else torch.einsum("nd,nmd->nm", query, negatives)
        logits = torch.cat([logits, further], 1)
    if logit_scale is not None:
        logits = logits * logit_scale
    if temperature is not None:
        logits = logits / temperature
    target = torch.arange(len(query)) if target is None else target.long()
    out = torch.zeros_like(logits, dtype=torch.bool)
    if mask is not None:
        taken = mask[0][:, None] == mask[1] if isinstance(mask, tuple) else mask
        out[:, : taken.shape[1]] = taken
        out[torch.arange(len(query)), target] = False

    def rows(logits, out):
        logits = logits.masked_fill(out, -torch.inf)
        if mask is None:
            return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
        log_p = F.log_softmax(logits, 1)
        losses = (1 - label_smoothing) * F.nll_loss(log_p, target, reduction="none")
        if label_smoothing:
            losses = losses - label_smoothing * (log_p.masked_fill(out, 0).sum(1) / (~out).sum(1))
        return losses

    losses = rows(logits, out)
    if symmetric:
        losses = (losses + rows(logits[:, : len(key)].T, out[:, : len(key)].T)) / 2
    return {"none": lambda: losses, "sum": losses.sum, "mean": losses.mean}[reduction]()


def embeddings(shape, generator, dtype):
    """Return rows; every third one is three times as long, so that some positives are far ahead."""
    x = torch.randn(shape, generator=generator, dtype=F64) / shape[-1] ** 0.5
    x[..., 1::3, :] *= 3
    return x.to(dtype)


def case(id, n, k, d, dtype, *, m=None, per_query=False, kind="none", scale=None, small=False, target=False, **options):
    """Return one call with `m` negatives; `kind` is that of the mask, `scale` an argument and its kind."""

    def make(seed):
        generator = harness.generator(seed)
        query = embeddings((n, d), generator, dtype)
        near = query[torch.arange(k) % n].double() if n else torch.zeros(k, d, dtype=F64)
        key = (near + embeddings((k, d), generator, F64)).to(dtype)
        arguments = {"query": query, "key": key, **options}
        if m is not None:
            arguments["negatives"] = embeddings((n, m, d) if per_query else (m, d), generator, dtype)
        if scale is not None:
            name, kind_of = scale
            value = torch.tensor(0.0625 if name == "temperature" else 8.5)
            arguments[name] = value.to(dtype) if kind_of == "tensor" else value.item()
        if target:
            arguments["target"] = torch.randint(0, k + (m or 0), (n,), generator=generator)
        if kind in ("bool", "wide"):  # "wide" covers the negatives too
            columns = k + (m or 0) * (kind == "wide")
            arguments["mask"] = torch.rand(n, columns, generator=generator) < 0.3
        if kind == "ids":
            arguments["mask"] = tuple(torch.randint(-3, 9, (size,), generator=generator) for size in (n, k))
        return arguments

    wants = ["query", "key"]
    wants += ["negatives"] * (m is not None) + [scale[0]] * (scale is not None and scale[1] == "tensor")
    return harness.LossCase(f"{id}-{str(dtype).removeprefix('torch.')}", dtype, make, tuple(wants), small)


def both(impl, tensors, upstream=None, **options):
    """Return loss and gradients: ours, and PyTorch's in float64."""

    def run(loss, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]

    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    ours = run(lambda *t: tlk.info_nce(*t, impl=impl, **options), tensors)
    return ours, run(lambda *t: pytorch(*t, **wide), [t.double() for t in tensors])


def same(ours, right, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, equal_nan=True)


def pairs(n, d, k=None):
    query = F.normalize(torch.randn(n, d), dim=1)
    return query, F.normalize(torch.randn(k or n, d), dim=1)


TENSOR, NUMBER = ("logit_scale", "tensor"), ("temperature", "number")
DTYPES = (F64, F32, BF16, F16)
CASES = [
    # sizes: one; fewer features than a vector; no multiple of it; a whole tile and one more; several; K > N
    *(
        case(f"{n}x{k}x{d}", n, k, d, dtype, scale=TENSOR)
        for dtype in DTYPES
        for n, k, d in ((1, 1, 1), (1, 5, 3), (7, 7, 16), (33, 65, 40))
    ),
    case("512x513x8", 512, 513, 8, F32, scale=NUMBER),
    case("600x1100x20", 600, 1100, 20, F32, scale=TENSOR),
    case("symmetric-600x600x20", 600, 600, 20, F32, symmetric=True, scale=TENSOR, label_smoothing=0.1),
    case("symmetric-ids-600x600x20", 600, 600, 20, F32, symmetric=True, scale=TENSOR, kind="ids", normalize=True),
    case("negatives-530x530x9", 530, 530, 9, F32, symmetric=True, m=515, scale=TENSOR, kind="wide"),
    case("own-negatives-530x530x9", 530, 530, 9, F32, m=515, per_query=True, scale=TENSOR, normalize=True,
         kind="wide"),
    # small enough for Triton's interpreter; there they are several panels of several tiles
    *(
        case(f"{kind}-negatives-70x70x9-{per_query}", 70, 70, 9, F32, symmetric=not per_query, m=37,
             per_query=per_query, kind=kind, scale=TENSOR, normalize=per_query, label_smoothing=0.1)
        for kind in ("bool", "wide", "ids")
        for per_query in (False, True)
    ),
    # large tiles of tensor cores: one row more than a tile, several panels
    case("target-129x700x8", 129, 700, 8, F16, target=True, kind="bool", label_smoothing=0.1, scale=NUMBER),
    case("symmetric-260x260x40", 260, 260, 40, BF16, symmetric=True, m=200, kind="wide", normalize=True, scale=TENSOR),
    case("symmetric-ids-260x260x160", 260, 260, 160, F16, symmetric=True, kind="ids", label_smoothing=0.1,
         scale=TENSOR),
    # options together
    *(
        case(
            f"{kind}-symmetric={symmetric}-normalize={normalize}-smoothing={smoothing}-negatives={m}-own={per_query}",
            9, 9, 20, dtype, kind=kind, symmetric=symmetric, normalize=normalize, label_smoothing=smoothing, m=m,
            per_query=per_query, scale=TENSOR if dtype == F64 else NUMBER,
        )
        for dtype in (F64, F32, BF16)
        for kind, symmetric, normalize, smoothing, (m, per_query) in itertools.product(
            ("none", "bool", "wide", "ids"), (False, True), (False, True), (0.0, 0.1),
            ((None, False), (5, False), (5, True)),
        )
        if m or kind != "wide"
    ),
    *(
        case(f"target-{reduction}-{m}-{per_query}", 12, 17, 20, dtype, target=True, m=m, per_query=per_query,
             kind="wide", reduction=reduction, scale=("temperature", "tensor"), normalize=True)
        for dtype in DTYPES
        for reduction in ("mean", "sum", "none")
        for m, per_query in ((None, False), (5, False), (5, True))
    ),
    *(
        case(f"symmetric-{reduction}", 12, 12, 20, dtype, symmetric=True, reduction=reduction, scale=NUMBER)
        for dtype in DTYPES
        for reduction in ("mean", "sum", "none")
    ),
    # small, for gradcheck, Hessians and vmap
    case("small", 3, 3, 2, F64, small=True, symmetric=True, normalize=True, label_smoothing=0.1, scale=TENSOR),
    case("small-negatives", 3, 4, 2, F64, small=True, m=2, scale=("temperature", "tensor")),
    case("small-wide", 3, 3, 2, F64, small=True, symmetric=True, m=4, kind="wide", scale=TENSOR),
]  # fmt: skip


def registered():
    generator = harness.generator(0)
    query, key, negatives = (embeddings((5, 4), generator, F32).requires_grad_() for _ in range(3))
    scale = torch.tensor(2.0, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 1])
    plain = (query, key, negatives, scale, None, torch.eye(5) > 0, ids, ids, -1, False, True, True, 0.1)
    wide = (*plain[:5], torch.eye(5, 10) > 0, *plain[6:])
    paired = (query, None, None, scale, None, None, ids, None, 0, True, False, False, 0.0)
    for arguments in (plain, wide, paired):
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        for made in (ops.NATIVE, ops.TRITON):
            fake = torch.empty(1 + arguments[10], 6 if made is ops.NATIVE else 5, 5)
            state = torch.rand_like(fake, dtype=F64 if made is ops.NATIVE else F32) + 1
            yield made.forward, arguments
            yield made.backward, (torch.rand(5), state, *detached, [True, arguments is not paired, False, True])
            if made.step:
                yield made.step, (*detached, True, [True, arguments is not paired, arguments is not paired, True])


LOSS = harness.Loss(tlk.info_nce, pytorch, CASES, tlk.InfoNCELoss, lambda: list(registered()), rowwise=False)
MODULE = ModuleCase(
    tlk.InfoNCELoss,
    tlk.info_nce,
    (A, B),
    {**SCALE, "symmetric": True, "normalize": True, "label_smoothing": 0.2, **SUM},
)
