"""Logits that are computed when somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyLogits:
    """Stands in for the logits of a model that did not make them, in `outputs.logits`.

    Shape, dtype and device are known without them. Everything else that a tensor can do, and every torch function,
    computes them, with autograd, and keeps them. It is not an instance of `torch.Tensor`; `logits.tensor()` is one.
    """

    def __init__(self, make: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.make, self.shape, self.dtype, self.device = make, shape, dtype, device
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the logits."""
        # Made without autograd before, they cannot serve a caller that differentiates.
        if self._made is None or (torch.is_grad_enabled() and not self._made.requires_grad):
            self._made = self.make().to(self.dtype)
        return self._made

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> LazyLogits:
        """Return logits in float32. Accelerate converts the outputs of every forward pass so."""
        return LazyLogits(self.make, self.shape, torch.float32, self.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by protocols, such as copying
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return f"LazyLogits({tuple(self.shape)}, {self.dtype})"


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *operands: getattr(self.tensor(), name)(*operands)


# Python looks operators up in the class.
_ARITHMETIC = ("add", "sub", "mul", "truediv", "pow", "matmul")
_OPERATORS = [f"__{side}{name}__" for name in _ARITHMETIC for side in ("", "r")]
_OPERATORS += [f"__{name}__" for name in ("neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "len", "iter", "array")]
for _name in _OPERATORS:
    setattr(LazyLogits, _name, _operator(_name))
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]
