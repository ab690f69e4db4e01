"""Every loss that is measured: its tensors, the eager lines and the floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import tlkernels as tlk
from tlkernels.bench.work import OURS, Cast, Loss, Shape, Work, classes_of, generator, normal


def cross_entropy(
    shape: Shape, cast: Cast, *, inplace_grad: bool = False, probabilities: bool = False, **options: Any
) -> Work:
    """The floor is `copy_` into a buffer that exists: it reads and writes the bytes of logits and gradient."""
    positions = (shape[0], *shape[2:])
    x = cast(normal(*shape, scale=3))
    y = cast(normal(*shape, seed=1).softmax(1)) if probabilities else classes_of(shape[1], *positions)
    out = torch.empty_like(x)
    inplace: dict[str, Any] = {"inplace_grad": True} if inplace_grad else {}
    return Work(
        (x,),
        lambda x, impl="auto": tlk.cross_entropy(x, y, **options, **inplace, impl=impl),
        lambda x: F.cross_entropy(x, y, **options),
        lambda: out.copy_(x),
        upstream=x.new_ones(positions) if options.get("reduction") == "none" else None,
        # In place, eager gets a copy too: in a model the logits come out of another operation.
        fresh=(*OURS, "eager") if inplace_grad else (),
        data={"target": y, **options},
    )


def _one_rank() -> dist.ProcessGroup:
    """Return a process group of this process alone: what a rank does without waiting for others."""
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def cross_entropy_of_a_rank(shape: Shape, cast: Cast, *, vocab_group: bool) -> Work:
    """One rank's part of the classes. The peer is the same call without a group.

    That call reads the logits and writes the gradient in one sweep. A rank reads its logits again after the exchange.
    """
    x, y = cast(normal(*shape, scale=3)), classes_of(shape[1], shape[0])
    out, group = torch.empty_like(x), _one_rank() if vocab_group else None
    return Work(
        (x,),
        lambda x, impl="auto": tlk.cross_entropy(x, y, vocab_group=group, impl=impl),
        lambda x: F.cross_entropy(x, y),
        lambda: out.copy_(x),
        {"alone": lambda x: tlk.cross_entropy(x, y)},
    )


def _pairs(rows: int, features: int) -> tuple[Tensor, Tensor]:
    """Unit vectors, each nearer to its partner than to others."""
    one = normal(rows, features)
    return F.normalize(one, dim=-1), F.normalize(one + normal(rows, features, seed=1), dim=-1)


def _three_products(x: Tensor, w: Tensor) -> Callable[[], object]:
    """The logits of a linear layer and the gradients of its input and its weight."""
    logits, grad_x, grad_w = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def floor() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    return floor


def linear_cross_entropy(shape: Shape, cast: Cast) -> Work:
    """Cross entropy of a linear layer's logits. The floor is the three bare products."""
    rows, features, classes = shape
    x, w = cast(normal(rows, features)), cast(normal(classes, features, scale=features**-0.5, seed=1))
    y = classes_of(classes, rows)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    ours = lambda x, w, impl="auto": tlk.linear_cross_entropy(x, w, y, impl=impl)  # noqa: E731
    return Work((x, w), ours, eager, _three_products(x, w), data={"target": y})


def masked_linear_cross_entropy(shape: Shape, cast: Cast, *, counted: float) -> Work:
    """Only a share of the rows count. Peers: the same call on as many rows, and with all rows counted."""
    rows, features, classes = shape
    x, w = cast(normal(rows, features)), cast(normal(classes, features, scale=features**-0.5, seed=1))
    every = classes_of(classes, rows)
    num_valid = round(counted * rows)
    y = every.masked_fill(torch.randperm(rows, generator=generator(1)) >= num_valid, -100)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    def ours(x: Tensor, w: Tensor, impl: str = "auto") -> Tensor:
        return tlk.linear_cross_entropy(x, w, y, num_valid=num_valid, impl=impl)

    peers: dict[str, Loss] = {
        "counted": lambda x, w: tlk.linear_cross_entropy(x[:num_valid], w, every[:num_valid]),
        "all": lambda x, w: tlk.linear_cross_entropy(x, w, every),
    }
    floor = _three_products(x[:num_valid], w)
    return Work((x, w), ours, eager, floor, peers, data={"target": y, "num_valid": num_valid})


def distillation(shape: Shape, cast: Cast, *, divergence: str = "forward_kl") -> Work:
    """Distillation from a teacher's logits at temperature 2. The floor reads two tensors and writes one."""
    student, teacher = cast(normal(*shape, scale=3)), cast(normal(*shape, scale=2, seed=1))
    out = torch.empty_like(student)
    return Work(
        (student,),
        lambda s, impl="auto": tlk.distillation(s, teacher, temperature=2.0, divergence=divergence, impl=impl),
        lambda s: 4 * _divergence(divergence, F.log_softmax(s / 2, -1), F.log_softmax(teacher / 2, -1)),
        lambda: torch.add(student, teacher, out=out),
        data={"teacher": teacher, "temperature": 2.0, "divergence": divergence},
    )


