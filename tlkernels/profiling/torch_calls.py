"""PyTorch's losses: which functions they are, and which of tlkernels' computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tlkernels as tlk
from tlkernels._core.dispatch import NAMES
from tlkernels._core.triton import INTERPRETED
from tlkernels.profiling.calls import EAGER, Logits, Unserved, Way, logits_of, logits_of_layer

_OTHERS = (
    "cross_entropy",
    "linear_cross_entropy",
    "kl_div",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)

FUNCTIONS: dict[Any, str] = {
    getattr(F, name): name
    for name in (*(name for name in dir(F) if name.endswith("_loss") and name[0] != "_"), *_OTHERS)
    if hasattr(F, name)  # linear_cross_entropy is of newer PyTorch
}
"""PyTorch's losses, as a TorchFunctionMode sees them, and their names."""
LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}
"""A loss outside of the model; inside, it may be anything."""

_OURS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": tlk.cross_entropy,
    "linear_cross_entropy": tlk.linear_cross_entropy,
    "mse_loss": tlk.mse,
}
_WHY_NOT = {
    "nll_loss": "it takes log-probabilities; tlkernels.cross_entropy takes the logits, in place of log_softmax and it",
    "kl_div": "it takes log-probabilities; tlkernels.distillation takes both logits",
    "log_softmax": "tlkernels.cross_entropy and tlkernels.selective_log_softmax take the logits, without log_softmax",
}
_WITH_HEAD = ("cross_entropy", "nll_loss", "kl_div", "log_softmax")


class TorchCall:
    """A call of one of PyTorch's losses."""

    own = EAGER

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._function, self._loss = function, FUNCTIONS.get(function, "log_softmax")
        self.name, self.has_head = f"F.{self._loss}", self._loss in _WITH_HEAD
        self.arguments = (tuple(args), dict(kwargs))

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why implementations of tlkernels do not serve the call."""
        if self._loss not in _OURS:
            return dict.fromkeys(NAMES, _WHY_NOT.get(self._loss, "tlkernels has no kernel for it"))
        reasons = {name: reason for name in NAMES if (reason := self._refusal(name))}
        if INTERPRETED:
            reasons.setdefault("triton", "only Triton's interpreter would run it")
        return reasons

    def _refusal(self, impl: str) -> str | None:
        try:
            report = tlk.explain(partial(self._ours, impl=impl), self.arguments)
        except (TypeError, ValueError) as error:
            return str(error)
        first, *others = report.splitlines()
        if not first.endswith("cannot be served"):
            return None
        return next(line.strip() for line in others if line.strip().startswith(impl)).partition(": ")[2]

    @cached_property
    def ways(self) -> dict[str, Way]:
        """PyTorch, and the implementations of tlkernels that serve the call."""
        ours = {name: partial(self._ours, impl=name) for name in NAMES if name not in self.refused}
        return {EAGER: self._theirs, **ours}

    def _theirs(self, arguments: Any) -> Any:
        args, kwargs = arguments
        return self._function(*args, **kwargs)

    def _ours(self, arguments: Any, impl: str) -> Tensor:
        given = self.named(arguments)
        given.pop("options", None)  # chooses how PyTorch computes linear_cross_entropy, not what
        if given.get("ignore_index", 0) is None:
            del given["ignore_index"]
        return _OURS[self._loss](**given, impl=impl)

    def named(self, arguments: Any) -> dict[str, Any]:
        """Return the arguments by name.

        Raises:
            TypeError: one is deprecated, and tlkernels does not take it.
        """
        args, kwargs = arguments
        given = dict(inspect.signature(self._function).bind(*args, **kwargs).arguments)
        for name in ("size_average", "reduce"):
            if given.pop(name, None) is not None:
                raise TypeError(f"{name} is deprecated; tlkernels takes reduction")
        return given

    def run(self, way: str | None) -> Any:
        """Return the loss."""
        if way is None or way == EAGER:
            return self._theirs(self.arguments)
        if self._loss not in _OURS:
            raise Unserved
        try:
            return self._ours(self.arguments, way)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise Unserved from error

    def logits(self) -> Logits | None:
        """Return the logits, or the log-probabilities."""
        args, kwargs = self.arguments
        input = args[0] if args else kwargs["input"]
        if self._loss == "linear_cross_entropy":
            return logits_of_layer(input, self.named(self.arguments)["linear_weight"], stored=True)
        if not self.has_head:
            return None
        return logits_of(input, 1 if self._loss in ("cross_entropy", "nll_loss") and input.dim() > 1 else -1)
