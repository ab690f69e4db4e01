"""Distillation: the function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.distillation.call import Arguments, Softcap, check, plain_options
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
    softcap: Softcap = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Compute the divergence between a teacher's and a student's softmax, plus a share of cross entropy.

    Replaces::

        student_logits = softcap * torch.tanh(student_logits / softcap)             # unless softcap is None
        teacher_logits = softcap * torch.tanh(teacher_logits / softcap)
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
        loss = rows.sum() / (target != ignore_index).sum()             # without target: over all rows

    Args:
        student_logits: shape (C,) or (..., C), with any strides; float64, float32, bfloat16 or float16.
        teacher_logits: the shape of `student_logits`. Different dtypes are promoted as in PyTorch.
        target: class indices of any integer dtype and shape (...), each in [0, C) or equal to `ignore_index`. If
            `hard_weight` is 0, it only says which rows are ignored.
        temperature: above 0; divides the logits of the divergence, not those of the cross entropy.
        divergence: "forward_kl", "reverse_kl", "js" (Jensen-Shannon, generalised by `beta`) or "tv" (total variation).
        beta: above 0 and below 1; the teacher's share in the mixture of "js".
        hard_weight: in [0, 1]; the share of the cross entropy. Above 0 it requires `target`.
        ignore_index: the class index to ignore. Ignored rows count neither in the loss nor in the mean. Their gradient
            is 0 even if their logits are not finite.
        row_weight: a factor for each row, of shape (...). The mean still divides by the number of rows. Where it
            requires no gradient, the loss and gradient of a row of weight 0 are 0 even if its logits are not finite.
        label_smoothing: in [0, 1]; the share of the uniform distribution in the target of the cross entropy.
        softcap: None, or a number above 0: both logits x become softcap * tanh(x / softcap), before the temperature, in
            the divergence and in the cross entropy. A pair (student's, teacher's) gives each side its own, or None.
        reduction: "none", "mean", "batchmean" or "sum". "mean" and "batchmean" are the same: both divide by the number
            of rows that are not ignored.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the promoted dtype of the logits (float32 under autocast). It is a scalar, or with
        `reduction="none"` of shape (...). The loss is differentiable with respect to both logits, any number of times.
        Only `impl="reference"` differentiates `row_weight`. If every row is ignored, the mean is NaN and the gradient
        0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: Hinton et al. 2015 (arXiv 1503.02531) for the temperature and its square; Agarwal et al. 2024 (arXiv
    2306.13649) for the generalised Jensen-Shannon divergence.
    """
    options = plain_options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing, softcap
    )
    call = check(Arguments(student_logits, teacher_logits, options, reduction))
    loss: Tensor = resolve("distillation", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class DistillationLoss(LossModule, _Loss, function=distillation):
    """`distillation` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time.

    Shape:
        Logits (C,) or (..., C); `target` and `row_weight` (...).
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
        softcap: Softcap = None,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature, self.divergence, self.beta, self.hard_weight = temperature, divergence, beta, hard_weight
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.softcap, self.impl = softcap, impl

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
