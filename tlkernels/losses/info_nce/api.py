"""InfoNCE: the function and the module."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import Implementation, resolve
from tlkernels._core.dtypes import compute_dtype, loss_dtype
from tlkernels._core.embeddings import resolve_scale
from tlkernels._core.group import check_equal_shares, check_group, exchange, gather
from tlkernels._core.module import LossModule
from tlkernels._core.options import flag, number, smoothing
from tlkernels.losses.info_nce.call import Arguments, Mask, Options, check_info_nce
from tlkernels.losses.info_nce.ops import IMPLEMENTATIONS


def info_nce(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    negatives: Tensor | None = None,
    mask: Mask | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the cross entropy of each query's similarities to all keys, without storing the N x K matrix.

    Replaces::

        if normalize:
            query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
        logits = logit_scale * query @ torch.cat([key, negatives]).T  # negatives of shape (M, D)
        # or, with negatives of shape (N, M, D):
        logits = logit_scale * torch.cat([query @ key.T, (negatives @ query.unsqueeze(2)).squeeze(2)], 1)
        mask = F.pad(mask, (0, logits.shape[1] - mask.shape[1]))  # a mask of shape (N, K) keeps all negatives
        logits = logits.masked_fill(mask & ~F.one_hot(target, logits.shape[1]).bool(), -torch.inf)
        loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction=reduction)
        # symmetric: the mean of this and of the same with query and key exchanged, without negatives

    Args:
        query: shape (N, D), with any strides; float64, float32, bfloat16 or float16.
        key: shape (K, D) and the dtype of `query`.
        target: the positive of each query: a column of `logits`, of any integer dtype and shape (N,). The default is
            `arange(N)`.
        temperature: above 0; divides the similarities. A number, or a tensor of shape () or (1,) that may require a
            gradient.
        logit_scale: 1 / temperature; multiplies the similarities. Give at most one of the two; the default is 1.
        negatives: more keys: of shape (M, D) for all queries, or of shape (N, M, D) with M keys for each query.
        mask: keys to leave out of the softmax, known false negatives: a bool tensor (True = leave out) of shape (N, K),
            or (N, K + M) to cover `negatives` too; or integer ids (query_ids, key_ids) of shapes (N,) and (K,), which
            leave out the keys whose id is the query's. The positive is never left out.
        symmetric: whether to classify each key among the queries as well, and take the mean of both losses row by row
            (CLIP). It requires K = N and the default target; `negatives` take part in query -> key only.
        normalize: whether to divide all embeddings by their 2-norm, as `F.normalize` does.
        label_smoothing: in [0, 1]; the share of the uniform distribution in the target, over the keys that are not
            masked.
        reduction: "none", "mean" or "sum", over the queries.
        group: a torch.distributed process group over which the batch is split; every rank must pass tensors of equal
            shapes. `key` and `negatives` of shape (M, D) of all ranks take part, in the order of ranks; `target` and
            the columns of a bool `mask` count all keys first and then all negatives. By default the positive of query i
            is key i of its own rank. Averaged over the ranks, the loss and the gradients of the parameters (as
            data-parallel training averages them) are those of the whole batch on one process. For this,
            `reduction="sum"` multiplies by the number of ranks.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the dtype of `query` (float32 under autocast). It is a scalar, or with `reduction="none"` of shape
        (N,). It is differentiable with respect to `query`, `key`, `negatives`, `temperature` and `logit_scale`, any
        number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a target is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4; Radford et al. 2021 (arXiv 2103.00020), figure 3,
    for the symmetric form.
    """
    group = check_group(group)
    ranks = 1 if group is None else dist.get_world_size(group)
    options = Options(
        symmetric=flag("symmetric", symmetric),
        normalize=flag("normalize", normalize),
        label_smoothing=smoothing(label_smoothing),
    )
    check_info_nce(query, key, target, negatives, mask, options.symmetric, reduction, ranks)
    scale = resolve_scale(temperature, logit_scale, query.device)
    ids = mask if isinstance(mask, tuple) else (None, None)
    bools = mask if isinstance(mask, Tensor) else None
    call = Arguments(query, key, negatives, scale, target, bools, ids[0], ids[1], options, reduction, loss_dtype(query))
    implementation = resolve("info_nce", IMPLEMENTATIONS, call, impl)
    loss: Tensor = implementation.run(call) if group is None else _over_ranks(implementation, call, group)
    return loss


