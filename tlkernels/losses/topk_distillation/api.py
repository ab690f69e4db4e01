"""Top-k distillation: the function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels._core.module import LossModule
from tlkernels.losses.selective_log_softmax.call import Arguments, check_logits
from tlkernels.losses.selective_log_softmax.call import Options as StudentOptions
from tlkernels.losses.selective_log_softmax.ops import IMPLEMENTATIONS
from tlkernels.losses.topk_distillation import rows
from tlkernels.losses.topk_distillation.call import check, plain_options


def topk_distillation(
    student_logits: Tensor,
    teacher_index: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the divergence between a student and the K classes that a teacher kept, plus a share of cross entropy.

    Replaces, with `tail="bucket"`::

        def with_rest(log_probs):                                      # one more class holds the other classes
            rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
            return torch.cat([log_probs, rest], -1)

        x = softcap * torch.tanh(student_logits / softcap)             # if softcap is given
        log_q = (with_rest(teacher_log_probs) / temperature).log_softmax(-1)
        log_p = with_rest((x / temperature).log_softmax(-1).gather(-1, teacher_index))
        divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)      # "forward_kl"
        hard = F.cross_entropy(x.flatten(0, -2), target.flatten(), reduction="none",
                               ignore_index=ignore_index).view(target.shape)
        rows = (1 - hard_weight) * temperature**2 * divergence + hard_weight * hard
        rows = (rows * row_weight).masked_fill(target == ignore_index, 0)
        loss = rows.sum() / (target != ignore_index).sum()             # without target: over all rows

    With `tail="renormalize"`, the softmaxes are over the K classes alone::

        log_q = (teacher_log_probs / temperature).log_softmax(-1)
        log_p = (x / temperature).gather(-1, teacher_index).log_softmax(-1)

    With `tail="ignore"`, the distributions are those of "bucket", and the sum over classes leaves the rest out.

    Args:
        student_logits: shape (C,) or (..., C), with any strides; float64, float32, bfloat16 or float16.
        teacher_index: the classes that the teacher kept, of any integer dtype and shape (..., K), each in [0, C) and at
            most once in a row. A row with fewer than K classes has -1 in the other places. A row without any adds a
            divergence of 0.
        teacher_log_probs: their log-probabilities at temperature 1, of shape (..., K); -inf where the index is -1.
        target: class indices of any integer dtype and shape (...), each in [0, C) or equal to `ignore_index`. If
            `hard_weight` is 0, it only says which rows are ignored.
        temperature: above 0; divides the student's logits and the teacher's log-probabilities in the divergence.
        divergence: "forward_kl", "reverse_kl", "js" (Jensen-Shannon, generalised by `beta`) or "tv" (total variation),
            as in `distillation`.
        beta: above 0 and below 1; the teacher's share in the mixture of "js".
        tail: "bucket", "renormalize" or "ignore": what becomes of the classes that the teacher did not keep. On both
            sides, their probability is at least the eps of the computation's dtype, 1.2e-7 in float32; with K = C there
            are none.
        hard_weight: in [0, 1]; the share of the cross entropy. Above 0 it requires `target`.
        ignore_index: the class index to ignore. Ignored rows count neither in the loss nor in the mean. Their gradient
            is 0 even if their values are not finite.
        row_weight: a factor for each row, of shape (...). The mean still divides by the number of rows. Rows of weight
            0 are treated as ignored ones, unless `row_weight` requires a gradient.
        reduction: "none", "mean", "batchmean" or "sum". "mean" and "batchmean" are the same: both divide by the number
            of rows that are not ignored.
        softcap: above 0; bounds the student's logits smoothly to (-softcap, softcap), before `temperature`.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The loss, in the promoted dtype of `student_logits` and `teacher_log_probs` (float32 under autocast). It is a
        scalar, or with `reduction="none"` of shape (...). It is differentiable with respect to `student_logits`,
        `teacher_log_probs` and `row_weight`, any number of times. If every row is ignored, the mean is NaN and the
        gradient 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: `distillation`; the kernels are those of `selective_log_softmax`.
    """
    check_logits("student_logits", student_logits)
    options = plain_options(target, row_weight, temperature, divergence, beta, tail, hard_weight, ignore_index, softcap)
    classes = student_logits.shape[-1]
    call = check(teacher_index, teacher_log_probs, options, reduction, student_logits, classes)
    logits = student_logits.reshape(-1, classes)

    def select(index: Tensor, temperature: float) -> Tensor:
        student = Arguments(logits, index, StudentOptions(temperature, options.softcap, entropy=False))
        log_probs: Tensor = resolve("topk_distillation", IMPLEMENTATIONS, student, impl).run(student)[0]
        return log_probs

    return rows.loss(call, select, loss_dtype(student_logits, teacher_log_probs))


class TopkDistillationLoss(LossModule, _Loss, function=topk_distillation):
    """`topk_distillation` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time.

    Shape:
        Logits (C,) or (..., C); the teacher's index and log-probabilities (K,) or (..., K); `target` and `row_weight`
        (...).
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        tail: str = "bucket",
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(reduction=reduction)
        self.temperature, self.divergence, self.beta, self.tail = temperature, divergence, beta, tail
        self.hard_weight, self.ignore_index, self.softcap, self.impl = hard_weight, ignore_index, softcap, impl

    def forward(
        self,
        student_logits: Tensor,
        teacher_index: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return topk_distillation(
            student_logits, teacher_index, teacher_log_probs, target, row_weight=row_weight, **self._options()
        )
