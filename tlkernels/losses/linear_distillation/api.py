"""Linear distillation: the public function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.distillation.call import plain_options
from tlkernels.losses.linear_distillation.call import Call, Layers, check
from tlkernels.losses.linear_distillation.ops import IMPLEMENTATIONS


def linear_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    """Distillation from features: neither logits tensor is held whole.

    Replaces::

        student_logits = F.linear(student_input, student_weight, student_bias)
        teacher_logits = F.linear(teacher_input, teacher_weight, teacher_bias)
        loss = distillation(student_logits, teacher_logits, target, ...)         # the same options

    Args:
        student_input: features of shape (H,) or (..., H); float64, float32, bfloat16 or float16.
        student_weight: shape (C, H), in the dtype of `student_input`.
        teacher_input: shape (H',) or (..., H'), of as many rows; the hidden sizes and the dtypes of the two layers may
            differ.
        teacher_weight: shape (C, H'), in the dtype of `teacher_input`.
        target: as in `distillation`, like the options that follow.
        student_bias: shape (C,).
        teacher_bias: shape (C,).
        temperature: above 0.
        divergence: "forward_kl", "reverse_kl", "js" or "tv".
        beta: above 0 and below 1.
        hard_weight: in [0, 1].
        ignore_index: the class index whose rows do not count. They have no part in any gradient whatever the inputs are
            there.
        row_weight: a factor for each row, shape (...).
        label_smoothing: in [0, 1].
        reduction: "mean", "batchmean", "sum" or "none".
        impl: "auto", or "native", "triton", "reference". `reference` holds the logits.

    Returns:
        The loss as of `distillation`. It is differentiable by all six tensors of the layers, twice and more; the
        gradients that nobody needs are not computed. Sums over rows of a 16-bit weight's gradient are in float32.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape or value.
        IndexError: a class index out of range.
        NotImplementedError: `impl` cannot serve this call; the message has every reason.

    Source: as `distillation`.
    """
    layers = Layers(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias)
    options = plain_options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing
    )
    call = check(Call(layers, options, reduction))
    loss: Tensor = resolve("linear_distillation", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class LinearDistillationLoss(LossModule, _Loss, function=linear_distillation):
    """`linear_distillation` as a module: the options are the constructor's, the tensors `forward`'s.

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
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return linear_distillation(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            target,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            row_weight=row_weight,
            **self._options(),
        )
