"""Mean squared error and its root: the public functions and the modules."""

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule, refuse_deprecated
from tlkernels._core.options import number
from tlkernels.losses.mse.call import Call, check
from tlkernels.losses.mse.ops import IMPLEMENTATIONS


def mse(
    input: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean", impl: str = "auto"
) -> Tensor:
    """Mean squared error, optionally weighted.

    Replaces::

        loss = F.mse_loss(input, target, reduction=reduction, weight=weight)

    Options are given by name only.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16 (or integers, beside a floating target).
        target: the same shape, or one that broadcasts with it, which warns as PyTorch does. Different dtypes are
            promoted.
        weight: a factor for each squared error, of the input's shape.
        reduction: "mean" divides the sum by the number of squared errors, or by the sum of the weights; "sum"; "none"
            keeps them all.
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss in the common dtype (under autocast float32). It is differentiable by `input` and `target`, twice and
        more; only the gradients that are needed are computed. A gradient of `weight`, torch.func and forward mode go
        through the reference.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.
    """
    call = check(Call(input, target, weight, reduction, None))
    loss: Tensor = resolve("mse", IMPLEMENTATIONS, call, impl).run(call)
    return loss


def rmse(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Root of the mean squared error.

    Replaces::

        loss = torch.sqrt(F.mse_loss(input, target, reduction=reduction, weight=weight) + eps)

    Args:
        input, target, weight, reduction, impl: as of `mse`; the root is taken after the reduction.
        eps: at least 0. Where the error is 0, the gradient is 0 with an eps above 0, and NaN (infinity times 0) with an
            eps of 0, as of the PyTorch line.

    Returns, Raises: as `mse`.
    """
    call = check(Call(input, target, weight, reduction, number("eps", eps)))
    loss: Tensor = resolve("rmse", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class MSELoss(LossModule, torch.nn.MSELoss, function=mse):
    """`mse` as a module: takes the place of `torch.nn.MSELoss`, of which it is an instance.

    The options are attributes, which can be set at any time. The deprecated `size_average` and `reduce` must be None;
    a value raises TypeError.
    """

    def __init__(
        self, size_average: None = None, reduce: None = None, reduction: str = "mean", *, impl: str = "auto"
    ) -> None:
        refuse_deprecated(size_average, reduce)
        super().__init__(reduction=reduction)
        self.impl = impl

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return the loss."""
        return mse(input, target, weight=weight, **self._options())


class RMSELoss(LossModule, _Loss, function=rmse):
    """`rmse` as a module; the options are attributes, which can be set at any time."""

    def __init__(self, *, reduction: str = "mean", eps: float = 0.0, impl: str = "auto") -> None:
        super().__init__(reduction=reduction)
        self.eps, self.impl = eps, impl

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return the loss."""
        return rmse(input, target, weight=weight, **self._options())