def _divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    if name == "forward_kl":
        return F.kl_div(log_p, log_q.exp(), reduction="batchmean")
    if name == "reverse_kl":
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    p, q = log_p.exp(), log_q.exp()
    if name == "tv":
        return 0.5 * (p - q).abs().sum(-1).mean()
    log_m = ((p + q) / 2).log()
    kl = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return 0.5 * (kl + F.kl_div(log_m, log_p, reduction="batchmean", log_target=True))


def linear_distillation(shape: Shape, cast: Cast) -> Work:
    """The same of two linear layers. The floor is the four bare products."""
    rows, features, teacher_features, classes = shape
    x, xt = cast(normal(rows, features)), cast(normal(rows, teacher_features, seed=1))
    w = cast(normal(classes, features, scale=features**-0.5, seed=2))
    wt = cast(normal(classes, teacher_features, scale=teacher_features**-0.5, seed=3))
    logits, teacher = x.new_empty(rows, classes), x.new_empty(rows, classes)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def floor() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(xt, wt.T, out=teacher)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        log_p, q = F.log_softmax(F.linear(x, w) / 2, -1), F.softmax(F.linear(xt, wt) / 2, -1)
        return 4 * F.kl_div(log_p, q, reduction="batchmean")

    def ours(x: Tensor, w: Tensor, impl: str = "auto") -> Tensor:
        return tlk.linear_distillation(x, w, xt, wt, temperature=2.0, impl=impl)

    data = {"teacher_input": xt, "teacher_weight": wt, "temperature": 2.0}
    return Work((x, w), ours, eager, floor, data=data)


def _policy(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """The loss of a policy gradient, with an entropy bonus."""
    weights = torch.linspace(0.5, 1.5, len(log_probs), device=log_probs.device, dtype=log_probs.dtype)
    gain: Tensor = log_probs * weights.unsqueeze(-1)
    return -gain.mean() - 0.01 * entropy.mean()


def _policy_lines(logits: Tensor, index: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return _policy(log_p.gather(-1, index), -(log_p.exp() * log_p).sum(-1))


def selective_log_softmax(shape: Shape, cast: Cast, *, selected: int = 1) -> Work:
    """A policy gradient on logits, with an entropy bonus. The floor is a copy of the logits."""
    x, index = cast(normal(*shape, scale=3)), classes_of(shape[1], shape[0], selected)
    out = torch.empty_like(x)

    def ours(x: Tensor, impl: str = "auto") -> Tensor:
        return _policy(*tlk.selective_log_softmax(x, index, return_entropy=True, impl=impl))

    data = {"index": index, "policy": _policy}
    return Work((x,), ours, lambda x: _policy_lines(x, index), lambda: out.copy_(x), data=data)


def linear_selective_log_softmax(shape: Shape, cast: Cast) -> Work:
    """The floor is three products. We multiply a fourth time: the backward computes the logits again."""
    rows, features, classes = shape
    x, w = cast(normal(rows, features)), cast(normal(classes, features, scale=features**-0.5, seed=1))
    index = classes_of(classes, rows, 1)
    logits = x.new_empty(rows, classes)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def floor() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    def ours(x: Tensor, w: Tensor, impl: str = "auto") -> Tensor:
        return _policy(*tlk.linear_selective_log_softmax(x, w, index, return_entropy=True, impl=impl))

    data = {"index": index, "policy": _policy}
    return Work((x, w), ours, lambda x, w: _policy_lines(F.linear(x, w), index), floor, data=data)


def topk_distillation(shape: Shape, cast: Cast, *, kept: int = 64) -> Work:
    """Peers: `selective_log_softmax` of the same classes, and eager distillation from all of the teacher's classes."""
    student, teacher = cast(normal(*shape, scale=3)), cast(normal(*shape, scale=2, seed=1))
    log_probs, index = teacher.log_softmax(-1).topk(min(kept, shape[1] - 1))
    out = torch.empty_like(student)

    def with_rest(log_p: Tensor) -> Tensor:
        wide = log_p.to(torch.promote_types(log_p.dtype, torch.float32))  # a rest of bfloat16 has no digit
        kept_mass = wide.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(wide.dtype).eps)
        return torch.cat([wide, torch.log1p(-kept_mass)], -1)

    def eager(s: Tensor) -> Tensor:
        log_p = F.log_softmax(s.to(torch.promote_types(s.dtype, torch.float32)) / 2, -1).gather(-1, index)
        return 4 * _divergence("forward_kl", with_rest(log_p), F.log_softmax(with_rest(log_probs) / 2, -1))

    def selective(s: Tensor) -> Tensor:
        selected = tlk.selective_log_softmax(s, index)
        assert isinstance(selected, Tensor)
        return selected.mean()

    def dense(s: Tensor) -> Tensor:
        return 4 * _divergence("forward_kl", F.log_softmax(s / 2, -1), F.log_softmax(teacher / 2, -1))

    def ours(s: Tensor, impl: str = "auto") -> Tensor:
        return tlk.topk_distillation(s, index, log_probs, temperature=2.0, impl=impl)

    peers: dict[str, Loss] = {"selective": selective, "dense": dense}
    data = {"index": index, "log_probs": log_probs, "temperature": 2.0, "tail": "bucket"}
    return Work((student,), ours, eager, lambda: out.copy_(student), peers, data=data)


TILE = {"cpu": 512, "cuda": 8192}
"""Rows and columns of the similarities in a floor: they stay in a processor's caches, or fill a GPU."""


def _products(a: Tensor, b: Tensor, similarities: int = 2) -> Callable[[], object]:
    """The products of a loss without an N x N tensor: similarities, twice for a softmax, and each gradient."""
    size = min(TILE[a.device.type], len(a))
    tile = a.new_empty(size, size)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)

    def floor() -> None:
        for i, j in itertools.product(range(0, len(a), size), range(0, len(b), size)):
            rows, columns = a[i : i + size], b[j : j + size]
            out = tile[: len(rows), : len(columns)]
            for _ in range(similarities):
                torch.mm(rows, columns.T, out=out)
            grad_a[i : i + size].addmm_(out, columns)
            if b is not a:
                grad_b[j : j + size].addmm_(out.T, rows)

    return floor


