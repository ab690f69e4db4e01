"""What kernels of linear losses share: a tile of transposed logits, from memory or as a product made on the spot."""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    logits,  # transposed, or None: then the product
    stride,
    input,
    input_row,
    input_k,
    weight,
    weight_row,
    weight_k,
    bias,
    first,  # class of the tile
    r,  # its rows
    rows,
    classes,
    features,
    T: tl.constexpr,
    DEEP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide": the interpreter has no product of bfloat16
):
    """Return logits of shape [DEEP, LANES, rows], class `first + deep * LANES + lane`, in dtype T.

    A product has one lane. Classes and rows that are not there have any finite value.
    """
    if logits is not None:
        c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
        there = (c < classes) & (r < rows)[None, None, :]
        x = tl.load(logits + c.to(tl.int64) * stride + r[None, None, :], there, other=0.0).to(T)
    else:
        c = first + tl.arange(0, DEEP)
        k = tl.arange(0, BLOCK_K)
        left = weight + c.to(tl.int64)[:, None] * weight_row + k.to(tl.int64)[None, :] * weight_k
        right = input + r.to(tl.int64)[None, :] * input_row + k.to(tl.int64)[:, None] * input_k
        total = tl.zeros([DEEP, r.shape[0]], T)
        for begin in range(0, features, BLOCK_K):
            deep = k < features - begin
            a = tl.load(left, (c < classes)[:, None] & deep[None, :], other=0.0)
            b = tl.load(right, deep[:, None] & (r < rows)[None, :], other=0.0)
            if PRECISION == "wide":
                total = tl.dot(a.to(T), b.to(T), total, input_precision="ieee", out_dtype=T)
            else:
                total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=T)
            left += BLOCK_K * tl.cast(weight_k, tl.int64)
            right += BLOCK_K * tl.cast(input_k, tl.int64)
        if bias is not None:
            total += tl.load(bias + c, c < classes, other=0.0).to(T)[:, None]
        x = total[:, None, :]
    return x


@triton.jit
def finite(peak):
    """Return what differences from a peak are taken from: 0 where all logits so far are -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)
