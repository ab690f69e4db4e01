"""Cross entropy: the public function, its form with statistics, and the module."""

import torch
from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule, refuse_deprecated
from tlkernels._core.options import flag
from tlkernels.losses.cross_entropy.call import Call, CrossEntropyOutput, check, plain_options
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
    inplace_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy between logits and class indices or class probabilities.

    Replaces::

        x = softcap * torch.tanh(input / softcap)      # where softcap is given
        x = x / temperature
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction,
                               label_smoothing=label_smoothing)
        loss = loss + z_loss * torch.logsumexp(x, 1).square()  # per position, before the reduction; 0 where ignored

    Options are given by name only. Numbers may be numpy scalars or 0-d tensors, as in PyTorch.

    Args:
        input: logits of shape (C,), (N, C) or (N, C, d1, ...), any strides; float64, float32, bfloat16 or float16.
        target: class indices of an integer dtype and the input's shape without C, each in [0, C) or `ignore_index`; or
            probabilities of a floating dtype and the input's shape.
        weight: a factor for each class, shape (C,).
        ignore_index: the class index whose positions count neither in the loss nor in the mean. Their gradient is 0
            whatever the logits are; in PyTorch it is NaN where they are not finite.
        reduction: "mean" divides the sum by the number of positions that count, or with `weight` and class indices by
            the weights of their targets; "sum"; "none" keeps a loss per position.
        label_smoothing: in [0, 1], the share of the uniform distribution in the target.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits to (-softcap, softcap) smoothly, before the temperature (Gemma 2, 2024).
        z_loss: at least 0; factor of the squared log-partition, which keeps it near 0 (PaLM, 2022, section 5).
        inplace_grad: let the backward write the gradient over `input`, which saves the memory of a gradient. `input`
            must not be a leaf. After the backward it cannot be read any more: that raises, and so does a second
            backward.
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss in the input's dtype (under autocast float32): 0-d, or with "none" of the input's shape without C. It
        is differentiable by `input` and by probabilities, twice and more. With no position that counts, the mean is NaN
        and the gradient 0, as in PyTorch. A gradient of `weight` is PyTorch's business (`impl="reference"`).

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        IndexError: a class index out of range.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.
        RuntimeError: misuse of a tensor that `inplace_grad` has overwritten.

    Source: Szegedy et al. 2016 (arXiv 1512.00567) for label smoothing; `tlkernels/losses/cross_entropy/second_order.py`
    has the formulas of the gradients.
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    call = check(Call(input, target, options, reduction, flag("inplace_grad", inplace_grad), stats=False))
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
    inplace_grad: bool = False,
    impl: str = "auto",
) -> CrossEntropyOutput:
    """Cross entropy with what training watches, from the same sweep over the logits.

    Arguments, loss and errors are those of `cross_entropy`. The statistics, one per position:

        lse = torch.logsumexp(x, 1)                                              # differentiable
        entropy = torch.distributions.Categorical(logits=x).entropy()           # classes along axis 1
        correct = (input.argmax(1) == target) & (target != ignore_index)         # or == target.argmax(1)
    """
    options = plain_options(weight, ignore_index, label_smoothing, temperature, softcap, z_loss)
    call = check(Call(input, target, options, reduction, flag("inplace_grad", inplace_grad), stats=True))
    output: CrossEntropyOutput = resolve("cross_entropy_stats", IMPLEMENTATIONS, call, impl).run(call)
    return output


class CrossEntropyLoss(LossModule, torch.nn.CrossEntropyLoss, function=cross_entropy):
    """`cross_entropy` as a module: takes the place of `torch.nn.CrossEntropyLoss`, of which it is an instance.

    The arguments are those of `cross_entropy`, by position in PyTorch's order. Each is an attribute of that name, which
    can be set at any time; `weight` is a buffer, as in PyTorch. The deprecated `size_average` and `reduce` must be
    None; a value raises TypeError.
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

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        return cross_entropy(input, target, **self._options())
