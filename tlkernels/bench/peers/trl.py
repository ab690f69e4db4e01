"""TRL: its fused and chunked losses. On a CPU they are PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from tlkernels.bench.peers.peer import CPU_AND_CUDA, Peer, beta_of, class_indices, one_class
from tlkernels.bench.work import Loss

CLASSES = 32768
"""Classes in a chunk, as in TRL's trainers."""


def selective_log_softmax(*, index: Tensor, policy: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """`selective_log_softmax_and_entropy`; the rows are one sequence, since it loops over sequences."""
    function = import_module("trl.trainer.utils").selective_log_softmax_and_entropy
    target = (index.squeeze(-1) if index.shape[-1] == 1 else index).unsqueeze(0)  # its kernel takes one class of a row

    def loss(logits: Tensor) -> Tensor:
        log_probs, entropy = function(logits.unsqueeze(0), target)
        return policy(log_probs.view(index.shape), entropy.squeeze(0))

    return loss


def linear_selective_log_softmax(*, index: Tensor, policy: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """`ChunkedLogProbFunction` with the entropy."""
    function = import_module("trl.kernels").ChunkedLogProbFunction
    target = one_class(index)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        log_probs, entropy, *_ = function.apply(x, w, None, target, 1.0, CLASSES, None, 1.0, ("entropy",))
        return policy(log_probs.unsqueeze(-1), entropy)

    return loss


def linear_cross_entropy(*, target: Tensor, ignore_index: int = -100) -> Loss:
    """`ChunkedLogProbFunction`, used as TRL's trainers do: on a GPU it multiplies the rows that count."""
    function = import_module("trl.kernels").ChunkedLogProbFunction
    mask = class_indices(target) != ignore_index
    divisor = mask.sum().clamp(min=1)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        rows, classes = (x[mask], target[mask]) if x.is_cuda else (x, target.clamp(min=0))
        log_probs: Tensor = function.apply(rows, w, None, classes, 1.0, CLASSES, None, 1.0, ())[0]
        return -(log_probs if x.is_cuda else log_probs.masked_fill(~mask, 0)).sum() / divisor

    return loss


def distillation(*, teacher: Tensor, temperature: float, divergence: str) -> Loss:
    """`GKDTrainer.generalized_jsd_loss`."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that the interface may change is known
    function = import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    beta = beta_of(divergence)

    def loss(student: Tensor) -> Tensor:
        value: Tensor = function(student, teacher, beta=beta, temperature=temperature)
        return temperature**2 * value

    return loss


def linear_distillation(*, teacher_input: Tensor, teacher_weight: Tensor, temperature: float) -> Loss:
    """`ChunkedDivergenceFunction` at the end where it is the forward KL divergence."""
    function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss(x: Tensor, w: Tensor) -> Tensor:
        rows: Tensor = function.apply(x, w, None, teacher_input, teacher_weight, None, 0.0, temperature)[0]
        return temperature**2 * rows.mean()

    return loss


PEERS = (
    Peer(
        "trl",
        "trl",
        {
            "selective_log_softmax": selective_log_softmax,
            "linear_selective_log_softmax": linear_selective_log_softmax,
            "linear_cross_entropy": linear_cross_entropy,
            "distillation": distillation,
            "linear_distillation": linear_distillation,
        },
        CPU_AND_CUDA,
    ),
)
