"""NT-Xent: the function and the module. The computation is InfoNCE's (tlkernels/losses/info_nce)."""

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
from tlkernels.losses.info_nce.call import Arguments, Options, check_reduction
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
    """Compute the normalised temperature-scaled cross entropy (NT-Xent) of SimCLR, without storing the 2N x 2N matrix.

    Each of the 2N views is classified among the other 2N - 1; the correct class is the other view of the same example.

    Replaces::

        z = torch.cat([z1, z2])
        if normalize:
            z = F.normalize(z, dim=-1)
        logits = (logit_scale * z @ z.T).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * N).roll(N), reduction=reduction)

    Args:
        z1: the first views, of shape (N, D), with any strides; float64, float32, bfloat16 or float16.
        z2: the second views, of the shape and dtype of `z1`; row i is the other view of row i of `z1`.
        temperature: above 0; divides the similarities. A number, or a tensor of shape () or (1,) that may require a
            gradient.
        logit_scale: 1 / temperature; multiplies the similarities. Give at most one of the two; the default is 1.
        normalize: whether to divide the embeddings by their 2-norm, as `F.normalize` does.
        reduction: "none", "mean" or "sum", over the 2N views.
        group: a torch.distributed process group over which the batch is split; every rank must pass tensors of equal
            shapes. The views of all ranks take part. Averaged over the ranks, the loss and the gradients of the
            parameters (as data-parallel training averages them) are those of the whole batch on one process. For this,
            `reduction="sum"` multiplies by the number of ranks.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the dtype of `z1` (float32 under autocast). It is a scalar, or with `reduction="none"` of shape
        (2N,), first views first. The loss is differentiable with respect to `z1`, `z2`, `temperature` and
        `logit_scale`, any number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

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
    call = Arguments(z, None, None, scale, other, None, None, None, options, reduction, loss_dtype(z1))
    implementation = resolve("nt_xent", IMPLEMENTATIONS, call, impl)
    if group is not None:
        check_equal_shares(group, z1=z1)
        first = dist.get_rank(group) * 2 * n
        call = call._replace(key=gather(z, group), target=other + first, options=options._replace(self_column=first))
    loss: Tensor = implementation.run(call)
    return loss * dist.get_world_size(group) if group is not None and reduction == "sum" else loss


class NTXentLoss(LossModule, _Loss, function=nt_xent):
    """`nt_xent` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time. A `Parameter` given as `temperature` or `logit_scale`
    becomes a parameter of the module. A copy of the module shares `group`; a pickled module looks for the group of the
    same ranks when it is loaded.

    Shape:
        `z1` and `z2` (N, D).
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
