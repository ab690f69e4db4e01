"""Arguments of cross entropy and their validation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.autograd import is_differentiated, trackable
from tlkernels._core.dtypes import FLOATING, INTEGER, compute_dtype, loss_dtype
from tlkernels._core.options import integer, number, smoothing
from tlkernels._core.reduction import REDUCTIONS, sum_in_order


class CrossEntropyOutput(NamedTuple):
    """The result of `cross_entropy_stats`. All but `loss` have a value per position, which is 0 where ignored."""

    loss: Tensor
    """The loss, as from `cross_entropy`."""
    lse: Tensor
    """logsumexp of the logits after softcap and temperature; float32 (float64 for float64), differentiable."""
    entropy: Tensor
    """Entropy of the softmax in nats; float32 (float64 for float64), differentiable."""
    correct: Tensor
    """Whether the first largest logit is that of the target's class; bool, False at ignored positions."""


class Options(NamedTuple):
    """The options of the loss of a position, in the order of the ops' arguments."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    temperature: float
    softcap: float | None
    z_loss: float
    num_classes: int | None = None
    """The number of classes of the whole vocabulary, where `input` has a part of it: label smoothing is spread over
    all of them, and a class index of -1 says that the target is in another part."""


class Arguments(NamedTuple):
    """The arguments of a call."""

    input: Tensor
    target: Tensor
    options: Options
    reduction: str
    inplace_grad: bool
    stats: bool
    row_weight: Tensor | None = None
    vocab_group: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss: the input's; under autocast float32, as in PyTorch."""
        return loss_dtype(self.input)

    def denominator(self) -> Tensor | float:
        """Return the divisor of "mean": the sum of the weights of counted targets, or the rows with probabilities."""
        if self.target.is_floating_point():
            return self.input.numel() / self.input.shape[class_axis(self.input)]
        counted = self.target != self.options.ignore_index
        if self.options.weight is None:
            return counted.sum()
        weight = self.options.weight.to(compute_dtype(self.input))
        # On a GPU a class index out of range makes its row NaN; here it must not read out of range.
        index = self.target.long().masked_fill(~counted, 0).clamp(0, weight.numel() - 1)
        total = sum_in_order(weight[index] * counted)
        return torch.where(total == 0, torch.nan, total)  # as in PyTorch, also with label smoothing

    def weightless(self) -> Tensor | None:
        """Return which positions have weight 0 and so do not take part; None if `row_weight` may need a gradient."""
        if self.row_weight is None or is_differentiated(self.row_weight):
            return None
        return self.row_weight == 0

    def absent(self) -> Tensor | None:
        """Return which positions are ignored or have weight 0; None if none can be."""
        weightless = self.weightless()
        if self.target.is_floating_point():
            return weightless
        ignored = self.target == self.options.ignore_index
        return ignored if weightless is None else ignored | weightless

    def without_weightless(self) -> "Arguments":
        """Return the call for an implementation that knows no `row_weight`: positions of weight 0 are ignored.

        With probabilities, which have no ignored positions, their logits are 0.
        """
        weightless = self.weightless()
        if weightless is None:
            return self
        if self.target.is_floating_point():
            return self._replace(input=self.input.masked_fill(weightless.unsqueeze(class_axis(self.input)), 0))
        return self._replace(target=self.target.long().masked_fill(weightless, self.options.ignore_index))

    def weighted(self, rows: Tensor) -> Tensor:
        """Return the losses of positions times their weights."""
        return rows if self.row_weight is None else rows * trackable(self.row_weight).to(rows.dtype)


def class_axis(input: Tensor) -> int:
    """Return the class axis."""
    return 0 if input.dim() == 1 else 1


def check(call: Arguments) -> Arguments:
    """Return `call` if its arguments are valid.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not match, or an option is out of range. (The implementation checks the
            range of class indices, since it reads them anyway.)
    """
    input, target, options = call.input, call.target, call.options
    for name, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if input.dtype not in FLOATING:
        raise TypeError(f"input: expected float64, float32, bfloat16 or float16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input: expected shape (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    if target.device != input.device:
        raise ValueError(f"target: expected it on the input's device {input.device}, got {target.device}")
    shape = input.shape
    if target.dtype in INTEGER:
        expected = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
        if target.shape != expected:
            raise ValueError(
                f"target: expected class indices of shape {tuple(expected)} for an input of shape {tuple(shape)}, "
                f"got {tuple(target.shape)}"
            )
    elif target.dtype in FLOATING:
        if target.shape != shape:
            raise ValueError(
                f"target: expected probabilities of the input's shape {tuple(shape)}, got {tuple(target.shape)}; "
                "class indices have an integer dtype"
            )
        if options.ignore_index >= 0:
            raise ValueError(
                f"ignore_index: expected a negative number with probabilities as target, got {options.ignore_index}"
            )
    else:
        raise TypeError(f"target: expected class indices or floating-point probabilities, got {target.dtype}")
    if call.reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {call.reduction!r}")
    if options.weight is not None:
        _check_weight(options.weight, input)
    if call.row_weight is not None:
        _check_row_weight(call.row_weight, input)
    if call.inplace_grad:
        _check_inplace(call)
    return call


def _check_row_weight(row_weight: Tensor, input: Tensor) -> None:
    if not isinstance(row_weight, Tensor):
        raise TypeError(f"row_weight: expected a Tensor or None, got {type(row_weight).__name__}")
    if row_weight.dtype not in FLOATING:
        raise TypeError(f"row_weight: expected float64, float32, bfloat16 or float16, got {row_weight.dtype}")
    positions = (*input.shape[: class_axis(input)], *input.shape[class_axis(input) + 1 :])
    if row_weight.shape != positions:
        raise ValueError(
            f"row_weight: expected shape {positions}, one number per position, got {tuple(row_weight.shape)}"
        )
    if row_weight.device != input.device:
        raise ValueError(f"row_weight: expected it on the input's device {input.device}, got {row_weight.device}")


def _check_weight(weight: Tensor, input: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor or None, got {type(weight).__name__}")
    if weight.dtype not in FLOATING:
        raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    classes = input.shape[class_axis(input)]
    if weight.shape != (classes,):
        raise ValueError(f"weight: expected shape ({classes},), one number per class, got {tuple(weight.shape)}")
    if weight.device != input.device:
        raise ValueError(f"weight: expected it on the input's device {input.device}, got {weight.device}")


def plain_options(
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    temperature: float,
    softcap: float | None,
    z_loss: float,
) -> Options:
    """Return the options as Python numbers.

    Raises:
        TypeError, ValueError: a number has the wrong type or is out of range.
    """
    temperature, z_loss = number("temperature", temperature), number("z_loss", z_loss)
    softcap = None if softcap is None else number("softcap", softcap)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected None or a finite number above 0, got {softcap}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss}")
    ignore_index = integer("ignore_index", ignore_index)
    return Options(weight, ignore_index, smoothing(label_smoothing), temperature, softcap, z_loss)


def _check_inplace(call: Arguments) -> None:
    input = call.input
    if input.requires_grad and input.is_leaf:
        raise ValueError(
            "inplace_grad: expected an input that is the result of an operation, got a leaf that requires grad, "
            "which the gradient would overwrite"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(input.shape, input.stride(), strict=True)):
        raise ValueError(
            f"inplace_grad: expected an input whose elements do not share memory, got strides {input.stride()}"
        )
