"""What the losses of `tlkernels.integrations.sentence_transformers` compute from the embeddings of the columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import (
    SimilarityFunction,
    all_gather_with_grad,
    cos_sim,
    dot_score,
    get_rank,
    pytorch_cos_sim,
    similarity_fct_name,
)
from torch import Tensor

from tlkernels import info_nce

_BLOCK = 256  # rows of the guide's similarities that are in memory at once
_COSINE_EPS = 1e-8  # of nn.CosineSimilarity


def is_cosine(similarity_fct: Callable[..., Any], name: str) -> bool:
    """Return whether a similarity divides by the norms. Raises NotImplementedError unless it is served."""
    function: Any = similarity_fct
    if getattr(function, "__func__", None) is SentenceTransformer.similarity:
        function = SimilarityFunction.to_similarity_fn(function.__self__.similarity_fn_name)
    if function in (cos_sim, pytorch_cos_sim):
        return True
    if function is dot_score:
        return False
    raise NotImplementedError(
        f"similarity_fct: expected cos_sim, dot_score, or a SentenceTransformer's similarity that is one of them; got "
        f"{similarity_fct_name(similarity_fct)}. sentence_transformers.losses.{name} serves any similarity"
    )


def ranking_loss(loss: Any, embeddings: Sequence[Tensor]) -> Tensor:
    """Return what a MultipleNegativesRankingLoss with the options of `loss` computes from its columns' embeddings.

    Row i classifies query i among the documents, and document i among the queries and the documents. Each of the two is
    one call of `info_nce`, with `log(sum(exp(logits))) - positive` as its loss; one softmax over both is then the
    `logaddexp` of the losses.
    """
    normalize = is_cosine(loss.similarity_fct, type(loss).__name__)
    if any(x.layout is not torch.strided for x in embeddings):
        raise NotImplementedError(
            "embeddings: expected dense tensors, got sparse ones; sentence_transformers.sparse_encoder has losses"
        )
    directions, joint = set(loss.directions), loss.partition_mode == "joint"
    if not joint and directions - {"query_to_doc", "doc_to_query"}:
        raise NotImplementedError(
            f"directions: with partition_mode='per_direction' expected query_to_doc and doc_to_query at most, got "
            f"{sorted(directions)}; use partition_mode='joint'"
        )
    # Their similarities are in float32 at least.
    queries, *docs = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in embeddings)
    mode = loss.hardness_mode if loss.hardness_strength > 0 else None
    if mode == "hard_negatives" and len(docs) == 1:
        mode = None
    if mode and normalize:
        queries, *docs = (F.normalize(x, dim=-1) for x in (queries, *docs))
        normalize = False
    rows, start = len(queries), 0
    if loss.gather_across_devices:
        queries, *docs = (all_gather_with_grad(x) for x in (queries, *docs))
        start = get_rank() * rows
    nce = partial(info_nce, logit_scale=loss.scale, normalize=normalize)
    if not joint and "doc_to_query" in directions and mode is None and len(queries) == rows:
        return nce(queries, docs[0], negatives=_cat(docs[1:]) if docs[1:] else None, symmetric=True)

    ids = torch.arange(len(queries), device=queries.device)
    own = ids[start : start + rows]
    query, *own_docs = (x[start : start + rows] for x in (queries, *docs))
    others = [queries] if joint and "query_to_query" in directions else []
    reduction = "mean" if directions <= {"query_to_doc", "query_to_query"} else "none"
    if mode:
        losses = _hardened(mode, loss, query, own_docs, docs, others, own, ids, reduction)
    else:
        mask = _own_out(own, ids, docs, others) if others else None
        losses = nce(query, _cat(docs + others), own, mask=mask, reduction=reduction)
    if not joint:
        if "doc_to_query" in directions:
            losses = (losses + nce(own_docs[0], queries, own, reduction="none")) / 2
        return losses.mean()

    others = docs if "doc_to_doc" in directions else []
    if "doc_to_query" in directions:
        mask = _own_out(own, ids, [queries], others) if others else None
        back = nce(own_docs[0], _cat([queries, *others]), own, mask=mask, reduction="none")
        losses = torch.logaddexp(losses, back)
    elif others:
        # Of these logits none is the positive, which `info_nce` needs as the target.
        mask, target = _own_out(own, ids, [], others), torch.full_like(own, sum(map(len, others)))
        back = nce(own_docs[0], _cat(others), target, negatives=query.unsqueeze(1), mask=mask, reduction="none")
        losses = _without_second_positive(torch.logaddexp(losses, back))
    return losses.mean()


def _hardened(
    mode: str, loss: Any, query: Tensor, own_docs: list[Tensor], docs: list[Tensor], queries: list[Tensor],
    own: Tensor, ids: Tensor, reduction: str,
) -> Tensor:  # fmt: skip
    """Return the losses of the queries, with `hardness_strength * similarity.detach()` added to logits of negatives.

    With `reduction="mean"` it may be their mean.
    """
    scale, strength = loss.scale, loss.hardness_strength
    if mode == "hard_negatives":  # only the query's own negatives: few, so their logits are computed here
        mask = _own_out(own, ids, docs[:1], docs[1:] + queries)
        losses = info_nce(query, _cat(docs + queries), own, mask=mask, logit_scale=scale, reduction="none")
        positive, *similarities = ((query * doc).sum(-1) for doc in own_docs)
        logits = [scale * (each - positive) + strength * each.detach() for each in similarities]
        return torch.stack([losses, *logits]).logsumexp(0)
    # With twice the features one product is a logit and its penalty. The query's own documents without a penalty are
    # keys of it alone.
    count = 1 if mode == "all_negatives" else len(docs)
    mask = _own_out(own, ids, docs[count:], docs[:count] + queries)
    keys = [torch.cat([doc, doc.detach()], -1) for doc in docs[count:] + docs[:count]]
    keys += [F.pad(each, (0, each.shape[-1])) for each in queries]
    alone = F.pad(torch.stack(own_docs[:count], 1), (0, query.shape[-1]))
    query = torch.cat([scale * query, strength * query.detach()], -1)
    target = torch.full_like(own, sum(map(len, keys)))
    return info_nce(query, _cat(keys), target, negatives=alone, mask=mask, reduction=reduction)


def guided_loss(loss: Any, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """Return what a GISTEmbedLoss with the options of `loss` computes from the embeddings of the model and the guide.

    The guide decides, for each row, which columns are too similar to be negatives: a bool matrix.
    """
    (anchor, *docs), (anchor_guide, *doc_guides) = embeddings, guides
    start, rows = 0, len(anchor)
    if loss.gather_across_devices:
        docs, doc_guides = ([all_gather_with_grad(x) for x in tensors] for tensors in (docs, doc_guides))
        start = get_rank() * rows
    anchor, *docs = (F.normalize(x, dim=-1, eps=_COSINE_EPS) for x in (anchor, *docs))
    positive, own = docs[0][start : start + rows], torch.arange(start, start + rows, device=anchor.device)
    with torch.no_grad(), torch.autocast(anchor.device.type, enabled=False):
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (anchor_guide, *doc_guides))
        anchor_guide, *doc_guides = (F.normalize(x, dim=-1, eps=_COSINE_EPS) for x in wide)
        positive_guide = doc_guides[0][start : start + rows]
        limit = (anchor_guide * positive_guide).sum(-1)
        limit = limit - loss.margin * (limit.abs() if loss.margin_strategy == "relative" else 1)
        anchors, anchor_guides = ([anchor], [anchor_guide]) if loss.contrast_anchors else ([], [])
        mask = _above(limit, anchor_guide, _cat([doc_guides[0], *anchor_guides, *doc_guides[1:]]))
        back_mask = _above(limit, positive_guide, doc_guides[0]) if loss.contrast_positives else None
    nce = partial(info_nce, temperature=loss.temperature)
    keys = _cat([docs[0], *anchors, *docs[1:]])
    if back_mask is None:
        return nce(anchor, keys, own, mask=mask)
    losses = nce(anchor, keys, own, mask=mask, reduction="none")
    target = torch.full_like(own, len(docs[0]))
    back = nce(positive, docs[0], target, negatives=anchor.unsqueeze(1), mask=back_mask, reduction="none")
    return _without_second_positive(torch.logaddexp(losses, back)).mean()


def _above(limit: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return which similarities are above the limit of their row, without holding them all."""
    mask = torch.empty(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for block, some, least in zip(*(x.split(_BLOCK) for x in (mask, rows, limit)), strict=True):
        torch.gt(some @ columns.T, least.unsqueeze(1), out=block)
    return mask


def _own_out(own: Tensor, ids: Tensor, kept: list[Tensor], blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a mask as ids: of the keys `kept + blocks`, each row leaves its own one of each block out."""
    return own, torch.cat([torch.full_like(ids, -1)] * len(kept) + [ids] * len(blocks))


def _without_second_positive(losses: Tensor) -> Tensor:
    """Return log(exp(losses) - 1). The positive is in the sum twice, so exp(losses) is at least 2: no cancellation."""
    return losses + torch.log1p(-torch.exp(-losses))


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
