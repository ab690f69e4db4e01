"""Log-probabilities of selected classes of a linear layer's output: the function."""

from torch import Tensor

from tlkernels._core.dispatch import resolve
from tlkernels._core.dtypes import loss_dtype
from tlkernels.losses.linear_selective_log_softmax.call import Arguments, Layer, check_layer, flat
from tlkernels.losses.linear_selective_log_softmax.ops import IMPLEMENTATIONS
from tlkernels.losses.selective_log_softmax.call import check_index, plain_options, shaped


def linear_selective_log_softmax(
    input: Tensor,
    linear_weight: Tensor,
    index: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probabilities of selected classes, and the entropy, of a linear layer's output.

    Replaces::

        logits = F.linear(input, linear_weight, linear_bias)
        result = tlkernels.selective_log_softmax(logits, index, ...)     # the same options

    The logits and their gradients exist for a chunk of rows at a time, as in `linear_cross_entropy`. The backward
    computes the logits again.

    Args:
        input: features of shape (D,) or (..., D); float64, float32, bfloat16 or float16.
        linear_weight: shape (C, D) and the dtype of `input`, as `torch.nn.Linear.weight`.
        index: class indices of any integer dtype, each in [0, C); shape (...) for one class per row, or (..., K) for K.
            A class may be selected twice.
        linear_bias: shape (C,) and the dtype of `input`.
        temperature: above 0; divides the logits.
        softcap: above 0; bounds the logits smoothly to (-softcap, softcap), before `temperature` (Gemma 2, 2024).
        return_entropy: whether to return the entropy of the softmax too, in nats.
        impl: "auto" (default), "native", "triton" or "reference". "reference" stores all logits.

    Returns:
        The results of `selective_log_softmax`, in the dtype of `input` (float32 under autocast). They are
        differentiable with respect to `input`, `linear_weight` and `linear_bias`, any number of times; only the
        gradients that are needed are computed. Second derivatives, `torch.func` and forward mode use "reference".

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, or a value out of its range.
        IndexError: a class index is out of range; on a GPU only with `TLKERNELS_CHECK=1`, otherwise its row is NaN.
        NotImplementedError: `impl` cannot serve this call; the message gives the reasons.

    Source: see `selective_log_softmax`; the gradients of the layer are those of its matrix products.
    """
    layer = check_layer(Layer(input, linear_weight, linear_bias))
    options = plain_options(temperature, softcap, return_entropy)
    call = Arguments(flat(layer), check_index(index, input, linear_weight.shape[0]), options)
    log_probs, entropy = resolve("linear_selective_log_softmax", IMPLEMENTATIONS, call, impl).run(call)
    return shaped(log_probs, entropy, index, input, loss_dtype(layer.input), options)
