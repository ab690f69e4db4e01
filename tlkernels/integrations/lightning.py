"""Lightning: train on the mean over the counted rows of all micro-batches and processes of an optimiser step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer


class WholeBatchMean(Callback):
    """Make the gradients of an optimiser step those of the mean over all its counted rows.

    Lightning divides the loss of each micro-batch by `accumulate_grad_batches`, also in a last window that is
    incomplete, and averages the gradients of processes. If the loss is a mean over counted rows, rows have different
    weights where micro-batches or processes have different numbers of them, and the rows of an incomplete window have
    less than their share.

    The changed lines::

        # in training_step
        loss = F.cross_entropy(logits, target)
        # ->
        loss = whole_batch_mean(self, tlk.cross_entropy(logits, target, reduction="sum"), (target != -100).sum())

        trainer = Trainer(..., callbacks=[WholeBatchMean()])

    The gradients are scaled in `on_before_optimizer_step`, which runs after the unscaling of mixed precision and before
    the clipping. Callbacks that read gradients in this hook must come after this one. A step without a counted row has
    the gradients of its losses, which are zero.

    Raises:
        ValueError: when the fit starts: manual optimisation, several of these callbacks, or a strategy other than one
            device and DistributedDataParallel over all processes without a communication hook.
        RuntimeError: `training_step` did not call `whole_batch_mean`, or the gradients were not set to zero after a
            step.
    """

    def __init__(self) -> None:
        self._pending: Tensor | None = None
        """The count of the micro-batch whose backward has not run yet."""
        self._count: Tensor | None = None
        """The count of the window, on this process; None: no backward since the gradients were set to zero."""
        self._unit: Tensor | None = None
        """What losses are divided by before their backward, the first count: gradients of sums overflow in float16."""
        self._scaled = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError for what cannot be served."""
        _find(trainer)
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__}.automatic_optimization: expected True, got False; in manual optimisation "
                "divide the summed loss by the count of the whole batch yourself"
            )
        strategy: Any = trainer.strategy
        if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise ValueError(
                f"strategy: expected SingleDeviceStrategy or DDPStrategy, got {type(strategy).__name__}, whose "
                "gradients this callback does not scale; use strategy='ddp'"
            )
        if type(strategy) is DDPStrategy:
            hook, group = strategy._ddp_comm_hook, strategy._ddp_kwargs.get("process_group")
            for name, value in (("ddp_comm_hook", hook), ("process_group", group)):
                if value is not None:
                    raise ValueError(f"{name}: expected None, which averages gradients over all processes, got {value}")
        self._pending = self._count = self._unit = None
        self._scaled = False

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begin a window: Lightning calls this after the first forward of a window and before its backward."""
        self._count, self._scaled = None, False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the rows of the micro-batch."""
        if self._pending is None:
            raise RuntimeError(
                f"{type(pl_module).__name__}.training_step: expected it to return whole_batch_mean(...), which it did "
                "not call; remove the WholeBatchMean callback to train with another loss"
            )
        if self._scaled:
            raise RuntimeError(
                "WholeBatchMean: expected gradients to be set to zero after a step, got another backward; "
                "LBFGS can be used with accumulate_grad_batches=1 only"
            )
        self._count = self._pending if self._count is None else self._count + self._pending
        self._pending = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Scale the gradients from sums in `_unit` to the mean over the rows of the window on all processes."""
        if self._count is None or self._unit is None:  # training_step returned None
            return
        total = _over_processes(trainer, self._count, dist.ReduceOp.SUM)
        factor = torch.where(total > 0, trainer.world_size * self._unit / total, 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _scale(parameter.grad, factor)
        self._scaled = True


def whole_batch_mean(module: LightningModule, total: Tensor, num_valid: int | float | Tensor) -> Tensor:
    """Return the loss of a step, for a Trainer with the callback `WholeBatchMean`.

    Args:
        module: the LightningModule whose `training_step` calls this; once in each step.
        total: the sum of the losses of the micro-batch's counted rows, of shape (): a loss with `reduction="sum"`. A
            further term of the loss must be a sum over the same rows too.
        num_valid: the number of counted rows, without a need to wait for the device: a number or a tensor of shape ().
            With class weights: the sum of the weights of the counted rows.

    Returns:
        A scalar in the dtype of `total`, at least float32. Its value is the mean of the micro-batch, for logging (0
        without a counted row). In training, its gradient is not that of this mean, but a part of the whole batch's,
        which the callback completes. In validation it is the plain mean.

    Raises:
        TypeError: `total` or `num_valid` is of another type.
        ValueError: `total` or `num_valid` is of another shape, or the Trainer does not have one `WholeBatchMean`.
    """
    if not isinstance(total, Tensor):
        raise TypeError(f"total: expected a Tensor, got {type(total).__name__}")
    if total.dim():
        raise ValueError(f"total: expected shape (), a loss with reduction='sum', got {tuple(total.shape)}")
    if isinstance(num_valid, bool) or not isinstance(num_valid, int | float | Tensor):
        raise TypeError(f"num_valid: expected a number or a Tensor, got {type(num_valid).__name__}")
    wide = torch.float32 if total.device.type == "mps" else torch.float64  # counts are exact
    count = torch.as_tensor(num_valid).detach().to(total.device, wide)
    if count.dim():
        raise ValueError(f"num_valid: expected shape (), got {tuple(count.shape)}")
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    mean = total / torch.where(count > 0, count, 1).to(total.dtype)
    trainer = module.trainer
    if not trainer.training:
        return mean
    callback = _find(trainer)
    callback._pending = count
    if callback._unit is None:
        first = _over_processes(trainer, count, dist.ReduceOp.MAX)
        callback._unit = torch.where(first > 0, first, 1)
    # Lightning divides by accumulate_grad_batches.
    part = (trainer.accumulate_grad_batches / callback._unit).to(total.dtype)
    return mean.detach() + (total - total.detach()) * part


def _find(trainer: Trainer) -> WholeBatchMean:
    found = [callback for callback in trainer.callbacks if isinstance(callback, WholeBatchMean)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise ValueError(f"callbacks: expected the Trainer to have one WholeBatchMean, got {len(found)}")
    return found[0]


def _over_processes(trainer: Trainer, count: Tensor, op: Any) -> Tensor:
    """Reduce a count. Lightning's own `reduce` also has a barrier, which waits for the device."""
    count = count.clone()
    if trainer.world_size > 1:
        dist.all_reduce(count, op)
    return count


def _scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply in place, in at least float32: on GPUs a factor of shape () is rounded to the dtype of the gradient."""
    values = grad._values() if grad.is_sparse else grad
    values.mul_(factor.to(torch.promote_types(values.dtype, torch.float32)).view((1,) * values.dim()))
