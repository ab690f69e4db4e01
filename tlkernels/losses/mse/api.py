"""Mean squared error and its root: the functions and the modules."""

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule, refuse_deprecated
from tlkernels._core.options import number
from tlkernels.losses.mse.call import Arguments, check
from tlkernels.losses.mse.ops import IMPLEMENTATIONS


def mse(
    input: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean", impl: str = "auto"
) -> Tensor:
    """Compute the mean squared error, optionally weighted.

    Replaces::

        loss = F.mse_loss(input, target, reduction=reduction, weight=weight)

    Options are keyword-only.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16, or an integer dtype if `target` is
            floating.
        target: the shape of `input`, or one that broadcasts with it, which warns as in PyTorch. Different dtypes are
            promoted.
        weight: a factor for each squared error, of the shape of `input`.
        reduction: "none", "mean" or "sum". "mean" divides by the number of squared errors, or by the sum of `weight`.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the promoted dtype (float32 under autocast). It is a scalar, or with `reduction="none"` one loss
        per element. It is differentiable with respect to `input` and `target`, any number of times; only the gradients
        that are needed are computed. Gradients of `weight`, `torch.func` and forward mode use "reference".

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.
    """
    call = check(Arguments(input, target, weight, reduction, None))
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
    """Compute the root of the mean squared error, optionally weighted.

    Replaces::

        loss = torch.sqrt(F.mse_loss(input, target, reduction=reduction, weight=weight) + eps)

    Args:
        input: as in `mse`.
        target: as in `mse`.
        weight: as in `mse`.
        reduction: as in `mse`. The root is taken after the reduction.
        eps: at least 0; added under the root. Where the error is 0, the gradient is 0 if `eps` is above 0, and NaN
            (infinity times 0) if it is 0, as in PyTorch.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, as in `mse`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.
    """
    call = check(Arguments(input, target, weight, reduction, number("eps", eps)))
    loss: Tensor = resolve("rmse", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class MSELoss(LossModule, torch.nn.MSELoss, function=mse):
    """`mse` as a module. It replaces, and is an instance of, `torch.nn.MSELoss`.

    Each option is an attribute that can be set at any time. The deprecated `size_average` and `reduce` must be None.

    Shape:
        `input` and `target` of any shape, `weight` of the shape of `input`.
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
    """`rmse` as a module. Each option is an attribute that can be set at any time.

    Shape:
        `input` and `target` of any shape, `weight` of the shape of `input`.
    """

    def __init__(self, *, reduction: str = "mean", eps: float = 0.0, impl: str = "auto") -> None:
        super().__init__(reduction=reduction)
        self.eps, self.impl = eps, impl

    def forward(self, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Return the loss."""
        return rmse(input, target, weight=weight, **self._options())
