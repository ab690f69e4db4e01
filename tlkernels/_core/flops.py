"""Operations that the ops count under `torch.utils.flop_counter.FlopCounterMode`.

An op counts the matrix products that its results need, 2 * m * n * k each: one for the logits or similarities, which no
op takes as an argument, and one for each needed gradient of their factors. So a backward counts the logits again, which
it computes again. What an op computes twice within itself counts once, as in PyTorch's formulas for attention.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Formula = Callable[..., int]
"""Takes the op's arguments by name, with shapes in the place of tensors."""
Shape = Sequence[int]

_MODULE = "torch.utils.flop_counter"
_formulas: dict[Any, Formula] = {}


def count_by(op: Any, formula: Formula) -> None:
    """Make `formula` the number of operations of `op`."""
    _formulas[op] = formula
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE], {op: formula})


def of_product(left: Shape, right: Shape, needs: Sequence[bool] = (), rows: int | None = None) -> int:
    """Return the number of operations of left @ right.T and of the needed gradients of its factors.

    `needs` begins with those of `left` and `right`. `rows` is how many rows of `left` take part; None for all.
    """
    product = 2 * (prod(left[:-1]) if rows is None else rows) * prod(right)
    return product * (1 + sum(needs[:2]))


def of_linear_layer(
    input: Shape, linear_weight: Shape, needs: Sequence[bool] = (), num_valid: int | None = None, **_: Any
) -> int:
    """Return the number of operations of an op on the logits of a linear layer. A bias adds no product."""
    return of_product(input, linear_weight, needs, num_valid)


def counting() -> bool:
    """Return whether dispatch modes are active, and all of them only count operations."""
    mode = getattr(sys.modules.get(_MODULE), "_FlopCounterMode", None)
    return mode is not None and all(type(active) is mode for active in _get_current_dispatch_mode_stack())


def _register(module: ModuleType, formulas: Mapping[Any, Formula]) -> None:
    for op, formula in formulas.items():
        module.register_flop_formula(op.overloadpacket)(_by_name(op, formula))


def _by_name(op: Any, formula: Formula) -> Callable[..., int]:
    def count(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        names = (argument.name for argument in op._schema.arguments)
        return formula(**dict(zip(names, args, strict=False)), **kwargs)

    return count


class _WhenImported:
    """A finder that registers the formulas when PyTorch's counter is imported, which loads Triton and takes 180 ms."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module, _formulas)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WhenImported)