def info_nce(shape: Shape, cast: Cast) -> Work:
    """CLIP's loss: both directions, from unit vectors."""
    rows, features = shape
    q, k = map(cast, _pairs(rows, features))
    y = torch.arange(rows)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        logits = 14.3 * q @ k.T
        return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2

    def ours(q: Tensor, k: Tensor, impl: str = "auto") -> Tensor:
        return tlk.info_nce(q, k, logit_scale=14.3, symmetric=True, impl=impl)

    return Work((q, k), ours, eager, _products(q, k), data={"logit_scale": 14.3, "symmetric": True})


def nt_xent(shape: Shape, cast: Cast) -> Work:
    """SimCLR's loss of two views."""
    rows, features = shape  # of both views together
    z1, z2 = map(cast, _pairs(rows // 2, features))
    positive = torch.arange(rows).roll(rows // 2)

    def eager(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=-1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, positive)

    z = torch.cat([z1, z2])
    ours = lambda z1, z2, impl="auto": tlk.nt_xent(z1, z2, temperature=0.1, impl=impl)  # noqa: E731
    return Work((z1, z2), ours, eager, _products(z, z), data={"temperature": 0.1})


def sup_con(shape: Shape, cast: Cast) -> Work:
    """Supervised contrastive loss, eight rows of each label."""
    rows, features = shape
    z = cast(normal(rows, features))
    labels = torch.arange(rows) % (rows // 8)

    def eager(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=-1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        positive = (labels[:, None] == labels).fill_diagonal_(False)
        rows = torch.where(positive, F.log_softmax(logits, -1), 0).sum(-1) / positive.sum(-1)
        return -rows.mean()

    ours = lambda z, impl="auto": tlk.sup_con(z, labels, temperature=0.1, impl=impl)  # noqa: E731
    return Work((z,), ours, eager, _products(z, z), data={"labels": labels, "temperature": 0.1})


def sigmoid_contrastive(shape: Shape, cast: Cast) -> Work:
    """SigLIP's loss, from unit vectors."""
    rows, features = shape
    q, k = map(cast, _pairs(rows, features))

    def eager(q: Tensor, k: Tensor) -> Tensor:
        z = 2 * torch.eye(rows, dtype=q.dtype, device=q.device) - 1
        return -F.logsigmoid(z * (10.0 * q @ k.T - 10.0)).sum() / rows

    def ours(q: Tensor, k: Tensor, impl: str = "auto") -> Tensor:
        return tlk.sigmoid_contrastive(q, k, logit_scale=10.0, logit_bias=-10.0, impl=impl)

    data = {"logit_scale": 10.0, "logit_bias": -10.0}
    return Work((q, k), ours, eager, _products(q, k, similarities=1), data=data)


def _squared(shape: Shape, cast: Cast, function: Loss, eager: Loss) -> Work:
    x, y = cast(normal(*shape)), cast(normal(*shape, seed=1))
    out = torch.empty_like(x)
    ours = lambda x, impl="auto": function(x, y, impl=impl)  # noqa: E731
    return Work((x,), ours, lambda x: eager(x, y), lambda: torch.add(x, y, out=out), data={"target": y})


def mse(shape: Shape, cast: Cast) -> Work:
    """Mean squared error. The floor reads two tensors and writes one."""
    return _squared(shape, cast, tlk.mse, F.mse_loss)


def rmse(shape: Shape, cast: Cast) -> Work:
    """The root of the mean squared error."""
    return _squared(shape, cast, tlk.rmse, lambda x, y: F.mse_loss(x, y).sqrt())
