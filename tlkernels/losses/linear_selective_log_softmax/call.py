"""Arguments of linear_selective_log_softmax and their validation."""

from typing import NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import FLOATING, autocasts
from tlkernels.losses.selective_log_softmax.call import Options


class Layer(NamedTuple):
    """The tensors of the linear layer."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None


class Arguments(NamedTuple):
    """The arguments of a call, with all leading dimensions flattened into rows."""

    layer: Layer
    """The input is a matrix (N, D)."""
    indices: Tensor
    """(N, K), int64, contiguous; -1 means no class."""
    options: Options


def check_layer(layer: Layer, names: tuple[str, str, str] = Layer._fields) -> Layer:
    """Return `layer` if its tensors are valid; under autocast, cast as autocast does for `F.linear`.

    Raises:
        TypeError: a tensor has the wrong type or dtype.
        ValueError: a shape or device does not match.
    """
    named = [(name, t) for name, t in zip(names, layer, strict=True) if name != names[2] or t is not None]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}")
    first, device = names[0], layer.input.device
    if layer.input.dim() == 0:
        raise ValueError(f"{first}: expected shape (..., in_features), got a 0-d tensor")
    if autocasts(device):
        layer = _autocast(layer)
    input, weight, bias = layer
    for name, tensor in zip(names[1:], (weight, bias), strict=True):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected the dtype of {first}, {input.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected it on the device of {first}, {device}, got {tensor.device}")
    features = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
        raise ValueError(
            f"{names[1]}: expected shape (classes, in_features) with in_features {features} and at least one class, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[2]}: expected shape ({weight.shape[0]},), one number per class, got {tuple(bias.shape)}"
        )
    return layer


def flat(layer: Layer) -> Layer:
    """Return the layer with the leading dimensions of its input flattened into rows."""
    rows = layer.input.shape[:-1]
    return layer._replace(input=layer.input.reshape(rows.numel(), layer.input.shape[-1]))


def _autocast(layer: Layer) -> Layer:
    dtype = torch.get_autocast_dtype(layer.input.device.type)
    input, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in layer)
    assert input is not None and weight is not None
    return Layer(input, weight, bias)
