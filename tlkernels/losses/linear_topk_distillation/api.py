"""Linear top-k distillation: the function and the module."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels._core.module import LossModule
from tlkernels.losses.linear_selective_log_softmax.call import Arguments, Layer, check_layer, flat
from tlkernels.losses.linear_selective_log_softmax.ops import IMPLEMENTATIONS
from tlkernels.losses.selective_log_softmax.call import Options as StudentOptions
from tlkernels.losses.topk_distillation import rows
from tlkernels.losses.topk_distillation.call import check, plain_options


def linear_topk_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_index: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
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
    """Compute the top-k distillation of a linear layer's output, without storing all logits.

    Replaces::

        student_logits = F.linear(student_input, student_weight, student_bias)
        loss = tlkernels.topk_distillation(student_logits, teacher_index, teacher_log_probs, target, ...)

    with the same options. The logits exist for a chunk of rows at a time, as in `linear_cross_entropy`; the backward
    computes them again. With `hard_weight` and a `temperature` other than 1, the cross entropy is a second pass.

    Args:
        student_input: features of shape (H,) or (..., H); float64, float32, bfloat16 or float16.
        student_weight: shape (C, H) and the dtype of `student_input`.
        teacher_index: the classes that the teacher kept, of any integer dtype and shape (..., K), each in [0, C) and at
            most once in a row; -1 in the places of a row that has fewer.
        teacher_log_probs: their log-probabilities at temperature 1, of shape (..., K); -inf where the index is -1.
        target: class indices of any integer dtype and shape (...), each in [0, C) or equal to `ignore_index`. If
            `hard_weight` is 0, it only says which rows are ignored.
        student_bias: shape (C,) and the dtype of `student_input`.
        temperature, divergence, beta, tail, hard_weight, ignore_index, row_weight, reduction, softcap: as in
            `topk_distillation`.
        impl: "auto" (default), "native", "triton" or "reference". "reference" stores all logits.

    Returns:
        The loss as in `topk_distillation`. It is differentiable with respect to the layer's tensors,
        `teacher_log_probs` and `row_weight`, any number of times; only the gradients that are needed are computed.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: see `topk_distillation`.
    """
    layer = check_layer(
        Layer(student_input, student_weight, student_bias), ("student_input", "student_weight", "student_bias")
    )
    options = plain_options(target, row_weight, temperature, divergence, beta, tail, hard_weight, ignore_index, softcap)
    call = check(teacher_index, teacher_log_probs, options, reduction, student_input, student_weight.shape[0])
    matrix = flat(layer)

    def select(index: Tensor, temperature: float) -> Tensor:
        student = Arguments(matrix, index, StudentOptions(temperature, options.softcap, entropy=False))
        log_probs: Tensor = resolve("linear_topk_distillation", IMPLEMENTATIONS, student, impl).run(student)[0]
        return log_probs

    return rows.loss(call, select, loss_dtype(layer.input, teacher_log_probs))


class LinearTopkDistillationLoss(LossModule, _Loss, function=linear_topk_distillation):
    """`linear_topk_distillation` as a module: the constructor takes the options, `forward` the tensors.

    Each option is an attribute that can be set at any time.

    Shape:
        Features (..., H); weight (C, H); the teacher's index and log-probabilities (..., K); `target` and `row_weight`
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
        student_input: Tensor,
        student_weight: Tensor,
        teacher_index: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss."""
        return linear_topk_distillation(
            student_input,
            student_weight,
            teacher_index,
            teacher_log_probs,
            target,
            student_bias=student_bias,
            row_weight=row_weight,
            **self._options(),
        )
