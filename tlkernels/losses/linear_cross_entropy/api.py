"""Linear cross entropy: the public function, its form with statistics, and the module."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.cross_entropy.call import CrossEntropyOutput, plain_options
from tlkernels.losses.linear_cross_entropy.call import Call, check
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
    impl: str = "auto",
) -> Tensor:
    """Cross entropy between a linear layer's output and class indices or probabilities, without holding the logits.

    Replaces, for an input of rows::

        logits = F.linear(input, linear_weight, linear_bias)
        loss = tlk.cross_entropy(logits, target, weight, ...)     # or F.cross_entropy; the same options

    The logits exist in chunks of rows (about 128 MB on a CPU; on a GPU 256 MiB, or in the memory that the gradient of
    `linear_weight` is going to take), and so do their gradients; or on a GPU with small hidden sizes never.

    Args:
        input: shape (D,), or (..., D) of rows; float64, float32, bfloat16 or float16.
        linear_weight: shape (C, D), in the input's dtype; `torch.nn.Linear.weight`.
        target: class indices of an integer dtype and the input's shape without D, each in [0, C) or `ignore_index`; or
            probabilities of a floating dtype and shape (C,) or (..., C).
        linear_bias: shape (C,), in the input's dtype.
        weight: a factor for each class, shape (C,).
        ignore_index: the class index whose rows count neither in the loss nor in the mean. They have no part in any
            gradient whatever `input` is there; in PyTorch gradients are NaN where it is not finite.
        reduction: "mean" divides the sum by the number of rows that count, or with `weight` and class indices by the
            weights of their targets; "sum"; "none" keeps a loss per row.
        label_smoothing: in [0, 1], the share of the uniform distribution in the target.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits to (-softcap, softcap) smoothly, before the temperature (Gemma 2, 2024).
        z_loss: at least 0; factor of the squared log-partition, which keeps it near 0 (PaLM, 2022, section 5).
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss in the input's dtype (under autocast float32): 0-d, or with "none" of the input's shape without D. It
        is differentiable by `input`, `linear_weight` and `linear_bias`, twice and more; only the gradients that are
        needed are computed. Native computes a reduced loss's gradients along with it; for "none" and float16 it makes
        the logits again in the backward. Second derivatives, torch.func, forward mode and gradients of `weight` and of
        probabilities go through the reference, which holds all logits. With no row that counts, the mean is NaN and the
        gradients are 0, as in PyTorch.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        IndexError: a class index out of range.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.

    Source: as of `tlkernels.cross_entropy`; the gradients of the layer are those of its three matrix products.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    call = check(Call(input, linear_weight, linear_bias, target, options, reduction, stats=False))
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
    impl: str = "auto",
) -> CrossEntropyOutput:
    """Linear cross entropy with what training watches, from the same sweep.

    Arguments, loss and errors are those of `linear_cross_entropy`. The statistics are those of `cross_entropy_stats`
    for the logits, one per row: `lse`, which is differentiable, `entropy` and `correct`. The backward makes the logits
    again.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    call = check(Call(input, linear_weight, linear_bias, target, options, reduction, stats=True))
    output: CrossEntropyOutput = resolve("linear_cross_entropy_stats", IMPLEMENTATIONS, call, impl).run(call)
    return output


_TorchLinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _WeightedLoss)  # of newer PyTorch


class LinearCrossEntropyLoss(LossModule, _TorchLinearCrossEntropyLoss, function=linear_cross_entropy):  # type: ignore[misc]
    """`linear_cross_entropy` as a module, which owns the layer: takes the place of `torch.nn.LinearCrossEntropyLoss`.

    It is an instance of that class where PyTorch has it. The arguments are `in_features`, `num_classes`, `bias`,
    `device` and `dtype` of the layer, `linear`, and those of `linear_cross_entropy`, which are attributes that can be
    set at any time; `weight` is a buffer, as in PyTorch. Of PyTorch's arguments `out_features` (a loss for each of
    several layers) and `options` (how to make chunks) are not taken.
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

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        layer = self.linear
        return linear_cross_entropy(input, layer.weight, target, linear_bias=layer.bias, **self._options())
