"""SupCon: the function and the module. The computation is InfoNCE's (tlkernels/losses/info_nce)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import Implementation, resolve
from tlkernels._core.dtypes import compute_dtype, loss_dtype
from tlkernels._core.embeddings import check_embeddings, resolve_scale
from tlkernels._core.group import check_equal_shares, check_group, gather
from tlkernels._core.module import LossModule
from tlkernels._core.options import flag
from tlkernels.losses.info_nce.call import Arguments, Options, check_integers, check_reduction
from tlkernels.losses.info_nce.ops import IMPLEMENTATIONS


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the supervised contrastive loss (SupCon), without storing the N x N matrix.

    The positives of a row are the other rows with its label. A row's loss is the mean, over its positives, of minus
    their log-probability among all other rows.

    Replaces::

        if normalize:
            features = F.normalize(features, dim=-1)
        itself = torch.eye(N, dtype=torch.bool)
        positive = (labels[:, None] == labels) & ~itself
        log_p = (logit_scale * features @ features.T).masked_fill(itself, -torch.inf).log_softmax(1)
        losses = -torch.where(positive, log_p, 0).sum(1) / positive.sum(1)     # 0 for a row without a positive
        loss = losses.sum() / positive.any(1).sum()                            # reduction="mean"

    Args:
        features: shape (N, D), with any strides; float64, float32, bfloat16 or float16. Several views of an example are
            several rows. Or shape (batch, views, D) with one label for all views of an example, which is the same as
            `features.flatten(0, 1)` with `labels.repeat_interleave(views)`.
        labels: any integer dtype and shape (N,), or (batch,). Without labels (SimCLR), give each example a label of its
            own.
        temperature: above 0; divides the similarities. A number, or a tensor of shape () or (1,) that may require a
            gradient.
        logit_scale: 1 / temperature; multiplies the similarities. Give at most one of the two; the default is 1.
        normalize: whether to divide the features by their 2-norm, as `F.normalize` does.
        reduction: "none", "mean" or "sum". "mean" is over the rows that have a positive; if none has one, it is NaN
            with zero gradients.
        group: a torch.distributed process group over which the batch is split; every rank must pass tensors of equal
            shapes. The features of all ranks take part. Averaged over the ranks, the loss and the gradients of the
            parameters (as data-parallel training averages them) are those of the whole batch on one process. For this,
            "mean" and "sum" scale the sum of this rank.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the dtype of `features` (float32 under autocast). It is a scalar, or with `reduction="none"` of
        shape (N,) or (batch, views). The loss is differentiable with respect to `features`, `temperature` and
        `logit_scale`, any number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: Khosla et al. 2020 (arXiv 2004.11362), equation 2 (L_out). The authors' code also multiplies the loss by
    temperature / base_temperature; this function does not.
    """
    check_embeddings("features", features, shape="(N, D) or (batch, views, D)")
    check_integers("labels", labels, features.shape[:1], features.device)
    by_view = features.dim() == 3
    each = features.shape[:-1]
    if by_view:
        features, labels = features.flatten(0, 1), labels[:, None].expand(each).reshape(-1)
    check_reduction(reduction)
    group = check_group(group)
    scale = resolve_scale(temperature, logit_scale, features.device)
    options = Options(self_column=0, by_label=True, normalize=flag("normalize", normalize))
    call = Arguments(features, None, None, scale, None, None, labels, None, options, reduction, loss_dtype(features))
    implementation = resolve("sup_con", IMPLEMENTATIONS, call, impl)
    loss: Tensor = implementation.run(call) if group is None else _over_ranks(implementation, call, group)
    return loss.view(each) if by_view and reduction == "none" else loss


def _over_ranks(implementation: Implementation, call: Arguments, group: Any) -> Tensor:
    """Return the loss of this rank's rows against those of all ranks."""
    features, labels, reduction = call.query, call.query_ids, call.reduction
    assert labels is not None
    check_equal_shares(group, features=features)
    everyones = gather(labels.long(), group)
    call = call._replace(
        key=gather(features, group),
        key_ids=everyones,
        options=call.options._replace(self_column=dist.get_rank(group) * features.shape[0]),
        reduction="none" if reduction == "none" else "sum",
        dtype=compute_dtype(features),
    )
    loss: Tensor = implementation.run(call)
    if reduction != "none":
        loss = loss * dist.get_world_size(group)
    if reduction == "mean":
        _, label, count = torch.unique(everyones, return_inverse=True, return_counts=True)
        counted = (count[label] > 1).sum()
        loss = torch.where(counted > 0, loss / counted.clamp(min=1), torch.nan)
    return loss.to(loss_dtype(features))


class SupConLoss(LossModule, _Loss, function=sup_con):
    """`sup_con` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time. A `Parameter` given as `temperature` or `logit_scale`
    becomes a parameter of the module. A copy of the module shares `group`; a pickled module looks for the group of the
    same ranks when it is loaded.

    Shape:
        `features` (N, D) or (batch, views, D); `labels` (N,) or (batch,).
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Any = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature, self.logit_scale = temperature, logit_scale
        self.normalize, self.group, self.impl = normalize, group, impl

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        return sup_con(features, labels, **self._options())
