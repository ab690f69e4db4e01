"""Arguments of InfoNCE, nt_xent and sup_con, and their validation.

The three differ in which logits of a row are positives and which are left out of its softmax. Their `api.py` says so by
a `Call`, and the reference and the ops of this folder compute all three.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.dtypes import INTEGER
from tlkernels._core.embeddings import check_embeddings
from tlkernels._core.reduction import REDUCTIONS

Mask = Tensor | tuple[Tensor, Tensor]


class Options(NamedTuple):
    """The options, in the order of the ops' arguments."""

    self_column: int = -1
    """Row i leaves out column i + self_column, its similarity to itself; -1: rows leave out no such column."""
    by_label: bool = False
    """The positives of a row are the columns with its id; else there is one, `target`, and the row leaves those out."""
    symmetric: bool = False
    normalize: bool = False
    label_smoothing: float = 0.0


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the ops' arguments: the first fields of `Arguments`."""

    query: Tensor
    key: Tensor | None
    negatives: Tensor | None
    logit_scale: Tensor | float
    target: Tensor | None
    mask: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        """The tensors that may need a gradient."""
        return self.query, self.key, self.negatives, self.logit_scale


class Arguments(NamedTuple):
    """The arguments of a call."""

    query: Tensor
    key: Tensor | None
    """None: the queries. The logits are then symmetric, and the positives must be."""
    negatives: Tensor | None
    logit_scale: Tensor | float
    target: Tensor | None
    """The positive column of each row; None: column i of row i. Not used with `by_label`."""
    mask: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    """None: the ids of the queries."""
    options: Options
    reduction: str
    dtype: torch.dtype
    """The dtype of the loss."""


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless `reduction` is valid."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def check_integers(name: str, tensor: object, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise TypeError or ValueError unless `tensor` is an integer tensor of this shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on the embeddings' device {device}, got {tensor.device}")


def check_info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    negatives: Tensor | None,
    mask: Mask | None,
    symmetric: bool,
    reduction: str,
    ranks: int,
) -> None:
    """Raise TypeError or ValueError unless the arguments of `info_nce` are valid.

    The implementation checks the range of `target`, since it reads the values anyway.
    """
    check_embeddings("query", query)
    check_embeddings("key", key, ("query", query), "(K, D)")
    rows, keys, device = query.shape[0], key.shape[0], query.device
    if negatives is not None:
        check_embeddings("negatives", negatives, ("query", query), "(M, D) or (N, M, D)")
        if negatives.dim() == 3 and negatives.shape[0] != rows:
            raise ValueError(
                f"negatives: expected shape (M, D), or (N, M, D) with N = {rows} queries, got {tuple(negatives.shape)}"
            )
    if target is not None:
        check_integers("target", target, (rows,), device)
    if isinstance(mask, tuple):
        if len(mask) != 2:
            raise ValueError(f"mask: expected a bool tensor or (query_ids, key_ids), got a tuple of {len(mask)}")
        check_integers("mask[0]", mask[0], (rows,), device)
        check_integers("mask[1]", mask[1], (keys,), device)
    elif mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a bool tensor or (query_ids, key_ids), got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, or integer ids as (query_ids, key_ids), got {mask.dtype}")
        shapes = [(rows, ranks * keys)]
        if negatives is not None:
            shared = negatives.dim() == 2
            shapes.append((rows, ranks * keys + negatives.shape[-2] * (ranks if shared else 1)))
        if mask.shape not in shapes:
            raise ValueError(f"mask: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"mask: expected it on the embeddings' device {device}, got {mask.device}")
    if symmetric and (rows != keys or target is not None):
        got = f"{rows} queries and {keys} keys" if rows != keys else "a target"
        raise ValueError(f"symmetric: expected as many keys as queries and the default target, got {got}")
    check_reduction(reduction)
