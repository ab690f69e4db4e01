"""pytorch-metric-learning: its NTXentLoss and SupConLoss, computed by our kernels without a matrix of pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from torch import Tensor

from tlkernels.losses.info_nce.api import info_nce
from tlkernels.losses.nt_xent.api import nt_xent
from tlkernels.losses.sup_con.api import sup_con

Pairs = tuple[Tensor, Tensor]


class _Batch(NamedTuple):
    query: Tensor
    key: Tensor
    positive: Pairs
    options: dict[str, Any]
    ids: Pairs | None = None
    """The labels of queries and keys, where pairs are those of labels."""
    itself: bool = False
    """Whether the host pairs no query with the key of its number."""
    negatives: Tensor | None = None
    """How many times each key is a negative of each query, where a miner chose the pairs."""


class _OnKernels:
    """What both losses have in common; the host's class comes second among the bases."""

    def __init__(self, temperature: float, *, impl: str, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)  # type: ignore[call-arg]
        self.impl = impl
        self._check_distance()

    def _check_distance(self) -> Any:
        host: Any = self
        distance, name = host.distance, type(host.distance).__name__
        if type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.p != 2 or distance.power != 1:
            found = f"{name}(p={distance.p}, power={distance.power})"
            expected = "CosineSimilarity or DotProductSimilarity with p=2 and power=1"
            raise ValueError(f"distance: expected {expected}, got {found}; {self._theirs()}")
        return distance

    def _theirs(self) -> str:
        return f"use pytorch_metric_learning.losses.{type(self).__name__} for it"

    def _of(self, batch: _Batch) -> dict[str, Any]:
        raise NotImplementedError

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """Return the losses of pairs or elements, which the host's reducer reduces."""
        host: Any = self
        distance = self._check_distance()
        for name, tensor in (("embeddings", embeddings), ("ref_emb", ref_emb)):
            if tensor.dim() != 2:
                raise ValueError(f"{name}: expected shape (N, D), got {tuple(tensor.shape)}")
        if distance.collect_stats:
            normalized = [distance.maybe_normalize(tensor.detach()) for tensor in (embeddings, ref_emb)]
            distance.reset_stats()
            distance.set_default_stats(embeddings, ref_emb, *normalized)
        options = {"normalize": bool(distance.normalize_embeddings), "reduction": "none"}
        options |= {"temperature": host.temperature, "impl": self.impl}
        if indices_tuple is None:
            if labels is None or ref_labels is None:
                name = "labels" if labels is None else "ref_labels"
                raise ValueError(f"{name}: expected the labels, or an indices_tuple, got None")
            _, both = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
            ids, itself = (both[: len(labels)], both[len(labels) :]), ref_labels is labels
            positive, negative_count = _pairs_of_labels(*ids, itself)
            batch = _Batch(embeddings, ref_emb, positive, options, ids, itself)
        else:
            positive, negative = _pairs_of_tuple(indices_tuple, embeddings.device)
            negative_count = negative[0].shape[0]
            counts = torch.zeros(embeddings.shape[0], ref_emb.shape[0], dtype=torch.int32, device=embeddings.device)
            counts.index_put_(negative, counts.new_ones(()), accumulate=True)
            if bool(counts[positive].any()):
                both_kinds = "expected each pair to be positive or negative, got one as both"
                raise ValueError(f"indices_tuple: {both_kinds}; {self._theirs()}")
            batch = _Batch(embeddings, ref_emb, positive, options, negatives=counts)
        pair_counts = (positive[0].shape[0], negative_count)
        if min(pair_counts) == 0 or max(pair_counts) == 1:  # also with one pair of each, which is the host's rule
            zero: dict[str, Any] = host.zero_losses()
            return zero
        return {"loss": self._of(batch)}


