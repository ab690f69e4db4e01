"""Specialises recorded launches as Triton's launcher does, and compiles them without a GPU."""

import functools
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from tlkernels._core.triton.launch import Launch


class Specialisation(NamedTuple):
    """A kernel for the types and values of a launch: what the launcher compiles."""

    kernel: Any
    options: dict[str, Any]
    signature: dict[str, str]
    """Parameter -> type, or "constexpr"."""
    constants: dict[tuple[int, ...], Any]
    """Position -> value. An integer of 1 and None are constants too."""
    attributes: dict[tuple[int, ...], list[Any]]
    """Position -> properties of the value, such as that it is divisible by 16."""

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")

    @property
    def key(self) -> tuple[Any, ...]:
        """Two launches with equal keys are compiled once."""
        parts = self.signature, self.constants, self.attributes, sorted(self.options.items())
        return self.kernel, *map(repr, parts)


def target(architecture: str) -> GPUTarget:
    """Return Triton's target of a name such as "sm_90", "gfx942"."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@functools.cache
def _binder(kernel: Any, architecture: str) -> tuple[Any, Any]:
    backend = make_backend(target(architecture))
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend


def specialised(launch: Launch, architecture: str) -> Specialisation:
    """Return what Triton's launcher would compile, decided by Triton's own functions."""
    kernel = launch.kernel
    bind, backend = _binder(kernel, architecture)
    bound, specialisation, options = bind(**launch.args, **launch.options)
    _, *derived = kernel._pack_args(backend, dict(launch.options), bound, specialisation, options)
    return Specialisation(kernel, launch.options, *derived)


def front_end(kernel: Specialisation, architecture: str) -> None:
    """Translate the kernel to Triton's intermediate language, which finds errors in its source."""
    from triton._C.libtriton import ir

    backend = make_backend(target(architecture))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(kernel.options))
    _source(kernel).make_ir(
        target(architecture), options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )


def compiled(kernel: Specialisation, architecture: str) -> Any:
    """Compile the kernel to machine code."""
    return compile(_source(kernel), target(architecture), kernel.options)


def _source(kernel: Specialisation) -> ASTSource:
    return ASTSource(kernel.kernel, kernel.signature, kernel.constants, kernel.attributes)
