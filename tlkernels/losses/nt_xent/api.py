"""NT-Xent: the public function and the module. The computation is InfoNCE's (tlkernels/losses/info_nce)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels._core.embeddings import check_embeddings, numbers, resolve_scale
from tlkernels._core.group import check_equal_shares, check_group, gather
from tlkernels._core.module import LossModule
from tlkernels._core.options import flag
from tlkernels.losses.info_nce.call import Call, Options, check_reduction
from tlkernels.losses.info_nce.ops import IMPLEMENTATIONS


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Cross entropy of each view's similarities to the other 2N - 1, of which one is the same example's other view.

    Replaces::

        z = torch.cat([z1, z2])
        if normalize:
            z = F.normalize(z, dim=-1)
        logits = (logit_scale * z @ z.T).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * N).roll(N), reduction=reduction)

    Args:
        z1: the first views, shape (N, D), any strides; float64, float32, bfloat16 or float16.
        z2: the second views, of the same shape and dtype; row i is the same example as in `z1`.
        temperature: above 0; divides the similarities. A number, or a tensor of shape () or (1,), which gets its
            gradient.
        logit_scale: multiplies them; 1 / temperature, so that only one of the two can be given, or none for 1.
        normalize: divide the embeddings by their 2-norm, as `F.normalize` does.
        reduction: "mean" and "sum" over the 2N views; "none".
        group: a torch.distributed process group, every rank of which calls this with tensors of equal shapes. The views
            of all ranks take part. The mean over ranks of the loss is the loss of the whole batch on one process
            (`reduction="sum"`: this rank's sum times the number of ranks), and so is the mean of every parameter's
            gradient, which data-parallel training takes (tlkernels/_core/group.py).
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss in the views' dtype (under autocast float32): 0-d, or with "none" of shape (2N,), first views first.
        Differentiable by both views and the temperature or scale, twice and more.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1.
    """
    check_embeddings("z1", z1)
    check_embeddings("z2", z2, ("z1", z1))
    if z1.shape != z2.shape:
        raise ValueError(f"z2: expected z1's shape {tuple(z1.shape)}, got {tuple(z2.shape)}")
    check_reduction(reduction)
    group = check_group(group)
    scale = resolve_scale(temperature, logit_scale, z1.device)
    z, n = torch.cat([z1, z2]), z1.shape[0]
    rows = numbers(2 * n, z)
    other = torch.cat([rows[n:], rows[:n]])
    options = Options(self_column=0, normalize=flag("normalize", normalize))
    call = Call(z, None, None, scale, other, None, None, None, options, reduction, loss_dtype(z1))
    implementation = resolve("nt_xent", IMPLEMENTATIONS, call, impl)
    if group is not None:
        check_equal_shares(group, z1=z1)
        first = dist.get_rank(group) * 2 * n
        call = call._replace(key=gather(z, group), target=other + first, options=options._replace(self_column=first))
    loss: Tensor = implementation.run(call)
    return loss * dist.get_world_size(group) if group is not None and reduction == "sum" else loss


class NTXentLoss(LossModule, _Loss, function=nt_xent):
    """`nt_xent` as a module; the arguments are its options, and attributes that can be set at any time.

    A `Parameter` given as `temperature` or `logit_scale` becomes the module's own and is trained. A copy of the module
    shares `group`; a pickle finds the group of the same ranks where it is loaded.
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

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the loss."""
        return nt_xent(z1, z2, **self._options())
