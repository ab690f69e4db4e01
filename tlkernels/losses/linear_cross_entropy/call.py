"""Arguments of linear cross entropy and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.autograd import PLAIN, Tensors
from tlkernels._core.dtypes import FLOATING, autocasts, loss_dtype
from tlkernels._core.options import integer
from tlkernels.losses.cross_entropy.call import Arguments as CrossEntropyArguments
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.cross_entropy.call import check as check_cross_entropy


class Arguments(NamedTuple):
    """The arguments of a call."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    options: Options
    reduction: str
    stats: bool
    row_weight: Tensor | None = None
    num_valid: int | None = None

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors of the linear layer."""
        return self.input, self.linear_weight, self.linear_bias

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the loss: the input's; under autocast float32, as in PyTorch."""
        return loss_dtype(self.input)

    def denominator(self) -> Tensor | float:
        """Return the divisor of "mean", as in cross entropy."""
        return self.flat().on_shape().denominator()

    def with_layer(self, layer: Tensors) -> "Arguments":
        """Return the call with other tensors in its layer."""
        input, linear_weight, linear_bias = layer
        assert input is not None and linear_weight is not None
        return self._replace(input=input, linear_weight=linear_weight, linear_bias=linear_bias)

    def flat(self) -> "Arguments":
        """Return the call with all leading dimensions flattened into rows."""
        target = self.target
        target = target.reshape(-1, target.shape[-1]) if target.is_floating_point() else target.reshape(-1)
        row_weight = self.row_weight.reshape(-1) if isinstance(self.row_weight, Tensor) else self.row_weight
        return self._replace(input=self.input.reshape(-1, self.input.shape[-1]), target=target, row_weight=row_weight)

    def on(self, logits: Tensor) -> CrossEntropyArguments:
        """Return the call of cross entropy for these logits; of a flat call."""
        return CrossEntropyArguments(
            logits, self.target, self.options, self.reduction, False, self.stats, self.row_weight
        )

    def on_shape(self) -> CrossEntropyArguments:
        """Return the call of cross entropy for logits of the right shape, dtype and device, but without memory."""
        return self.on(self.input.new_empty(()).expand(self.input.shape[0], self.linear_weight.shape[0]))


def check(call: Arguments) -> Arguments:
    """Return `call` if its arguments are valid; under autocast, with the layer cast as autocast does for `F.linear`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not match, or an option is out of range. (The implementation checks the
            range of class indices, since it reads them anyway.)
    """
    input, linear_weight, linear_bias, target = call[:4]
    named = [("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias), ("target", target)]
    for name, tensor in named:
        if not isinstance(tensor, Tensor) and not (name == "linear_bias" and tensor is None):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if autocasts(input.device):
        call = _autocast(call)
        input, linear_weight, linear_bias, target = call[:4]
    if input.dtype not in FLOATING:
        raise TypeError(f"input: expected float64, float32, bfloat16 or float16, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input: expected shape (..., in_features), got a 0-d tensor")
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected the input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected it on the input's device {input.device}, got {tensor.device}")
    features = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight: expected shape (classes, in_features) with in_features {features} and at least one class, "
            f"got {tuple(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise ValueError(
            f"linear_bias: expected shape ({classes},), one number per class, got {tuple(linear_bias.shape)}"
        )
    _check_target(target, input.shape[:-1], classes)
    rows = input.shape[:-1]
    if isinstance(call.row_weight, Tensor) and call.row_weight.shape != rows:
        raise ValueError(
            f"row_weight: expected shape {tuple(rows)}, one number per row, got {tuple(call.row_weight.shape)}"
        )
    if call.num_valid is not None:
        call = call._replace(num_valid=_checked_num_valid(call.num_valid, target, rows.numel()))
    check_cross_entropy(_without_memory(call).flat().on_shape())
    return call


def _without_memory(call: Arguments) -> Arguments:
    """Return a call of the same shapes that can be flattened, as DTensors with uneven shards cannot."""
    if type(call.target) in PLAIN:
        return call

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    row_weight = empty(call.row_weight) if isinstance(call.row_weight, Tensor) else call.row_weight
    return call._replace(input=empty(call.input), target=empty(call.target), row_weight=row_weight)


def _checked_num_valid(num_valid: int, target: Tensor, rows: int) -> int:
    """Return `num_valid` if it may be the number of rows that are not ignored; the implementation counts them."""
    num_valid = integer("num_valid", num_valid)
    if target.is_floating_point() and num_valid != rows:
        raise ValueError(f"num_valid: expected {rows}, since no row is ignored with probabilities, got {num_valid}")
    if not 0 <= num_valid <= rows:
        raise ValueError(f"num_valid: expected a number of rows in [0, {rows}], got {num_valid}")
    return num_valid


def _check_target(target: Tensor, rows: torch.Size, classes: int) -> None:
    if target.is_floating_point() and target.shape != (*rows, classes):
        raise ValueError(
            f"target: expected probabilities of the logits' shape {(*rows, classes)}, got {tuple(target.shape)}; class "
            "indices have an integer dtype"
        )
    if not target.is_floating_point() and target.shape != rows:
        raise ValueError(
            f"target: expected class indices of shape {tuple(rows)}, the input's without its features, "
            f"got {tuple(target.shape)}"
        )


def _autocast(call: Arguments) -> Arguments:
    """Return the call with its layer cast as autocast does for `F.linear`."""
    dtype = torch.get_autocast_dtype(call.input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return call.with_layer([None if tensor is None else cast(tensor) for tensor in call.layer])
