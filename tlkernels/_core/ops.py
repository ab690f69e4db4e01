"""Definition of torch ops. Schemas and fakes are in Python, so that the package works without the extension."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

_library = torch.library.Library("tlkernels", "DEF")


def define(schema: str, fake: Callable[..., Any], differentiable: bool = False) -> Any:
    """Define `tlkernels::<schema>` and return its overload; `fake` returns empty results of the right shape and dtype.

    A differentiable op also needs `implement_autograd`.
    """
    name = _library.define(schema)
    torch.library.register_fake(f"tlkernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.tlkernels, name).default
    if not differentiable:
        # Its callers add autograd. PyTorch's fallback would box the arguments only to find that no rule is registered.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return op


def implement_vmap(op: Any) -> None:
    """Register a loop as the op's vmap, for batches of upstream gradients: the kernels have no batch dimension."""
    torch.library.register_vmap(op, partial(one_by_one, op), lib=_library)


def one_by_one(function: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Return the stacked results of a function and their batch axes, as a vmap rule does; loops over the batch."""
    results = [
        function(*(arg.select(d, i) if isinstance(d, int) else arg for arg, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def implement_autograd(op: Any, kernel: Callable[..., Any]) -> None:
    """Register the kernel that a differentiable op calls where a gradient may be needed."""
    _library.impl(op._schema.name.split("::")[1], kernel, "Autograd")


def define_implemented(
    schema: str, fake: Callable[..., Any], implementation: Callable[..., Any], key: str, differentiable: bool = False
) -> Any:
    """Call `define`, and register an implementation in Python for the dispatch key."""
    op = define(schema, fake, differentiable)
    _library.impl(op._schema.name.split("::")[1], implementation, key)
    return op


take_memory = define("take_memory(Tensor(a!) tensor, str why) -> Tensor", lambda tensor, why: torch.empty_like(tensor))
"""Moves the memory of `tensor` to the result. Reading `tensor` or a view of it then raises RuntimeError with `why`.

If `tensor` is only a part of its storage, the result shares the memory instead, since the rest may be in use. The op
depends on more than values, so it is neither differentiable nor compilable.
"""

scale_ = define("scale_(Tensor(a!) values, Tensor factor) -> ()", lambda values, factor: None)
"""Multiplies a dense CUDA tensor in place by a number that only the device reads."""
