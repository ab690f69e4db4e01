"""Launches that were recorded, specialised as Triton's launcher does it, and compiled without a GPU."""

import functools
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from tlkernels._core import triton as core


class Specialisation(NamedTuple):
    """What the launcher compiles for the values of a launch."""

    kernel: Any
    options: dict[str, Any]
    signature: dict[str, str]
    """Parameter -> type, or "constexpr"."""
    constants: dict[tuple[int, ...], Any]
    """Position -> value. An integer of 1 and None are constants too."""
    attributes: dict[tuple[int, ...], list[Any]]
    """Position -> what is known of the value, such as that 16 divides it."""

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this from other kernels that are compiled."""
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


def specialised(launch: core.Launch, architecture: str) -> Specialisation:
    """Return what Triton's launcher would compile; the functions that decide are Triton's own."""
    kernel = launch.kernel
    bind, backend = _binder(kernel, architecture)
    bound, specialisation, options = bind(**launch.args, **launch.options)
    _, *derived = kernel._pack_args(backend, dict(launch.options), bound, specialisation, options)
    return Specialisation(kernel, launch.options, *derived)


def front_end(of: Specialisation, architecture: str) -> None:
    """Translate the kernel to Triton's intermediate language, where errors of its source are found."""
    from triton._C.libtriton import ir

    backend = make_backend(target(architecture))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(of.options))
    _source(of).make_ir(
        target(architecture), options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )


def compiled(of: Specialisation, architecture: str) -> Any:
    """Compile the kernel to machine code."""
    return compile(_source(of), target(architecture), of.options)


def _source(of: Specialisation) -> ASTSource:
    return ASTSource(of.kernel, of.signature, of.constants, of.attributes)
