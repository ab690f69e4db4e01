"""Liger-Kernel: Triton kernels, and its losses of chunks of rows in compiled PyTorch, which run on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Adapter, Peer, beta_of, class_indices, one_class
from tlkernels.bench.work import Loss

FUNCTIONAL = "liger_kernel.transformers.functional"


def cross_entropy(
    *,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    """`liger_cross_entropy`; the gradient overwrites the logits."""
    return partial(
        import_module(FUNCTIONAL).liger_cross_entropy,
        target=class_indices(target),
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def fused_linear(**chunks: int) -> Adapter:
    """Return the adapter of `liger_fused_linear_cross_entropy` with this size of the chunks."""

    def linear_cross_entropy(
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Loss:
        return partial(
            import_module(FUNCTIONAL).liger_fused_linear_cross_entropy,
            target=class_indices(target),
            ce_weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            **chunks,
        )

    return linear_cross_entropy


def distillation(*, teacher: Tensor, temperature: float, divergence: str) -> Loss:
    """`liger_kl_div`, `liger_jsd` or `liger_tvd` of PyTorch's softmaxes: they take (log-)probabilities."""
    functional = import_module(FUNCTIONAL)
    distribution: Callable[..., Tensor] = F.log_softmax
    if divergence == "tv":
        distribution, kernel = F.softmax, partial(functional.liger_tvd, reduction="batchmean")
    elif divergence == "forward_kl":
        kernel = partial(functional.liger_kl_div, reduction="batchmean", log_target=True)
    else:
        kernel = partial(functional.liger_jsd, beta=beta_of(divergence))

    def loss(student: Tensor) -> Tensor:
        p, q = (distribution(logits / temperature, -1) for logits in (student, teacher))
        value: Tensor = kernel(p, q)
        return temperature**2 * value

    return loss


def linear_distillation(*, teacher_input: Tensor, teacher_weight: Tensor, temperature: float) -> Loss:
    """`liger_fused_linear_jsd` at the end where it is the forward KL divergence."""
    fused = import_module(FUNCTIONAL).liger_fused_linear_jsd

    def loss(x: Tensor, w: Tensor) -> Tensor:
        value: Tensor = fused(x, w, teacher_input, teacher_weight, jsd_beta=0.0, temperature=temperature)
        return temperature**2 * value

    return loss


def chunked_linear_distillation(*, teacher_input: Tensor, teacher_weight: Tensor, temperature: float) -> Loss:
    """`LigerFusedLinearJSDLoss` without hard labels, at the end where it is the forward KL divergence."""
    module = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature
    )
    labels = torch.zeros(len(teacher_input), dtype=torch.long, device=teacher_input.device)  # every row counts

    def loss(x: Tensor, w: Tensor) -> Tensor:
        value: Tensor = module(x, w, teacher_input, teacher_weight, labels)
        return temperature**2 * value

    return loss


def linear_selective_log_softmax(*, index: Tensor, policy: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """`LigerFusedLinearScaledCrossEntropyFunction`: the negative log-probability of one class, and the entropy.

    On Hopper it is a kernel, elsewhere PyTorch in chunks of rows.
    """
    function: Any = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    target = one_class(index)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        nll, entropy = function.apply(x, w, target, return_entropy=True)
        return policy(-nll.unsqueeze(-1), entropy)

    return loss


PEERS = (
    Peer(
        "liger",
        "liger-kernel",
        {
            "cross_entropy": cross_entropy,
            "linear_cross_entropy": fused_linear(),
            "distillation": distillation,
            "linear_distillation": linear_distillation,
        },
        ("cuda",),
        fresh=("cross_entropy",),
    ),
    Peer("liger large chunks", "liger-kernel", {"linear_cross_entropy": fused_linear(chunk_mem_const=16)}, ("cuda",)),
    Peer(
        "liger chunked",
        "liger-kernel",
        {"linear_distillation": chunked_linear_distillation},
        CPU_AND_CUDA,
        compiles=True,
    ),
    Peer("liger scaled", "liger-kernel", {"linear_selective_log_softmax": linear_selective_log_softmax}, CPU_AND_CUDA),
)
