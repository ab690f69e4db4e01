"""A tile of transposed logits for the kernels of linear losses: loaded, or computed as a product."""

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    logits,  # (classes, rows), or None: compute the product
    stride,  # of logits between classes
    input,  # (rows, features)
    input_row, input_k,  # strides of input
    weight,  # (classes, features)
    weight_row, weight_k,  # strides of weight
    bias,  # (classes,), or None
    first,  # first class of the tile
    r,  # rows of the tile
    rows, classes, features,  # sizes
    T: tl.constexpr,  # dtype of the result
    DEEP: tl.constexpr, LANES: tl.constexpr,  # the tile has DEEP * LANES classes; LANES is 1 for a product
    BLOCK_K: tl.constexpr,  # features multiplied at a time
    PRECISION: tl.constexpr,  # of float32: "ieee", "tf32"; or "wide": the interpreter has no product of bfloat16
):  # fmt: skip
    """Return logits of shape [DEEP, LANES, rows], class `first + deep * LANES + lane`, in dtype T.

    Classes and rows out of range have any finite value.
    """
    if logits is not None:
        c = (first + tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, :, None]
        valid = (c < classes) & (r < rows)[None, None, :]
        x = tl.load(logits + c.to(tl.int64) * stride + r[None, None, :], valid, other=0.0).to(T)
    else:
        c = first + tl.arange(0, DEEP)
        k = tl.arange(0, BLOCK_K)
        left = weight + c.to(tl.int64)[:, None] * weight_row + k.to(tl.int64)[None, :] * weight_k
        right = input + r.to(tl.int64)[None, :] * input_row + k.to(tl.int64)[:, None] * input_k
        total = tl.zeros([DEEP, r.shape[0]], T)
        for begin in range(0, features, BLOCK_K):
            k_valid = k < features - begin
            a = tl.load(left, (c < classes)[:, None] & k_valid[None, :], other=0.0)
            b = tl.load(right, k_valid[:, None] & (r < rows)[None, :], other=0.0)
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
    """Return the peak, or 0 where it is -inf (all logits so far are), so that differences from it are not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)
