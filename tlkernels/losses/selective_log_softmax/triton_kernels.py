"""The kernels of selected classes; `triton.py` launches them and says how they work together."""

import triton
import triton.language as tl

from tlkernels._core.triton.kernels import number
from tlkernels.losses.cross_entropy.triton_kernels import bounded

IGNORED = tl.constexpr(-100)
"""The target of a row without a class. That of a row with classes is -1, or C if one of them is out of range."""


@triton.jit(do_not_specialize=["N"])
def summarise(
    index,  # (N, K) int64
    grad,  # (N, K) upstreams of the log-probabilities, or None
    target,  # result, (N,) int64
    negated,  # result, (N,): minus the sum of the row's upstreams, with grad
    N, K, C,  # rows, selected classes of a row, classes
    T: tl.constexpr,  # dtype of the arithmetic
    BN: tl.constexpr, BK: tl.constexpr,  # rows and selected classes of a tile
):  # fmt: skip
    """Write each row's target for the kernels of cross entropy, and its upstream of the lse."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    largest = tl.full([BN, BK], -1, tl.int64)
    smallest = tl.full([BN, BK], -1, tl.int64)
    sums = tl.zeros([BN, BK], T)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        c = tl.load(index + at, inside, other=-1)
        largest, smallest = tl.maximum(largest, c), tl.minimum(smallest, c)
        if grad is not None:
            sums += tl.load(grad + at, inside & (c != -1), other=0.0).to(T)
    most, least = tl.max(largest, 1), tl.min(smallest, 1)
    y = tl.where((most >= C) | (least < -1), C, tl.where(most == -1, IGNORED, -1))
    tl.store(target + n, y, n < N)
    if grad is not None:
        tl.store(negated + n, -tl.sum(sums, 1), n < N)


@triton.jit(do_not_specialize=["N"])
def gather(
    logits,  # (N, C)
    row_stride, class_stride,  # of logits
    index,  # (N, K) int64
    saved,  # result, (N, K): the selected logits, 0 for no class; or None
    target,  # (N,), of `summarise`, with log_probs
    peak_of, log_sum_of,  # (N,), of cross entropy's kernels, with log_probs
    log_probs,  # result, (N, K), or None
    N, K, C,  # rows, selected classes of a row, classes
    temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr,  # softcap is used
    T: tl.constexpr,  # dtype of the arithmetic
    BN: tl.constexpr, BK: tl.constexpr,  # rows and selected classes of a tile
):  # fmt: skip
    """Write the selected classes' logits or log-probabilities: -inf of no class, NaN in a row with one out of range."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    c = tl.load(index + at, inside, other=-1)
    selected = (c >= 0) & (c < C)
    x = tl.load(logits + n[:, None] * row_stride + c * class_stride, selected, other=0.0)
    if saved is not None:
        tl.store(saved + at, x, inside)
    if log_probs is not None:
        u, _ = bounded(x.to(T), number(softcap, T), SOFTCAP)
        scale = 1 / number(temperature, T)
        if SOFTCAP:
            scale *= number(softcap, T)
        peak, log_sum = tl.load(peak_of + n, n < N, other=0.0), tl.load(log_sum_of + n, n < N, other=0.0)
        y = tl.load(target + n, n < N, other=0)
        log_p = tl.where(selected, (u - peak[:, None]) * scale - log_sum[:, None], float("-inf"))
        tl.store(log_probs + at, tl.where((y == C)[:, None], float("nan"), log_p), inside)


@triton.jit(do_not_specialize=["N"])
def scatter(
    logits,  # (N, C), or (N, K): those of the selected classes
    row_stride, class_stride, selected_stride,  # of logits; the second or the third is 0
    index,  # (N, K) int64
    grad_log_probs,  # (N, K)
    negated,  # (N,), of `summarise`
    grad_entropy,  # (N,), or None for 0
    target,  # (N,), of `summarise`
    peak_of, log_sum_of,  # (N,), of cross entropy's kernels
    entropy_of,  # (N,), with grad_entropy
    grad,  # result, (N, C)
    grad_row, grad_class,  # strides of grad
    N, K,  # rows, selected classes of a row
    temperature: tl.float64, softcap: tl.float64,
    SOFTCAP: tl.constexpr,  # softcap is used
    T: tl.constexpr,  # dtype of the arithmetic
    BN: tl.constexpr, BK: tl.constexpr,  # rows and selected classes of a tile
):  # fmt: skip
    """Write the gradient of the selected classes. A class that is selected twice gets the same from both."""
    softcap, inv_t = number(softcap, T), 1 / number(temperature, T)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    y = tl.load(target + n, n < N, other=0)
    valid = y == -1  # others have the row's kernel's zeros, or NaN
    inside = valid[:, None] & (k < K)[None, :]
    c = tl.load(index + n[:, None] * K + k[None, :], inside, other=-1)
    selected = c >= 0
    at_x = n[:, None] * row_stride + c * class_stride + k[None, :] * selected_stride
    x = tl.load(logits + at_x, selected, other=0.0).to(T)
    u, slope = bounded(x, softcap, SOFTCAP)
    scale = inv_t * softcap if SOFTCAP else inv_t
    peak, log_sum = tl.load(peak_of + n, valid, other=0.0), tl.load(log_sum_of + n, valid, other=0.0)
    log_p = (u - peak[:, None]) * scale - log_sum[:, None]
    p = tl.exp(log_p)
    d = tl.load(negated + n, valid, other=0.0)[:, None] * p
    if grad_entropy is not None:
        h = tl.load(grad_entropy + n, valid, other=0.0).to(T)
        entropy = tl.load(entropy_of + n, valid, other=0.0)
        d -= tl.where(p == 0, 0.0, h[:, None] * p * (log_p + entropy[:, None]))
    for start in range(0, K, BK):
        j = start + tl.arange(0, BK)
        others = valid[:, None] & (j < K)[None, :]
        at = n[:, None] * K + j[None, :]
        other = tl.load(index + at, others, other=-1)
        g = tl.load(grad_log_probs + at, others & (other != -1), other=0.0).to(T)
        d += tl.sum(tl.where(c[:, :, None] == other[:, None, :], g[:, None, :], 0.0), 2)
    d *= slope * inv_t
    tl.store(grad + n[:, None] * grad_row + c * grad_class, d.to(grad.dtype.element_ty), selected)
