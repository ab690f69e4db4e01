"""Definition of torch ops: schemas and fakes in Python, so the package imports without _C; C++ and Triton implement."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("tlkernels", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `tlkernels::<schema>` and return its overload; `fake` gives results of the right kind without data."""
    name = _library.define(schema)
    torch.library.register_fake(f"tlkernels::{name}", fake, lib=_library)
    # Autograd is attached around the op; torch's own fallback would only box its arguments to say that it has none.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return getattr(torch.ops.tlkernels, name).default


def define_implemented(schema: str, fake: Callable[..., Any], implementation: Callable[..., Any], key: str) -> Any:
    """As `define`, with an implementation in Python for the dispatch key."""
    op = define(schema, fake)
    _library.impl(op._schema.name.split("::")[1], implementation, key)
    return op


take_memory = define("take_memory(Tensor(a!) tensor, str why) -> Tensor", lambda tensor, why: torch.empty_like(tensor))
"""A tensor that owns `tensor`'s memory from now on; reading `tensor` or a view of it raises RuntimeError saying `why`.

Where `tensor` is only a part of its storage, the rest of which may be in use, the result shares the memory instead.
Not a function of values, so neither differentiable nor compilable.
"""

scale_ = define("scale_(Tensor(a!) values, Tensor factor) -> ()", lambda values, factor: None)
"""Multiplies a dense tensor in place by a number that is read on the device; on CUDA tensors."""