class NTXentLoss(_OnKernels, losses.NTXentLoss):  # type: ignore[misc]
    """`pytorch_metric_learning.losses.NTXentLoss` without a matrix of all positive and negative pairs.

    Replaces::

        losses.NTXentLoss(temperature=0.07, **kwargs)

    The loss of a positive pair is the cross entropy of its similarity among that and the similarities of the negative
    pairs of its anchor: `info_nce` with one query for each positive pair, masked by label or by a miner's pairs. Where
    each label occurs twice, it is `nt_xent`. A pair that is given several times counts as often.

    Args:
        temperature: divides the similarities, above 0.
        impl: "auto" (default), "native", "triton" or "reference".
        kwargs: those of the host's class. `distance` is CosineSimilarity or DotProductSimilarity with p=2 and power=1;
            any `reducer` and `embedding_regularizer`.

    Shape:
        As the host's: `embeddings` (N, D), `labels` (N,), `indices_tuple` of pairs or triplets, `ref_emb` (K, D),
        `ref_labels` (K,).

    Raises:
        ValueError: another distance; no labels; a pair of the miner is positive and negative.
    """

    def __init__(self, temperature: float = 0.07, *, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(temperature, impl=impl, **kwargs)

    def _of(self, batch: _Batch) -> dict[str, Any]:
        query, key, (a, p) = batch[:3]
        if batch.ids is None:
            assert batch.negatives is not None
            (a, p), each = _unique(batch.positive, key.shape[0])
            copies = int(batch.negatives.max())  # a key that is k times a negative of an anchor is k keys
            mask = torch.cat([batch.negatives[a] <= k for k in range(copies)], 1)
            rows = info_nce(query[a], key.repeat(copies, 1), p, mask=mask, **batch.options)[each]
        elif query is key and batch.itself and torch.equal(a, torch.arange(query.shape[0], device=a.device)):
            first = a < p
            order = torch.cat([a[first], p[first]])
            rows = nt_xent(query[a[first]], query[p[first]], **batch.options)[order.argsort()]
        else:
            rows = info_nce(query[a], key, p, mask=(batch.ids[0][a], batch.ids[1]), **batch.options)
        return {"losses": rows, "indices": batch.positive, "reduction_type": "pos_pair"}


class SupConLoss(_OnKernels, losses.SupConLoss):  # type: ignore[misc]
    """`pytorch_metric_learning.losses.SupConLoss` without the matrix of similarities.

    Replaces::

        losses.SupConLoss(temperature=0.1, **kwargs)

    The loss of an element is the mean, over its positive pairs, of minus their log-probability among all its pairs:
    `sup_con`; with `ref_emb` or a miner, the mean of `info_nce` of its positive pairs. The host's default reducer takes
    the mean of the losses above 0.

    Arguments, shapes and errors are those of `NTXentLoss`; the default of `temperature` is the host's.
    """

    def __init__(self, temperature: float = 0.1, *, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(temperature, impl=impl, **kwargs)

    def _of(self, batch: _Batch) -> dict[str, Any]:
        query, key, (a, p) = batch[:3]
        elements = torch.arange(query.shape[0], device=a.device)
        mask: Any = None
        if batch.ids is not None and batch.itself:
            if query is key:
                rows = sup_con(query, batch.ids[0], **batch.options)
                return {"losses": rows, "indices": elements, "reduction_type": "element"}
            mask = (a, elements)
        if batch.negatives is not None:
            (a, p), _ = _unique(batch.positive, key.shape[0])
            others = batch.negatives == 0
            others[a, p] = False
            mask = others[a]
        pairs = info_nce(query[a], key, p, mask=mask, **batch.options)
        total = pairs.new_zeros(query.shape[0]).index_add(0, a, pairs)
        rows = total / torch.bincount(a, minlength=query.shape[0]).clamp(min=1)
        return {"losses": rows, "indices": elements, "reduction_type": "element"}


def _pairs_of_labels(ids: Tensor, ref_ids: Tensor, itself: bool) -> tuple[Pairs, int]:
    """Return the positive pairs, in the host's order, and the number of negative pairs."""
    grouped, order = ref_ids.sort(stable=True)
    first, end = (torch.searchsorted(grouped, ids, right=right) for right in (False, True))
    count = end - first
    a = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(count)
    p = order[(first - count.cumsum(0) + count)[a] + torch.arange(a.shape[0], device=ids.device)]
    negative_count = ids.shape[0] * ref_ids.shape[0] - a.shape[0]
    return ((a[a != p], p[a != p]) if itself else (a, p)), negative_count


def _pairs_of_tuple(indices: tuple[Tensor, ...], device: torch.device) -> tuple[Pairs, Pairs]:
    """Return the positive and the negative pairs."""
    if len(indices) not in (3, 4):
        raise ValueError(f"indices_tuple: expected triplets or pairs, 3 or 4 tensors, got {len(indices)}")
    a, p, *others = (tensor.to(device, torch.long) for tensor in indices)
    return (a, p), (others[0] if len(indices) == 4 else a, others[-1])


def _unique(pairs: Pairs, columns: int) -> tuple[Pairs, Tensor]:
    """Return the distinct pairs, and the number of each pair among them."""
    distinct, each = torch.unique(pairs[0] * columns + pairs[1], return_inverse=True)
    return (distinct // columns, distinct % columns), each
