"""Distillation: the public function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.distillation.call import Call, check, plain_options
from tlkernels.losses.distillation.ops import IMPLEMENTATIONS


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Divergence between a teacher's and a student's softmax, and cross entropy with class indices, row by row.

    Replaces::

        log_q, log_p = (teacher_logits / temperature).log_softmax(-1), (student_logits / temperature).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        log_m = (beta * q + (1 - beta) * p).log()
        divergence = {
            "forward_kl": (q * (log_q - log_p)).sum(-1),
            "reverse_kl": (p * (log_p - log_q)).sum(-1),
            "js": (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1),
            "tv": (p - q).abs().sum(-1) / 2,
        }[divergence]                                                  # with 0 * log 0 = 0
        hard = F.cross_entropy(student_logits.flatten(0, -2), target.flatten(), reduction="none",
                               ignore_index=ignore_index, label_smoothing=label_smoothing).view(target.shape)
        rows = (1 - hard_weight) * temperature**2 * divergence + hard_weight * hard
        rows = (rows * row_weight).masked_fill(target == ignore_index, 0)
        loss = rows.sum() / (target != ignore_index).sum()             # or over all rows, without target

    Args:
        student_logits: shape (C,) or (..., C), any strides; float64, float32, bfloat16 or float16.
        teacher_logits: of the student's shape; where its dtype differs, torch's promotion is what they share.
        target: class indices of an integer dtype and shape (...), each in [0, C) or `ignore_index`. Without
            `hard_weight` it only says which rows count.
        temperature: above 0; divides the logits of the divergence, not those of the cross entropy.
        divergence: "forward_kl", "reverse_kl", "js" (Jensen-Shannon, generalised by `beta`) or "tv" (total variation).
        beta: above 0 and below 1, the teacher's share in the mixture of "js".
        hard_weight: in [0, 1], the share of the cross entropy.
        ignore_index: the class index whose rows count in no part of the loss and not in the mean. Their gradient is 0
            whatever the logits are.
        row_weight: a factor for each row, shape (...); the mean divides by the number of rows all the same.
        label_smoothing: in [0, 1], the share of the uniform distribution in the cross entropy's target.
        reduction: "mean", or "batchmean" for the same, divides the sum by the number of rows that count; "sum"; "none"
            keeps a loss per row.
        impl: "auto", or "native", "triton", "reference".

    Returns:
        The loss in the dtype to which torch promotes the logits' (under autocast float32): 0-d, or with "none" of shape
        (...). It is differentiable by both logits, twice and more. With no row that counts, the mean is NaN and the
        gradient 0. A gradient of `row_weight` is the reference's business.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        IndexError: a class index out of range.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.

    Source: Hinton et al. 2015 (arXiv 1503.02531) for the temperature and its square; Agarwal et al. 2024
    (arXiv 2306.13649) for the generalised Jensen-Shannon divergence.
    """
    options = plain_options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing
    )
    call = check(Call(student_logits, teacher_logits, options, reduction))
    loss: Tensor = resolve("distillation", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class DistillationLoss(LossModule, _Loss, function=distillation):
    """`distillation` as a module: the options are the constructor's, the tensors `forward`'s.

    Each option is an attribute, which can be set at any time.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature, self.divergence, self.beta, self.hard_weight = temperature, divergence, beta, hard_weight
        self.ignore_index, self.label_smoothing, self.impl = ignore_index, label_smoothing, impl

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return distillation(student_logits, teacher_logits, target, row_weight=row_weight, **self._options())
