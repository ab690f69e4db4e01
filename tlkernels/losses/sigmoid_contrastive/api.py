"""The sigmoid contrastive loss of SigLIP: the public function and the module."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels._core.embeddings import check_embeddings, scalar
from tlkernels._core.group import check_equal_shares, check_group, gather
from tlkernels._core.module import LossModule
from tlkernels.losses.sigmoid_contrastive.call import Call
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
    """Binary cross entropy of every pair of query and key; the pairs of equal number are positive, all others negative.

    Replaces::

        logits = logit_scale * query @ key.T + logit_bias
        sign = 2 * torch.eye(N) - 1
        loss = -F.logsigmoid(sign * logits).sum() / N

    Args:
        query: shape (N, D), any strides; float64, float32, bfloat16 or float16. Usually of norm 1.
        key: of the same shape and dtype.
        logit_scale: multiplies the similarities. A number, or a tensor of shape () or (1,), which gets its gradient.
        logit_bias: added to the logits; the same kinds. SigLIP starts at a scale of 10 and a bias of -10.
        group: a torch.distributed process group, every rank of which calls this with tensors of equal shapes. The keys
            of all ranks take part. The mean over ranks of the loss is the loss of the whole batch on one process, and
            so is the mean of every parameter's gradient, which data-parallel training takes (tlkernels/_core/group.py).
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss, 0-d, in the query's dtype (under autocast float32). Differentiable by all four, twice and more.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.

    Source: Zhai et al. 2023 (arXiv 2303.15343), equation 2.
    """
    check_embeddings("query", query)
    check_embeddings("key", key, ("query", query))
    if key.shape != query.shape:
        raise ValueError(f"key: expected the query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    scale = scalar("logit_scale", logit_scale, query.device)
    bias = scalar("logit_bias", logit_bias, query.device)
    group = check_group(group)
    call = Call(query, key, scale, bias, 0, loss_dtype(query))
    implementation = resolve("sigmoid_contrastive", IMPLEMENTATIONS, call, impl)
    if group is not None:
        check_equal_shares(group, query=query, key=key)
        call = call._replace(key=gather(key, group), positive_offset=dist.get_rank(group) * query.shape[0])
    loss: Tensor = implementation.run(call)
    return loss


class SigmoidContrastiveLoss(LossModule, function=sigmoid_contrastive):
    """`sigmoid_contrastive` as a module; the arguments are its options, and attributes that can be set at any time.

    A `Parameter` given as `logit_scale` or `logit_bias` becomes the module's own and is trained. A copy of the module
    shares `group`; a pickle finds the group of the same ranks where it is loaded.
    """

    def __init__(
        self, *, logit_scale: float | Tensor, logit_bias: float | Tensor, group: Any = None, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.logit_scale, self.logit_bias, self.group, self.impl = logit_scale, logit_bias, group, impl

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss."""
        return sigmoid_contrastive(query, key, **self._options())
