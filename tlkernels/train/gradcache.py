"""The gradient of a loss over a whole batch whose activations do not fit into memory at once (GradCache).

Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
https://arxiv.org/abs/2101.06983. The network runs twice. The first pass keeps the features alone. The loss of all
features gives their gradients, with which the second pass goes back through one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def joint_gradient(
    accelerator: Accelerator,
    model: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    loss: Callable[..., Tensor],
    features: int,
    seed: int,
) -> Tensor:
    """Add the gradient of the loss over all micro-batches to the parameters, and return the loss.

    The gradient is that of one forward pass of the whole batch, in which each micro-batch has the same dropout.

    Args:
        accelerator: has prepared `model`.
        model: called with a micro-batch and a function, which it calls with what the loss takes.
        inputs: the network's arguments for each micro-batch.
        loss: takes features of all rows, of which some may be None, then tensors with an entry per row, None, and
            parameters of shape ().
        features: the number of the loss's first arguments that the network computes from the rows.
        seed: of the random numbers of the step; each micro-batch has its own.
    """

    def run(number: int, loss: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed((seed * 4_099 + number) % (1 << 63))  # a seed has 64 bits
        with accelerator.autocast():
            result: Tensor = model(*inputs[number], loss)
        return result

    if len(inputs) == 1:
        value = run(0, loss)
        accelerator.backward(value)
        return value.detach()
    kept: list[tuple[Any, ...]] = []

    def keep(*arguments: Any) -> Tensor:
        kept.append(arguments)
        return torch.zeros((), device=accelerator.device)

    with torch.no_grad():
        for number in range(len(inputs)):
            run(number, keep)
    first, rest = leaves(joined(kept), features), list(joined(kept)[features:])
    rest = [value.detach().requires_grad_() if _is_parameter(value) else value for value in rest]
    with accelerator.autocast():
        value = loss(*first, *rest)
    accelerator.backward(value)
    gradients = [
        [None] * len(inputs) if leaf is None else leaf.grad.split([len(call[place]) for call in kept])
        for place, leaf in enumerate(first)
    ]
    last, zero = len(inputs) - 1, torch.zeros((), device=accelerator.device)
    for number in range(len(inputs)):

        def product(*arguments: Any, number: int = number) -> Tensor:
            """Return a scalar with the gradients that the loss has."""
            pairs = [(arguments[place], gradients[place][number]) for place in range(features)]
            if number == last:  # once, the parameters that the loss takes
                pairs += [(arguments[features + place], value.grad) for place, value in _parameters(rest)]
            return sum(((value * gradient).sum() for value, gradient in pairs if gradient is not None), start=zero)

        with nullcontext() if number == last else accelerator.no_sync(model):
            accelerator.backward(run(number, product))
    return value.detach()


def joined(calls: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of several micro-batches as those of one: rows one after the other, parameters once."""

    def one(values: tuple[Any, ...]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) and values[0].dim() else values[0]

    return tuple(map(one, zip(*calls, strict=True)))


def leaves(arguments: Sequence[Any], features: int) -> list[Any]:
    """Return the first `features` arguments as tensors of their own that collect a gradient; None stays None."""
    return [None if value is None else value.detach().clone().requires_grad_() for value in arguments[:features]]


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _parameters(rest: Sequence[Any]) -> list[tuple[int, Tensor]]:
    return [(place, value) for place, value in enumerate(rest) if _is_parameter(value) and value.grad is not None]
