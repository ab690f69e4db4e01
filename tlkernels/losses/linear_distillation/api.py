"""Linear distillation: the function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.module import LossModule
from tlkernels.losses.distillation.call import Softcap, plain_options
from tlkernels.losses.linear_distillation.call import Arguments, Layers, check
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
    softcap: Softcap = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Compute the distillation loss of two linear layers' outputs, without storing all logits.

    Replaces::

        student_logits = F.linear(student_input, student_weight, student_bias)
        teacher_logits = F.linear(teacher_input, teacher_weight, teacher_bias)
        loss = tlkernels.distillation(student_logits, teacher_logits, target, ...)     # the same options

    Args:
        student_input: features of shape (H,) or (..., H); float64, float32, bfloat16 or float16.
        student_weight: shape (C, H) and the dtype of `student_input`.
        teacher_input: features of shape (H',) or (..., H'), with the same leading dimensions. The hidden sizes and the
            dtypes of the two layers may differ.
        teacher_weight: shape (C, H') and the dtype of `teacher_input`.
        target: class indices of any integer dtype and shape (...), each in [0, C) or equal to `ignore_index`. If
            `hard_weight` is 0, it only says which rows are ignored.
        student_bias: shape (C,).
        teacher_bias: shape (C,).
        temperature: above 0; divides the logits of the divergence, not those of the cross entropy.
        divergence: "forward_kl", "reverse_kl", "js" (Jensen-Shannon, generalised by `beta`) or "tv" (total variation).
        beta: above 0 and below 1; the teacher's share in the mixture of "js".
        hard_weight: in [0, 1]; the share of the cross entropy. Above 0 it requires `target`.
        ignore_index: the class index to ignore. Ignored rows count neither in the loss nor in the mean. They add
            nothing to any gradient even if their features are not finite.
        row_weight: a factor for each row, of shape (...). The mean still divides by the number of rows. Where it
            requires no gradient, the loss and gradient of a row of weight 0 are 0 even if its features are not finite.
        label_smoothing: in [0, 1]; the share of the uniform distribution in the target of the cross entropy.
        softcap: None, or a number above 0: both logits x become softcap * tanh(x / softcap), before the temperature, in
            the divergence and in the cross entropy. A pair (student's, teacher's) gives each side its own, or None.
        reduction: "none", "mean", "batchmean" or "sum". "mean" and "batchmean" are the same: both divide by the number
            of rows that are not ignored.
        impl: "auto" (default), "native", "triton" or "reference". "reference" stores all logits.

    Returns:
        The loss as in `distillation`. It is differentiable with respect to the six tensors of the layers, any number of
        times; only the gradients that are needed are computed. The gradient of a 16-bit weight is summed over rows in
        float32. Only `impl="reference"` differentiates `row_weight`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: see `distillation`.
    """
    layers = Layers(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias)
    options = plain_options(
        target, row_weight, temperature, divergence, beta, hard_weight, ignore_index, label_smoothing, softcap
    )
    call = check(Arguments(layers, options, reduction))
    loss: Tensor = resolve("linear_distillation", IMPLEMENTATIONS, call, impl).run(call)
    return loss


class LinearDistillationLoss(LossModule, _Loss, function=linear_distillation):
    """`linear_distillation` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time.

    Shape:
        Features (..., H) and (..., H'); weights (C, H) and (C, H'); `target` and `row_weight` (...).
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
