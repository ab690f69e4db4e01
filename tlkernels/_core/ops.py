"""Definition of torch ops: schemas and fakes in Python, so the package imports without _C; C++ and Triton implement."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

_library = torch.library.Library("tlkernels", "DEF")


def define(schema: str, fake: Callable[..., Any], differentiable: bool = False) -> Any:
    """Define `tlkernels::<schema>` and return its overload; `fake` gives results of the right kind without data.

    A differentiable op is completed by `implement_autograd`.
    """
    name = _library.define(schema)
    torch.library.register_fake(f"tlkernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.tlkernels, name).default
    if not differentiable:
        # Autograd is attached around the op; torch's own fallback would only box its arguments to say that it has none.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return op


def implement_vmap(op: Any) -> None:
    """Register a loop as the op's vmap: for batches of upstream values, since the kernels have no batch dimension."""
    torch.library.register_vmap(op, partial(one_by_one, op), lib=_library)


def one_by_one(function: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Return the stacked results of a function and their batch axes, as a vmap rule does, by a loop over the batch."""
    results = [
        function(*(arg.select(d, i) if isinstance(d, int) else arg for arg, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def implement_autograd(op: Any, kernel: Callable[..., Any]) -> None:
    """Register what a differentiable op does where a gradient may be wanted."""
    _library.impl(op._schema.name.split("::")[1], kernel, "Autograd")


def define_implemented(
    schema: str, fake: Callable[..., Any], implementation: Callable[..., Any], key: str, differentiable: bool = False
) -> Any:
    """As `define`, with an implementation in Python for the dispatch key."""
    op = define(schema, fake, differentiable)
    _library.impl(op._schema.name.split("::")[1], implementation, key)
    return op


take_memory = define("take_memory(Tensor(a!) tensor, str why) -> Tensor", lambda tensor, why: torch.empty_like(tensor))
"""A tensor that owns `tensor`'s memory from now on; reading `tensor` or a view of it raises RuntimeError saying `why`.

Where `tensor` is only a part of its storage, the rest of which may be in use, the result shares the memory instead.
Not a function of values, so neither differentiable nor compilable.
"""

scale_ = define("scale_(Tensor(a!) values, Tensor factor) -> ()", lambda values, factor: None)
"""Multiplies a dense tensor in place by a number that is read on the device; on CUDA tensors."""
