"""selective_log_softmax in Triton: launches of the kernels.

The rows are those of cross entropy, whose kernel sweeps them: no class is a row's target, and the upstream of its lse
is minus the sum of the upstreams of its log-probabilities. `gather` computes the log-probabilities by the row's
normaliser. `scatter` writes the gradients of the selected classes over those that the sweep wrote.

Bytes: those of cross entropy, with a given normaliser in the backward. The kernels here have K numbers for each row,
and compare each pair of its selected classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import check_classes
from tlkernels._core.triton.kernels import DTYPES
from tlkernels._core.triton.launch import Config, Table, launch
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.cross_entropy.triton import PerPosition, sweep, write_gradient
from tlkernels.losses.selective_log_softmax import triton_kernels as kernels

# By K. 2026-11-27, by reasoning, unmeasured: a thread has 8 pairs of a row's selected classes, or one row.
_TABLE = Table(
    "selective_log_softmax",
    Config("interpreter", 0, 1, {"BN": 16, "BK": 1}, 1),
    Config("interpreter", 0, None, {"BN": 8, "BK": 4}, 1),
    Config("*", 0, 1, {"BN": 128, "BK": 1}, 4),
    Config("*", 0, 8, {"BN": 16, "BK": 8}, 4),
    Config("*", 0, None, {"BN": 4, "BK": 16}, 4),
)


def _programs(index: Tensor) -> tuple[Config, tuple[int, int]]:
    """Return the launch of a kernel: programs for blocks of rows, and for blocks of their selected classes."""
    rows, selected = index.shape
    config = _TABLE.find(index.device, 0, selected)
    return config, (triton.cdiv(rows, config.meta["BN"]), triton.cdiv(selected, config.meta["BK"]))


def options_of(classes: int, temperature: float, softcap: float | None) -> Options:
    """Return cross entropy's options for a target that is no class."""
    return Options(None, kernels.IGNORED.value, 0.0, temperature, softcap, 0.0, classes)


def summarise(
    index: Tensor, classes: int, dtype: torch.dtype, grad_log_probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return each row's target for cross entropy's kernels, and with `grad_log_probs` the upstream of its lse.

    Rows without a class are ignored. A class out of range makes the row's target one out of range.
    """
    check_classes(index, classes, -1, name="index")
    config, (programs, _) = _programs(index)
    target = index.new_empty(index.shape[0])
    negated = None if grad_log_probs is None else index.new_empty(index.shape[0], dtype=dtype)
    launch(
        kernels.summarise, (programs,), index, grad_log_probs, target, negated, *index.shape, classes,
        T=DTYPES[dtype], config=config,
    )  # fmt: skip
    return target, negated


def gather(
    logits: Tensor, index: Tensor, options: Options, *, saved: Tensor | None = None, target: Tensor | None = None,
    normaliser: Sequence[Tensor | None] = (None, None), log_probs: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `saved` with the selected logits, or `log_probs` by the rows' targets and (peak, log_sum)."""
    config, programs = _programs(index)
    launch(
        kernels.gather, programs, logits, *logits.stride(), index, saved, target, *normaliser, log_probs,
        *index.shape, logits.shape[1], options.temperature, options.softcap or 1.0,
        SOFTCAP=options.softcap is not None, T=DTYPES[compute_dtype(logits)], config=config,
    )  # fmt: skip


def scatter(
    logits: Tensor, strides: Sequence[int], index: Tensor, upstreams: Sequence[Tensor | None], target: Tensor,
    normaliser: Sequence[Tensor | None], options: Options, grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of the selected classes to `grad`, (N, C).

    Args:
        logits, strides: the logits, and their strides between rows, classes and selected classes.
        index: the selected classes.
        upstreams: of the log-probabilities, of the lse as `summarise` returns it, and of the entropy.
        target: as `summarise` returns it.
        normaliser: peak, log_sum and entropy.
        options: of cross entropy.
        grad: the result, in which other classes have their gradients already.
    """
    config, programs = _programs(index)
    launch(
        kernels.scatter, programs, logits, *strides, index, *upstreams, target, *normaliser, grad, *grad.stride(),
        *index.shape, options.temperature, options.softcap or 1.0, SOFTCAP=options.softcap is not None,
        T=DTYPES[compute_dtype(logits)], config=config,
    )  # fmt: skip


def forward(
    logits: Tensor, index: Tensor, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, ...]:
    """Return the log-probabilities, the entropy, which is empty where it is not asked for, peak and log_sum."""
    (rows, classes), dtype = logits.shape, compute_dtype(logits)
    options = options_of(classes, temperature, softcap)
    target, _ = summarise(index, classes, dtype)
    peak, log_sum, entropies = (logits.new_empty(size, dtype=dtype) for size in (rows, rows, rows if entropy else 0))
    results = PerPosition(peak=peak, log_sum=log_sum, entropy=entropies if entropy else None)
    sweep(logits, target, options, results)
    log_probs = logits.new_empty(index.shape, dtype=dtype)
    gather(logits, index, options, target=target, normaliser=(peak, log_sum), log_probs=log_probs)
    return log_probs, entropies, peak, log_sum


def backward(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, logits: Tensor, index: Tensor, peak: Tensor, log_sum: Tensor,
    entropy: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits."""
    grad, classes = torch.empty_like(logits), logits.shape[1]
    of_classes = options_of(classes, *options)
    grad_log_probs = grad_log_probs.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    target, negated = summarise(index, classes, compute_dtype(logits), grad_log_probs)
    normaliser = peak, log_sum, entropy
    write_gradient((None, negated, grad_entropy), logits, target, normaliser, of_classes, grad)
    upstreams = grad_log_probs, negated, grad_entropy
    scatter(logits, (*logits.stride(), 0), index, upstreams, target, normaliser, of_classes, grad)
    return grad
