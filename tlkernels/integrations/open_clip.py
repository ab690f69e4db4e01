"""open_clip: its losses without the N x N matrix, with the gradient of the whole batch over all processes."""

from __future__ import annotations

from typing import Any

import open_clip.loss as theirs
import torch
import torch.distributed as dist
from torch import Tensor

import tlkernels as tlk
from tlkernels._core.group import gather


def create_loss(args: Any) -> torch.nn.Module:
    """Return the loss that `open_clip.create_loss(args)` returns, as one of this module's classes.

    Replaces::

        open_clip.create_loss(args)        # in open_clip_train.main: loss = create_loss(args)

    Args:
        args: the training script's options: `distill`, `model`, `siglip`, `coca_caption_loss_weight`,
            `coca_contrastive_loss_weight`, `local_loss`, `gather_with_grad`, `loss_dist_impl`, `rank`, `world_size` and
            `horovod`, which mean what they mean for open_clip.

    Raises:
        NotImplementedError: an option that is not served: `--horovod`; `--loss-dist-impl` other than `gather`; with
            more than one process, CLIP, CoCa or distillation without both `--local-loss` and `--gather-with-grad`.
    """
    if args.horovod:
        raise NotImplementedError("--horovod: expected torch.distributed, which open_clip uses without that flag")
    processes = {"rank": args.rank, "world_size": args.world_size}
    clip = {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad, "cache_labels": True, **processes}
    if args.distill:
        return DistillClipLoss(**clip)
    if "coca" in args.model.lower():
        return CoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight, **clip)
    if args.siglip:
        return SigLipLoss(dist_impl=args.loss_dist_impl, **processes)
    return ClipLoss(**clip)


