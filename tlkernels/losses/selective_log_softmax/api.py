"""Log-probabilities of selected classes: the function."""

from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels.losses.selective_log_softmax.call import Arguments, check_index, check_logits, plain_options, shaped
from tlkernels.losses.selective_log_softmax.ops import IMPLEMENTATIONS


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probabilities of selected classes, and the entropy, without storing all log-probabilities.

    Replaces::

        x = softcap * torch.tanh(logits / softcap)      # if softcap is given
        log_p = (x / temperature).log_softmax(-1)
        log_probs = torch.gather(log_p, -1, index)      # index (...): index.unsqueeze(-1), then squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)        # with return_entropy; with 0 * log 0 = 0

    It also replaces TRL's `selective_log_softmax(logits, index)`. The only memory of the size of `logits` is that of
    their gradient.

    Args:
        logits: shape (C,) or (..., C), with any strides; float64, float32, bfloat16 or float16. Rows that do not lie at
            one distance from each other, such as `logits[:, :-1]` of a batch, are copied.
        index: class indices of any integer dtype, each in [0, C); shape (...) for one class per row, or (..., K) for K.
            A class may be selected twice.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits smoothly to (-softcap, softcap), before `temperature` (Gemma 2, 2024).
        return_entropy: whether to return the entropy of the softmax too, in nats.
        impl: "auto" (default), "native", "triton" or "reference".

    Returns:
        The log-probabilities, of the shape of `index`; with `return_entropy` a tuple of them and the entropy, of shape
        (...). The dtype is that of `logits` (float32 under autocast). Both results are differentiable with respect to
        `logits`, any number of times.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: the gradient of log-softmax. The second derivatives are in
    `tlkernels/losses/selective_log_softmax/second_order.py`.
    """
    check_logits("logits", logits)
    classes, options = logits.shape[-1], plain_options(temperature, softcap, return_entropy)
    call = Arguments(logits.reshape(-1, classes), check_index(index, logits, classes), options)
    log_probs, entropy = resolve("selective_log_softmax", IMPLEMENTATIONS, call, impl).run(call)
    return shaped(log_probs, entropy, index, logits, loss_dtype(logits), options)
