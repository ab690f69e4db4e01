"""linear_selective_log_softmax in Triton: launches of the kernels.

The rows are those of linear cross entropy in chunks: no class is a row's target, and the upstream of its lse is minus
the sum of the upstreams of its log-probabilities. Of each chunk `gather` reads the selected logits, and `scatter`
writes their gradients over those that the row's kernel wrote; `selective_log_softmax/triton.py` launches the two.

Bytes: those of linear cross entropy, and K numbers for each row.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tlkernels._core.dtypes import compute_dtype
from tlkernels._core.triton import linear
from tlkernels.losses.cross_entropy.call import Options
from tlkernels.losses.linear_cross_entropy.triton import Launcher, Results
from tlkernels.losses.selective_log_softmax.triton import gather, options_of, scatter, summarise


class _Selected(Launcher):
    """Launches the kernels of one call of flat tensors."""

    strategy = "chunks"

    def __init__(
        self, layer: linear.Layer, index: Tensor, options: Options, needs: linear.Needs, grad: Tensor | None = None
    ):
        """Keep the selected classes, and the upstream of their log-probabilities."""
        input, weight, _ = layer
        self.index, self.grad = index, grad
        target, self.grad_lse = summarise(index, weight.shape[0], compute_dtype(input), grad)
        self.log_probs = input.new_empty(index.shape, dtype=compute_dtype(input))
        super().__init__(layer, target, options, None, None, needs)

    def statistics(self, begin: int, end: int, logits: Tensor | None, results: Results) -> None:
        """Fill `results` and the log-probabilities, those of rows `begin` to `end`."""
        super().statistics(begin, end, logits, results)
        assert logits is not None
        gather(
            logits.t(), self.index[begin:end], self.options, target=self.target[begin:end],
            normaliser=(results.peak, results.log_sum), log_probs=self.log_probs[begin:end],
        )  # fmt: skip

    def gradient(
        self, begin: int, end: int, first: int, last: int, logits: Tensor | None, gradient: Tensor, results: Results,
        upstreams: Sequence[Any],
    ) -> None:  # fmt: skip
        """Write the gradient of the logits of rows `begin` to `end`."""
        assert logits is not None and self.grad is not None and self.grad_lse is not None
        index = self.index[begin:end]
        saved = logits.new_empty(index.shape)
        gather(logits.t(), index, self.options, saved=saved)
        super().gradient(begin, end, first, last, logits, gradient, results, upstreams)
        *_, grad_entropy, _ = upstreams
        scatter(
            saved, (index.shape[1], 0, 1), index, (self.grad[begin:end], self.grad_lse[begin:end], grad_entropy),
            self.target[begin:end], (results.peak, results.log_sum, results.entropy), self.options, gradient.t(),
        )  # fmt: skip


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, temperature: float, softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the log-probabilities, the entropy, which is empty where it is not asked for, peak and log_sum."""
    options = options_of(weight.shape[0], temperature, softcap)
    launcher = _Selected((input, weight, bias), index, options, linear.Needs(False, False, False))
    results = launcher.results(stats=entropy)
    launcher.run(results)
    entropies = input.new_empty(0, dtype=launcher.wide) if results.entropy is None else results.entropy
    return launcher.log_probs, entropies, results.peak, results.log_sum


def backward(
    grad_log_probs: Tensor, grad_entropy: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    index: Tensor, peak: Tensor, log_sum: Tensor, entropy: Tensor, temperature: float, softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of input, weight and bias; those that are not needed have no elements."""
    options = options_of(weight.shape[0], temperature, softcap)
    launcher = _Selected((input, weight, bias), index, options, linear.Needs(*needs), grad_log_probs.contiguous())
    normaliser = Results(None, peak, log_sum, None, None if grad_entropy is None else entropy, None)
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    return launcher.run(normaliser, peak.new_zeros(()), launcher.grad_lse, grad_entropy, given=True)
