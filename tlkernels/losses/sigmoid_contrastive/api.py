"""The sigmoid contrastive loss (SigLIP): the function and the module."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels._core.embeddings import check_embeddings, scalar
from tlkernels._core.group import check_equal_shares, check_group, gather
from tlkernels._core.module import LossModule
from tlkernels.losses.sigmoid_contrastive.call import Arguments
from tlkernels.losses.sigmoid_contrastive.ops import IMPLEMENTATIONS


def sigmoid_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the sigmoid contrastive loss of SigLIP, without storing the N x N matrix.

    It is the binary cross entropy of every pair of a query and a key. A pair with equal row numbers is positive, all
    others are negative.

    Replaces::

        logits = logit_scale * query @ key.T + logit_bias
        sign = 2 * torch.eye(N) - 1
        loss = -F.logsigmoid(sign * logits).sum() / N

    Args:
        query: shape (N, D), with any strides; float64, float32, bfloat16 or float16. Usually normalised to length 1.
        key: the shape and dtype of `query`.
        logit_scale: multiplies the similarities. A number, or a tensor of shape () or (1,) that may require a gradient.
        logit_bias: added to the logits; a number or a tensor as `logit_scale`. SigLIP starts with a scale of 10 and a
            bias of -10.
        group: a torch.distributed process group over which the batch is split; every rank must pass tensors of equal
            shapes. The keys of all ranks take part. Averaged over the ranks, the loss and the gradients of the
            parameters (as data-parallel training averages them) are those of the whole batch on one process.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, a scalar in the dtype of `query` (float32 under autocast). It is differentiable with respect to
        `query`, `key`, `logit_scale` and `logit_bias`, any number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: Zhai et al. 2023 (arXiv 2303.15343), equation 2.
    """
    check_embeddings("query", query)
    check_embeddings("key", key, ("query", query))
    if key.shape != query.shape:
        raise ValueError(f"key: expected the query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    scale = scalar("logit_scale", logit_scale, query.device)
    bias = scalar("logit_bias", logit_bias, query.device)
    group = check_group(group)
    call = Arguments(query, key, scale, bias, 0, loss_dtype(query))
    implementation = resolve("sigmoid_contrastive", IMPLEMENTATIONS, call, impl)
    if group is not None:
        check_equal_shares(group, query=query, key=key)
        call = call._replace(key=gather(key, group), positive_offset=dist.get_rank(group) * query.shape[0])
    loss: Tensor = implementation.run(call)
    return loss


class SigmoidContrastiveLoss(LossModule, function=sigmoid_contrastive):
    """`sigmoid_contrastive` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time. A `Parameter` given as `logit_scale` or `logit_bias`
    becomes a parameter of the module. A copy of the module shares `group`; a pickled module looks for the group of the
    same ranks when it is loaded.

    Shape:
        `query` and `key` (N, D).
    """

    def __init__(
        self, *, logit_scale: float | Tensor, logit_bias: float | Tensor, group: Any = None, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.logit_scale, self.logit_bias, self.group, self.impl = logit_scale, logit_bias, group, impl

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss."""
        return sigmoid_contrastive(query, key, **self._options())
