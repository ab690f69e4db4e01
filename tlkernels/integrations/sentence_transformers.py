"""Losses for the trainer of sentence-transformers, under the names of its own: `from ... import ... as losses`.

Each is a subclass of the library's loss, with its constructor, attributes, configuration, values and gradients. Only
the step from embeddings to the loss is ours; it stores no matrix of similarities.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import batch_to_device, check_teacher_targets
from torch import Tensor
from typing_extensions import deprecated

from tlkernels import distillation
from tlkernels.integrations.sentence_transformers_rows import guided_loss, is_cosine, ranking_loss

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "DistillKLDivLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_DEPRECATED = (
    "deprecated in sentence-transformers; use the class without Symmetric in its name, with "
    "directions=('query_to_doc', 'doc_to_query') and partition_mode='per_direction'"
)


class _Ranking:
    """Refuses a similarity that is not served, in the constructor and when it is set later."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("similarity_fct", "loss"):  # the cached losses keep their options in another loss
            is_cosine(getattr(value, "similarity_fct", value), type(self).__name__)
        super().__setattr__(name, value)


class MultipleNegativesRankingLoss(_Ranking, theirs.MultipleNegativesRankingLoss):
    """`sentence_transformers.losses.MultipleNegativesRankingLoss` by `tlkernels.info_nce`.

    Replaces::

        scores = {"query_to_doc": similarity_fct(queries, docs), ...}  # and up to three more matrices
        loss = -(positive_scores - scores.logsumexp(1)).mean()

    All options are served: scale, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength.
    `scale` may be a tensor that requires a gradient.

    Raises:
        NotImplementedError: `similarity_fct` is not cos_sim, dot_score or a SentenceTransformer's `similarity` that is
            one of them.
        ValueError: as the library's.

    Source: sentence-transformers 6.2, `sentence_transformer/losses/multiple_negatives_ranking.py`.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of the columns' embeddings, each of shape (N, D): query, positive, negatives."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected at least 2 columns, got {len(embeddings)}")
        return ranking_loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(_Ranking, theirs.CachedMultipleNegativesRankingLoss):
    """`sentence_transformers.losses.CachedMultipleNegativesRankingLoss` by `tlkernels.info_nce`.

    The library caches the gradients, embeds each mini-batch twice, and computes `mini_batch_size` rows of scores at a
    time. Here the whole batch is one call; `mini_batch_size` is that of the embedding alone. The rest is as in
    `MultipleNegativesRankingLoss`.

    Source: sentence-transformers 6.2, `sentence_transformer/losses/cached_multiple_negatives_ranking.py`.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the mini-batches' embeddings; with `with_backward` detached, after its backward."""
        return _finished(ranking_loss(self, [torch.cat(column) for column in reps]), with_backward)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # a subclass of a deprecated class

    @deprecated(f"MultipleNegativesSymmetricRankingLoss is {_DEPRECATED}")
    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, theirs.MultipleNegativesSymmetricRankingLoss
    ):
        """`MultipleNegativesRankingLoss` in both directions, with one softmax each. Deprecated in the library."""

    @deprecated(f"CachedMultipleNegativesSymmetricRankingLoss is {_DEPRECATED}")
    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, theirs.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """`CachedMultipleNegativesRankingLoss` in both directions, one softmax each. Deprecated in the library."""


class GISTEmbedLoss(theirs.GISTEmbedLoss):
    """`sentence_transformers.losses.GISTEmbedLoss` by `tlkernels.info_nce`.

    Replaces::

        scores = torch.cat([ap_sim, aa_sim, pp_sim, an_sim], 1)  # each of all pairs, with -inf where the guide says so
        loss = F.cross_entropy(scores / temperature, torch.arange(N))

    All options are served. The masks are bool matrices, N x 4N at most with negatives: a byte an entry, where the
    library has several float matrices, and all pairs' products of embeddings, N x N x D, to make them.

    Source: sentence-transformers 6.2, `sentence_transformer/losses/gist_embed.py`.
    """

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the loss of two or three columns: anchor, positive, and maybe a negative."""
        features = list(sentence_features)
        if len(features) not in (2, 3):
            raise ValueError(f"sentence_features: expected 2 or 3 columns, got {len(features)}")
        for_guide = [dict(column) for column in features]  # the model writes its outputs into its own
        embeddings = embed_columns(self.model, features)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._for_guide(column) for column in features]
            guides = embed_columns(self.guide, for_guide)
        return guided_loss(self, embeddings, guides)

    def _for_guide(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the features of the same texts from the guide's tokenizer."""
        ids: Any = features["input_ids"]
        if "cu_seq_lens_q" in features:  # all texts in one row
            ids = ids[0].split(features["cu_seq_lens_q"].diff().tolist())
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        on_device: dict[str, Tensor] = batch_to_device(self.guide.preprocess(texts), self.guide.device)
        return on_device


class CachedGISTEmbedLoss(theirs.CachedGISTEmbedLoss):
    """`sentence_transformers.losses.CachedGISTEmbedLoss` by `tlkernels.info_nce`, with any number of negatives.

    `mini_batch_size` is that of the embedding alone; the rest is as in `GISTEmbedLoss`.

    Source: sentence-transformers 6.2, `sentence_transformer/losses/cached_gist_embed.py`.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the mini-batches' embeddings; with `with_backward` detached, after its backward."""
        embeddings, guides = ([torch.cat(column) for column in each] for each in (reps, reps_guided))
        return _finished(guided_loss(self, embeddings, guides), with_backward)


class DistillKLDivLoss(theirs.DistillKLDivLoss):
    """`sentence_transformers.losses.DistillKLDivLoss` by `tlkernels.distillation`.

    Replaces::

        log_probs = torch.log_softmax(student_scores / student_temperature, 1)
        probs = torch.softmax(labels / teacher_temperature, 1)
        loss = nn.KLDivLoss(reduction="batchmean")(log_probs, probs) * student_temperature**2

    All options are served, with any `similarity_fct`: the scores are one number for each candidate.

    Source: sentence-transformers 6.2, `sentence_transformer/losses/distill_kl_div.py`.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Return the loss of the columns' embeddings, each (N, D): query and C candidates; `labels` is (N, C)."""
        query, *candidates = embeddings
        shape = len(query), len(candidates)
        if len(candidates) < 2:
            raise ValueError(f"embeddings: expected at least 3 columns, got {len(embeddings)}")
        if labels.shape != shape:
            raise ValueError(f"labels: expected teacher scores of shape {shape}, got {tuple(labels.shape)}")
        labels = labels.detach()
        if not self._checked_teacher_scale:
            self._checked_teacher_scale = True
            probs = torch.softmax(labels / self.teacher_temperature, 1)
            check_teacher_targets(probs, labels, self.teacher_temperature, type(self).__name__)
        student = torch.stack([self.similarity_fct(query, candidate) for candidate in candidates], 1)
        # The teacher's scores such that one temperature serves both.
        teacher = labels * (self.student_temperature / self.teacher_temperature)
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        return distillation(student.to(dtype), teacher.to(dtype), temperature=self.student_temperature)


def _finished(loss: Tensor, with_backward: bool) -> Tensor:
    if with_backward:
        loss.backward()
        loss = loss.detach()
    return loss
