"""The least work of each loss, forward and backward together, and the names of its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

Sizes = Sequence[int]


class Cost(NamedTuple):
    """`dims` names the sizes. `products` counts multiply-adds of matrices, and `elements` numbers read or written."""

    dims: tuple[str, ...]
    products: Callable[[Sizes], int]
    elements: Callable[[Sizes], int]


def _none(sizes: Sizes) -> int:
    return 0


def _times(count: int) -> Callable[[Sizes], int]:
    """Tensors of all sizes that are read or written."""
    return lambda sizes: count * prod(sizes)


def _layer(sizes: Sizes) -> int:
    """Input and weight are read, their gradients written."""
    rows, features, classes = sizes
    return 2 * features * (rows + classes)


def _two_layers(sizes: Sizes) -> int:
    rows, features, teacher_features, classes = sizes
    return (2 * features + teacher_features) * (rows + classes)


def _pairs(products: int) -> Cost:
    """Each loss needs the similarities once. The gradient takes one product more for each tensor of embeddings."""
    return Cost(("N", "D"), lambda sizes: products * sizes[0] ** 2 * sizes[1], _times(4 if products == 3 else 2))


_LOGITS = Cost(("N", "V"), _none, _times(2))
_TWO_LOGITS = Cost(("N", "V"), _none, _times(3))
_LINEAR = Cost(("N", "H", "V"), lambda sizes: 3 * prod(sizes), _layer)
_LINEAR_TEACHER = Cost(("N", "H", "T", "V"), lambda sizes: sizes[0] * sizes[3] * (3 * sizes[1] + sizes[2]), _two_layers)

COSTS: Mapping[str, Cost] = {
    "cross_entropy": _LOGITS,
    "linear_cross_entropy": _LINEAR,
    "selective_log_softmax": _LOGITS,
    "linear_selective_log_softmax": _LINEAR,
    "distillation": _TWO_LOGITS,
    "linear_distillation": _LINEAR_TEACHER,
    "topk_distillation": _LOGITS,
    "info_nce": _pairs(3),
    "nt_xent": _pairs(2),
    "sup_con": _pairs(2),
    "sigmoid_contrastive": _pairs(3),
    "mse": _TWO_LOGITS._replace(dims=("N", "D")),
    "rmse": _TWO_LOGITS._replace(dims=("N", "D")),
}
"""By loss. N: rows; V: classes; H: features of the input, T: of the teacher's; D: features of an embedding."""


def dims(loss: str, shape: Sizes) -> dict[str, int]:
    """Return the sizes by name; positions after the class dimension count as rows."""
    names = COSTS[loss].dims
    sizes = (shape[0] * prod(shape[2:]), shape[1]) if names == ("N", "V") else shape
    return dict(zip(names, sizes, strict=True))


def flops(loss: str, shape: Sizes, options: Mapping[str, Any]) -> int:
    """Return the floating-point operations of the matrix products that no implementation can avoid.

    An implementation that keeps no N x N or N x V tensor may have to compute it twice, which is not counted here.
    """
    return int(2 * COSTS[loss].products(shape) * float(options.get("counted", 1.0)))


def nbytes(loss: str, shape: Sizes, options: Mapping[str, Any], itemsize: int) -> int:
    """Return the least bytes that are read and written: each input and each gradient once."""
    elements = COSTS[loss].elements(shape)
    if options.get("probabilities"):
        elements += prod(shape)  # the targets
    return elements * itemsize