class ClipLoss(theirs.ClipLoss):  # type: ignore[misc]
    """The loss of CLIP, a subclass of `open_clip.ClipLoss` with its constructor.

    With `world_size` above 1 the batch is split over the default process group. This process's loss is that of its own
    pairs against those of all processes. After data-parallel averaging every gradient is that of the whole batch on one
    process, as with open_clip's `local_loss=True, gather_with_grad=True`. open_clip's other combinations of the two
    train another gradient (`docs/hosts/open-clip.md`), so both are required.

    Args:
        local_loss, gather_with_grad: must both be True if `world_size` is above 1; without effect otherwise.
        cache_labels: without effect, as no labels are made.
        rank, world_size: this process's and the number of processes in the default group of torch.distributed.
        use_horovod: must be False.

    Raises:
        NotImplementedError: an argument that is not served, as for `create_loss`.
        ValueError: `rank` or `world_size` is not that of the default process group; raised in the first forward.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_horovod:
            raise NotImplementedError("use_horovod: expected False, got True; use torch.distributed")
        if self.world_size > 1 and not (self.local_loss and self.gather_with_grad):
            raise NotImplementedError(
                "local_loss, gather_with_grad (--local-loss, --gather-with-grad): expected both with "
                f"{self.world_size} processes, got {self.local_loss} and {self.gather_with_grad}. With any other "
                "combination open_clip optimises another loss value or gradient than that of the whole batch"
            )

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Return the loss, or with `output_dict` {"contrastive_loss": the loss}.

        Shape:
            `image_features`, `text_features` (N, D), normalised by the model; `logit_scale` and `logit_bias` () or
            (1,). A bias shifts all logits of a softmax: it gets the gradient 0.
        """
        loss = tlk.info_nce(
            image_features, text_features, logit_scale=logit_scale, symmetric=True, group=_group(self)
        )  # fmt: skip
        if logit_bias is not None:
            loss = loss + 0.0 * torch.as_tensor(logit_bias).sum()  # DistributedDataParallel waits for its gradient
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(theirs.CoCaLoss, ClipLoss):  # type: ignore[misc]
    """The loss of CoCa, a subclass of `open_clip.CoCaLoss` with its constructor: `ClipLoss` and the caption's.

    The caption's loss is the mean over this process's tokens other than `pad_id`, as in open_clip.
    """

    def forward(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logits: Tensor, labels: Tensor, logit_scale: Tensor,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Return both weighted losses, a pair or {"contrastive_loss", "caption_loss"}; `logits` are (N, L, C)."""
        contrastive = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * ClipLoss.forward(self, image_features, text_features, logit_scale)
        pad = self.caption_loss.ignore_index
        caption = tlk.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad)
        return _named(output_dict, contrastive_loss=contrastive, caption_loss=caption * self.caption_loss_weight)


class DistillClipLoss(theirs.DistillClipLoss, ClipLoss):  # type: ignore[misc]
    """`ClipLoss` and its distillation from another CLIP, a subclass of `open_clip.DistillClipLoss`.

    The distillation is the cross entropy between the teacher's and the student's softmax, in both directions: the
    divergence, which trains, plus the teacher's entropy, which costs one more product.
    """

    def forward(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, dist_image_features: Tensor,
        dist_text_features: Tensor, dist_logit_scale: Tensor, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Return both losses, a pair or {"contrastive_loss", "distill_loss"}; all features are (N, D)."""
        contrastive = ClipLoss.forward(self, image_features, text_features, logit_scale)
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        student_keys, teacher_keys = ([_everyone(self, side) for side in pair] for pair in (student, teacher))
        distill = contrastive.new_zeros(())
        for own, other in ((0, 1), (1, 0)):
            scaled, keys = dist_logit_scale * teacher[own], teacher_keys[other]
            distill = distill + tlk.linear_distillation(
                logit_scale * student[own], student_keys[other], scaled, keys
            )  # fmt: skip
            target = torch.zeros(len(scaled), dtype=torch.int64, device=scaled.device)  # of no use to the entropy
            distill = distill + tlk.linear_cross_entropy_stats(scaled, keys, target).entropy.mean()
        return _named(output_dict, contrastive_loss=contrastive, distill_loss=distill / 2)


class SigLipLoss(theirs.SigLipLoss):  # type: ignore[misc]
    """The loss of SigLIP, a subclass of `open_clip.SigLipLoss` with its constructor.

    With `world_size` above 1 the texts of all processes are gathered, as with open_clip's `dist_impl="gather"`, which
    computes the same loss as its others.

    Args:
        cache_labels: without effect, as in open_clip.
        rank, world_size: as in `ClipLoss`.
        dist_impl: None or "gather".

    Raises:
        NotImplementedError: `dist_impl` is another way of exchanging the texts.
        ValueError: as for `ClipLoss`.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        if dist_impl not in (None, "gather"):
            raise NotImplementedError(f"dist_impl (--loss-dist-impl): expected None or 'gather', got {dist_impl!r}")
        super().__init__(cache_labels, rank, world_size, "gather")

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Return the loss, or with `output_dict` {"contrastive_loss": the loss}; shapes as for `ClipLoss`."""
        bias = 0.0 if logit_bias is None else logit_bias
        loss = tlk.sigmoid_contrastive(
            image_features, text_features, logit_scale=logit_scale, logit_bias=bias, group=_group(self)
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss


def _group(loss: Any) -> Any:
    """Return the default process group if the loss is for more than one process."""
    if loss.world_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"world_size: expected 1 as torch.distributed is not initialized, got {loss.world_size}")
    if (dist.get_rank(), dist.get_world_size()) != (loss.rank, loss.world_size):
        expected = f"expected {dist.get_rank()} and {dist.get_world_size()} as in the default process group"
        raise ValueError(f"rank, world_size: {expected}, got {loss.rank} and {loss.world_size}")
    return dist.group.WORLD


def _everyone(loss: Any, features: Tensor) -> Tensor:
    group = _group(loss)
    return features if group is None else gather(features, group)


def _named(as_dict: bool, **losses: Tensor) -> Any:
    return losses if as_dict else tuple(losses.values())