def _over_ranks(implementation: Implementation, call: Arguments, group: Any) -> Tensor:
    """Return the loss of this rank's queries, and with `symmetric` of its keys, against those of all ranks."""
    query, key, negatives = call.query, call.key, call.negatives
    assert key is not None
    check_equal_shares(group, query=query, key=key, negatives=negatives)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own = torch.arange(query.shape[0], device=query.device) + rank * key.shape[0]
    there = call._replace(
        key=gather(key, group),
        negatives=gather(negatives, group) if negatives is not None and negatives.dim() == 2 else negatives,
        target=own if call.target is None else call.target,
        key_ids=None if call.key_ids is None else gather(call.key_ids.long(), group),
        options=call.options._replace(symmetric=False),
        dtype=compute_dtype(query, key, negatives),
    )
    loss: Tensor = implementation.run(there)
    if call.options.symmetric:
        back = there._replace(
            query=key,
            key=gather(query, group),
            negatives=None,
            mask=None if call.mask is None else exchange(call.mask[:, : ranks * key.shape[0]], group),
            query_ids=call.key_ids,
            key_ids=None if call.query_ids is None else gather(call.query_ids.long(), group),
        )
        loss = (loss + implementation.run(back)) / 2
    return (loss * ranks if call.reduction == "sum" else loss).to(call.dtype)


class InfoNCELoss(LossModule, _Loss, function=info_nce):
    """`info_nce` as a module, optionally with a learnable scale.

    Args:
        learnable: whether the module has a parameter `log_logit_scale`, the logarithm of the scale. Then neither
            `temperature` nor `logit_scale` can be given. It cannot be changed later.
        init_temperature: the parameter starts at log(1 / init_temperature); `reset_parameters()` restores it.
        max_scale: each forward first clamps the parameter to at most log(max_scale), as CLIP does.

    The other arguments are those of `info_nce`. Each is an attribute; all but `learnable` can be set at any time. A
    `Parameter` given as `temperature` or `logit_scale` becomes a parameter of the module. A copy of the module shares
    `group`; a pickled module looks for the group of the same ranks when it is loaded.

    Shape:
        `query` (N, D); `key` (K, D); `target` (N,); `negatives` (M, D) or (N, M, D).
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        symmetric: bool = False,
        normalize: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        group: Any = None,
        learnable: bool = False,
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature, self.logit_scale = temperature, logit_scale
        self.symmetric, self.normalize, self.label_smoothing = symmetric, normalize, label_smoothing
        self.init_temperature, self.max_scale = init_temperature, max_scale
        self.group, self.impl = group, impl
        self.log_logit_scale = Parameter(torch.empty(())) if flag("learnable", learnable) else None
        if self.log_logit_scale is not None:
            self._log_max_scale()
            self.reset_parameters()

    @property
    def learnable(self) -> bool:
        """Whether the module owns its scale."""
        return self.log_logit_scale is not None

    def reset_parameters(self) -> None:
        """Bring a learnable scale back to 1 / init_temperature."""
        if self.log_logit_scale is not None:
            torch.nn.init.constant_(self.log_logit_scale, -_log("init_temperature", self.init_temperature))

    def forward(
        self, query: Tensor, key: Tensor, target: Tensor | None = None, *, negatives: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss."""
        options = self._options()
        if self.log_logit_scale is not None:
            most = self._log_max_scale()
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=most)
            options["logit_scale"] = self.log_logit_scale.exp()
        return info_nce(query, key, target, negatives=negatives, mask=mask, **options)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        learned = f"learnable=True, max_scale={self.max_scale!r}, " if self.learnable else ""
        return learned + super().extra_repr()

    def _log_max_scale(self) -> float:
        """Return the bound of a learnable scale.

        Raises:
            TypeError, ValueError: `max_scale` is not a number above 0, or the scale is given in another way as well.
        """
        if self.temperature is not None or self.logit_scale is not None:
            raise ValueError("learnable: expected neither temperature nor logit_scale with it; use init_temperature")
        return _log("max_scale", self.max_scale)


def _log(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return math.log(value)
