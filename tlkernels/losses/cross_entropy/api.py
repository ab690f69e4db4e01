"""Cross entropy: the function, the function with statistics, and the module."""

import torch
from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule, refuse_deprecated
from tlkernels._core.options import flag
from tlkernels.losses.cross_entropy.call import Arguments, CrossEntropyOutput, check, plain_options
from tlkernels.losses.cross_entropy.ops import IMPLEMENTATIONS


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    inplace_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute the cross entropy between logits and class indices or class probabilities.

    Replaces::

        x = softcap * torch.tanh(input / softcap)      # if softcap is given
        x = x / temperature
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction,
                               label_smoothing=label_smoothing)
        loss = loss + z_loss * torch.logsumexp(x, 1).square()  # per position, before the reduction; 0 where ignored
        loss = loss * row_weight                               # likewise; "mean" divides by the same number as without

    Options are keyword-only. As in PyTorch, a number may also be a numpy scalar or a 0-d tensor.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ...), with any strides; float64, float32, bfloat16 or float16.
        target: class indices of any integer dtype, of the shape of `input` without C, each in [0, C) or equal to
            `ignore_index`; or class probabilities of a floating dtype and the shape of `input`.
        weight: a factor for each class, of shape (C,).
        ignore_index: the class index to ignore. Ignored positions count neither in the loss nor in the mean. Their
            gradient is 0 even if their logits are not finite, where PyTorch gives NaN.
        reduction: "none", "mean" or "sum". "mean" divides by the number of positions that are not ignored; with
            `weight` and class indices, by the sum of their weights.
        label_smoothing: in [0, 1]; the share of the uniform distribution in the target.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits smoothly to (-softcap, softcap), before `temperature` (Gemma 2, 2024).
        z_loss: at least 0; the factor of the squared log-sum-exp, which this term keeps near 0 (PaLM, 2022, section 5).
        row_weight: a factor for each position's loss, of the loss's shape under `reduction="none"` and any of the
            dtypes of `input`. The mean still divides by the same number. If `row_weight` does not require a gradient,
            a position of weight 0 is left out as an ignored one is, whatever its logits are.
        inplace_grad: whether the backward writes the gradient over `input`, with only O(N) extra memory. `input` must
            not be a leaf. After the backward, reading `input` raises, and so does a second backward.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the dtype of `input` (float32 under autocast). It is a scalar, or with `reduction="none"` one loss
        per position. The loss is differentiable with respect to `input`, class probabilities and `row_weight`, any
        number of times. Only `impl="reference"` differentiates `weight`. If every position is ignored, the mean is NaN
        and the gradient 0, as in PyTorch.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.
        RuntimeError: a tensor that `inplace_grad` has overwritten is used.

    Source: Szegedy et al. 2016 (arXiv 1512.00567) for label smoothing. The formulas of the gradients are in
    `tlkernels/losses/cross_entropy/second_order.py`.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    arguments = Arguments(input, target, options, reduction, flag("inplace_grad", inplace_grad), False, row_weight)
    call = check(arguments)
    loss: Tensor = resolve("cross_entropy", IMPLEMENTATIONS, call, impl).run(call)
    return loss


def cross_entropy_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    inplace_grad: bool = False,
    impl: str = "auto",
) -> CrossEntropyOutput:
    """Compute the cross entropy and, in the same pass over the logits, statistics for monitoring.

    Arguments, loss and errors are those of `cross_entropy`.

    Replaces::

        loss = tlkernels.cross_entropy(input, target, ...)
        x = ...                                                           # the logits after softcap and temperature
        lse = torch.logsumexp(x, 1)
        entropy = torch.distributions.Categorical(logits=x).entropy()     # with the classes in the last dimension
        correct = input.argmax(1) == target                               # class probabilities: == target.argmax(1)
        # all three are 0 where target == ignore_index

    Returns:
        A `CrossEntropyOutput` (loss, lse, entropy, correct). The statistics have one value per position. `lse` and
        `entropy` are differentiable, as the loss is. They are 0, and `correct` is False, at positions that are ignored
        or have weight 0.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    arguments = Arguments(input, target, options, reduction, flag("inplace_grad", inplace_grad), True, row_weight)
    call = check(arguments)
    output: CrossEntropyOutput = resolve("cross_entropy_stats", IMPLEMENTATIONS, call, impl).run(call)
    return output


class CrossEntropyLoss(LossModule, torch.nn.CrossEntropyLoss, function=cross_entropy):
    """`cross_entropy` as a module. It replaces, and is an instance of, `torch.nn.CrossEntropyLoss`.

    The arguments are those of `cross_entropy`, at PyTorch's positions. Each is an attribute that can be set at any
    time; `weight` is a buffer, as in PyTorch. The deprecated `size_average` and `reduce` must be None.

    Shape:
        As in `cross_entropy`: `input` (C,), (N, C) or (N, C, d1, ...); `target` without C, or as `input`; `row_weight`
        without C.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        inplace_grad: bool = False,
        impl: str = "auto",
    ) -> None:
        refuse_deprecated(size_average, reduce)
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing)
        self.temperature, self.softcap, self.z_loss = temperature, softcap, z_loss
        self.inplace_grad, self.impl = inplace_grad, impl

    def forward(self, input: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Return the loss."""
        return cross_entropy(input, target, row_weight=row_weight, **self._options())
