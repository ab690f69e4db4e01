"""Linear cross entropy: the function, the function with statistics, and the module."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput, plain_options
from tlkernels.losses.linear_cross_entropy.call import Arguments, check
from tlkernels.losses.linear_cross_entropy.ops import IMPLEMENTATIONS


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    num_valid: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the cross entropy of a linear layer's output, without storing all logits.

    Replaces::

        logits = F.linear(input, linear_weight, linear_bias)
        loss = tlkernels.cross_entropy(logits, target, weight, ...)     # the same options, without num_valid

    The logits and their gradients exist for a chunk of rows at a time. A chunk has about 128 MB on a CPU and 256 MiB on
    a GPU; on a GPU it may also use the memory of the gradient of `linear_weight`. With small hidden sizes a GPU stores
    no logits at all.

    Args:
        input: features of shape (D,) or (..., D); float64, float32, bfloat16 or float16.
        linear_weight: shape (C, D) and the dtype of `input`, as `torch.nn.Linear.weight`.
        target: class indices of any integer dtype, of the shape of `input` without D, each in [0, C) or equal to
            `ignore_index`; or class probabilities of a floating dtype and shape (C,) or (..., C).
        linear_bias: shape (C,) and the dtype of `input`.
        weight: a factor for each class, of shape (C,).
        ignore_index: the class index to ignore. Ignored rows count neither in the loss nor in the mean. They add
            nothing to any gradient even if their features are not finite, where PyTorch gives NaN. On a CPU they are
            not multiplied.
        reduction: "none", "mean" or "sum". "mean" divides by the number of rows that are not ignored; with `weight` and
            class indices, by the sum of their weights.
        label_smoothing: in [0, 1]; the share of the uniform distribution in the target.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits smoothly to (-softcap, softcap), before `temperature` (Gemma 2, 2024).
        z_loss: at least 0; the factor of the squared log-sum-exp, which this term keeps near 0 (PaLM, 2022, section 5).
        row_weight: a factor for each row's loss, of the shape of `input` without D and any of the dtypes of `input`.
            The mean still divides by the same number. If `row_weight` does not require a gradient, a row of weight 0
            is left out as an ignored one is.
        num_valid: the number of rows that are not ignored, if the caller knows it. With it ignored rows are not
            multiplied on a GPU either, and the GPU is not waited for.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the dtype of `input` (float32 under autocast). It is a scalar, or with `reduction="none"` one loss
        per row. The loss is differentiable with respect to `input`, `linear_weight`, `linear_bias` and `row_weight`,
        any number of times; only the gradients that are needed are computed. "native" computes the gradients of a
        reduced loss together with the loss; for "none" and float16 it computes the logits again in the backward. Second
        derivatives, `torch.func`, forward mode and gradients of `weight` and of class probabilities use "reference",
        which stores all logits. If every row is ignored, the mean is NaN and the gradients are 0, as in PyTorch.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range. A wrong `num_valid` raises on a CPU,
            and on a GPU only with `TLKERNELS_CHECK=1`; otherwise the loss is NaN.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: see `cross_entropy`; the gradients of the layer are those of its matrix products.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    layer = input, linear_weight, linear_bias
    call = check(Arguments(*layer, target, options, reduction, False, row_weight, num_valid))
    loss: Tensor = resolve("linear_cross_entropy", IMPLEMENTATIONS, call, impl).run(call)
    return loss


def linear_cross_entropy_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    num_valid: int | None = None,
    impl: str = "auto",
) -> CrossEntropyOutput:
    """Compute the linear cross entropy and, in the same pass, statistics for monitoring.

    Arguments, loss and errors are those of `linear_cross_entropy`.

    Replaces::

        logits = F.linear(input, linear_weight, linear_bias)
        output = tlkernels.cross_entropy_stats(logits, target, weight, ...)     # the same options

    Returns:
        A `CrossEntropyOutput` (loss, lse, entropy, correct). The statistics have one value per row, which is 0 or False
        in rows that are ignored or have weight 0. `lse` and `entropy` are differentiable, as the loss is. The backward
        computes the logits again.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    layer = input, linear_weight, linear_bias
    call = check(Arguments(*layer, target, options, reduction, True, row_weight, num_valid))
    output: CrossEntropyOutput = resolve("linear_cross_entropy_stats", IMPLEMENTATIONS, call, impl).run(call)
    return output


_TorchLinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)  # of newer PyTorch


class LinearCrossEntropyLoss(LossModule, _TorchLinearCrossEntropyLoss, function=linear_cross_entropy):  # type: ignore[misc]
    """`linear_cross_entropy` as a module that owns the layer. It replaces `torch.nn.LinearCrossEntropyLoss`.

    It is an instance of that class if PyTorch has it. The layer is the submodule `linear`.

    Args:
        in_features: size of the features, D.
        num_classes: number of classes, C.
        bias: whether the layer has a bias.
        device: the device of the layer's parameters.
        dtype: the dtype of the layer's parameters.

    The other arguments are those of `linear_cross_entropy`. Each is an attribute that can be set at any time; `weight`
    is a buffer, as in PyTorch. PyTorch's `out_features` and `options` are not supported.

    Shape:
        `input` (D,) or (..., D); `target` without D, or class probabilities of shape (C,) or (..., C); `row_weight`
        without D.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        impl: str = "auto",
    ) -> None:
        _WeightedLoss.__init__(self, weight, reduction=reduction)
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.num_classes, self.out_features = num_classes, ()
        self.ignore_index, self.label_smoothing, self.temperature = ignore_index, label_smoothing, temperature
        self.softcap, self.z_loss, self.impl = softcap, z_loss, impl

    def forward(
        self, input: Tensor, target: Tensor, row_weight: Tensor | None = None, num_valid: int | None = None
    ) -> Tensor:
        """Return the loss."""
        layer = self.linear
        return linear_cross_entropy(
            input, layer.weight, target, linear_bias=layer.bias, row_weight=row_weight, num_valid=num_valid,
            **self._options(),
        )  # fmt: skip
