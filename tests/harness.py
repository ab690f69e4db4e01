"""What the tests of all losses use: the implementations of this machine, inputs, the error budget.

The oracle of a loss is its PyTorch lines, run in float64. `scripts/gpu` and `bench/gpu.py` import this module too, so
it needs no pytest.

Environment: CXX is the compiler of the host run of the CUDA kernels. tests/conftest.py says what TLKERNELS_CHECK does.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import native, triton

CUDA_HOST = "cuda_host"
"""The `isa` of the host run: the CUDA kernels, compiled for the host, serve CPU tensors (tests/cuda_host)."""

CUDA_LOSSES = {path.parent.name for path in Path(__file__).parents[1].glob("csrc/*/cuda.cu")}
"""The losses that have CUDA kernels of their own."""


class Target(NamedTuple):
    """An implementation to test; for `native` also an instruction set of the CPU, CUDA_HOST, or "cuda" for a GPU."""

    impl: str
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.impl}-{self.isa}" if self.isa else self.impl


def targets(loss: str = "") -> list[Target]:
    """Return the targets of this machine; with `loss` also its CUDA kernels, on the host and on a GPU."""
    every = [Target("reference"), *(Target("native", isa) for isa in native.isas())]
    if on_cuda_host(loss):
        every.append(Target("native", CUDA_HOST))
    if loss in CUDA_LOSSES and native.build_info().get("cuda") and torch.cuda.is_available():
        every.append(Target("native", "cuda"))
    return [*every, *([Target("triton")] if triton.available() else [])]


def device(target: Any) -> str:
    """Return the device type for the tensors of a target, or of the implementation of that name.

    tests/conftest.py makes it the default device of a test that has such a parameter.
    """
    if getattr(target, "isa", "") == "cuda":
        return "cuda"
    return triton.DEVICE if getattr(target, "impl", target) == "triton" else "cpu"


def generator(seed: int) -> torch.Generator:
    """Return a seeded random number generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def on_cuda_host(loss: str) -> bool:
    """Return whether the loss has CUDA kernels and this host can compile and run them."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return loss in CUDA_LOSSES and native.available() and sys.platform == "linux" and compiler is not None


def cuda_host() -> ModuleType:
    """Import and return tests/cuda_host/build.py."""
    from cuda_host import build

    return build


INTERPRETED_ELEMENTS = 40_000
"""The size rule of Triton's interpreter: it skips calls with a larger tensor. One program takes it about 5 ms, and two
blocks of a kernel show what two hundred would."""


def too_large(impl: str, *arguments: Any) -> bool:
    """Return whether the size rule skips a call with these arguments."""
    sizes = [argument.numel() for argument in arguments if isinstance(argument, Tensor)]
    return impl == "triton" and triton.INTERPRETED and max(sizes, default=0) > INTERPRETED_ELEMENTS


def mend_interpreter() -> None:
    """Make Triton's interpreter round to bfloat16 as GPUs do, and take half the time."""
    import numpy as np
    from triton import language
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(input: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (bfloat16, float32):
            return np.ascontiguousarray(input).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (float32, bfloat16):
            return original(input, source, target, rounding_mode)
        bits = np.ascontiguousarray(input, np.float32).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        return np.where(np.isnan(input), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert  # the original truncates

    # On a GPU a logit has the same bits in every kernel. NumPy's products in float32 depend on the tile's shape on some
    # processors (OpenBLAS's kernels for AMD EPYC and AVX2), so they are made in float64 and rounded.
    dot = interpreter.InterpreterBuilder.create_dot

    def rounded_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return dot(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = rounded_dot

    # Every function that a kernel calls would patch all of triton.language again; its kernel has done so already.
    replace, replaced = interpreter._patch_lang, set[str]()

    def replace_once(function: Any) -> Any:
        values = function.__globals__.values()
        modules = {module.__name__ for module in (language, language.core) if any(value is module for value in values)}
        if modules and modules <= replaced:
            return None
        outermost = not replaced
        replaced.update(modules)
        scope = replace(function)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = replace_once


@contextmanager
def forced(target: Target) -> Iterator[str]:
    """Use the target's instruction set, or the CUDA kernels, within the block; yields the name for `impl=`."""
    if target.isa == CUDA_HOST:
        with cuda_host().ops_on_cpu_tensors():
            yield target.impl
        return
    before = native.isa()
    instruction_set = target.isa not in ("", "cuda")
    if instruction_set:
        native.force_isa(target.isa)
    try:
        yield target.impl
    finally:
        if instruction_set:
            native.force_isa(before)


@contextmanager
def cross_entropy_strategy(name: str, library: Any = None) -> Iterator[None]:
    """Restrict cross entropy's CUDA kernels to one row strategy of csrc/cross_entropy/cuda_table.h within the block.

    A number after the name ("shared 256") is the most threads of a block. `library` is the ctypes library with the
    kernels: the extension by default, or the host run's.
    """
    library = library or ctypes.CDLL(native.file())
    force = library.tlk_force_cross_entropy_strategy
    words = name.split()
    threads = int(words.pop()) if words[-1].isdigit() else 0
    force(ctypes.c_char_p(" ".join(words).encode()), threads)
    try:
        yield
    finally:
        force(ctypes.c_char_p(None), 0)


CONTEXT_LOST = 77
"""The exit status of a process that ends itself because a CUDA error has made its context unusable."""


def context_lost(message: str) -> bool:
    """Return whether the process can no longer use its GPU after an error with this message."""
    words = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")
    return "out of memory" not in message and any(word in message for word in words)


@dataclass(frozen=True)
class LossCase:
    """One call of a loss; a seed gives its random numbers."""

    id: str
    dtype: torch.dtype
    make: Callable[[int], dict[str, Any]]
    """Seed -> the arguments by name, including the options; tensors have the dtypes of the call."""
    wants_grad: tuple[str, ...]
    """The arguments that get a gradient."""
    small: bool = False
    """float64, and small and smooth enough for gradcheck, Hessians and vmap."""
    large: bool = False
    """Millions of logits: too many for the CUDA kernels on the host."""


@dataclass(frozen=True)
class Loss:
    """A loss and its cases, for the battery of tests/test_every_loss.py."""

    function: Callable[..., Tensor]
    pytorch: Callable[..., Tensor]
    """The PyTorch lines that it replaces; the same arguments without `impl`. In float64 they are the oracle."""
    cases: Sequence[LossCase]
    module: type[torch.nn.Module] | None
    """Its module class, if it has one. The constructor takes the arguments that `forward` does not take."""
    ops: Callable[[], Sequence[tuple[Any, tuple[Any, ...]]]] = tuple
    """The registered ops, each with arguments for opcheck."""
    rowwise: bool = True
    """Whether the result is the same, bit for bit, for any number of threads."""
    cuda: str = ""
    """The loss whose CUDA kernels it uses; empty: its own."""


def split(arguments: dict[str, Any], names: Sequence[str]) -> tuple[tuple[Tensor, ...], Callable[..., dict[str, Any]]]:
    """Return the named arguments, and a function that replaces them in `arguments`."""

    def put(*tensors: Tensor) -> dict[str, Any]:
        return {**arguments, **dict(zip(names, tensors, strict=True))}

    return tuple(arguments[name] for name in names), put


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with floating-point tensors in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def class_indices(rows: tuple[int, ...], classes: int, generator: torch.Generator, ignore_index: int = -100) -> Tensor:
    """Return class indices; a fifth of the rows is ignored, unless there are few rows."""
    target = torch.randint(0, classes, rows, generator=generator)
    ignored = torch.rand(rows, generator=generator) < 0.2
    return target.masked_fill(ignored, ignore_index) if target.numel() > 2 and not ignored.all() else target


def words(options: dict[str, Any]) -> str:
    """Return the options as a test id, one word for each."""
    return "-".join(f"{name}={value}" for name, value in options.items())


LAYOUTS = ("contiguous", "transposed", "sliced", "channels_last")


def lay_out(dense: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides."""
    if layout == "transposed" and dense.dim() > 1:
        return dense.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":  # every second element of a larger tensor, at an unaligned start
        wide = torch.full((*dense.shape[:-1], 2 * dense.shape[-1] + 1), float("nan"), dtype=dense.dtype)
        wide[..., 1::2] = dense
        return wide[..., 1::2]
    if layout == "channels_last" and dense.dim() == 4:
        return dense.contiguous(memory_format=torch.channels_last)
    return dense.contiguous()


def logits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, class_axis: int = 1) -> Tensor:
    """Return logits with several kinds of rows: plain, nearly equal, one far ahead, one far behind, large offset."""
    axis = min(class_axis, len(shape) - 1)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64).movedim(axis, -1)
    flat = rows.reshape(-1, shape[axis]).clone()
    flat[1::5] *= 1e-3
    flat[2::5, 0] += 30
    flat[3::5, -1] -= 40
    flat[4::5] += 50
    return (2 * flat).reshape(rows.shape).movedim(-1, axis).to(dtype)


class Budget:
    """The error that an implementation may have: twice eager's in the same dtype, plus one rounding of the result.

    An error is the largest difference from the oracle over all values of all draws, so that one lucky value of eager
    does not decide. In float64 eager is the oracle itself: there a difference of 1e-13 times the largest value is
    allowed, or 1e-13 if that is larger.
    """

    def __init__(self, dtype: torch.dtype):
        """Start without draws, for results of `dtype`."""
        self.dtype = dtype
        self.ours: list[Tensor] = []
        self.eager: list[Tensor] = []
        self.oracle: list[Tensor] = []

    def add(self, ours: Tensor, eager: Tensor, oracle: Tensor) -> None:
        """Add a draw: the results of the implementation, of eager, and of the oracle in float64.

        Raises:
            AssertionError: the shape is wrong, or NaN and infinity are not where the oracle has them.
        """
        assert ours.shape == oracle.shape, f"shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
        ours, eager, oracle = ours.detach().double(), eager.detach().double(), oracle.detach()
        finite = oracle.isfinite()
        assert torch.equal(ours[~finite].nan_to_num(7), oracle[~finite].nan_to_num(7)), "NaN or infinity differ"
        assert bool(ours[finite].isfinite().all()), "NaN or infinity where the oracle is finite"
        self.ours.append((ours - oracle)[finite])
        self.eager.append((eager - oracle)[finite].nan_to_num(0))
        self.oracle.append(oracle[finite])

    def check(self, what: str) -> None:
        """Raise AssertionError if the implementation's error is over the budget."""
        error, eagers, allowed = self._errors()
        assert error <= allowed, f"{what}: error {error:.3g}, eager's {eagers:.3g}, allowed {allowed:.3g}"

    def holds(self) -> bool:
        """Return whether the implementation's error is within the budget."""
        error, _, allowed = self._errors()
        return error <= allowed

    def _errors(self) -> tuple[float, float, float]:
        """Return the implementation's error, eager's, and what is allowed."""
        parts = (self.ours, self.eager, self.oracle)
        error, eagers, scale = (max((float(t.abs().max()) for t in draws if t.numel()), default=0.0) for draws in parts)
        if self.dtype == torch.float64:
            return error, eagers, 1e-13 * max(1.0, scale)
        return error, eagers, 2 * eagers + torch.finfo(self.dtype).eps * scale


def check_budgets(
    dtype: torch.dtype,
    draw: Callable[[int], Iterable[tuple[str, Tensor, Tensor, Tensor]]],
    most: int = 30,
    first: int = 3,
) -> None:
    """Raise AssertionError unless every result of a call keeps its budget.

    `draw(seed)` yields, for each result, its name and the values of the implementation, eager and the oracle. Eager may
    be lucky in the `first` draws: if they are over the budget, six draws decide, and after them `most`.
    """
    budgets: dict[str, Budget] = {}
    drawn = 0
    for enough in (first, max(first, 6), most):
        for seed in range(drawn, enough):
            for name, *values in draw(seed):
                budgets.setdefault(name, Budget(dtype)).add(*values)
        drawn = enough
        if all(budget.holds() for budget in budgets.values()):
            return
    for name, budget in budgets.items():
        budget.check(name)


def check_results(dtype: torch.dtype, results: Iterable[tuple[str, Tensor, Tensor, Tensor]]) -> None:
    """Raise AssertionError unless every result of one draw keeps its budget; see `check_budgets`."""
    for name, *values in results:
        budget = Budget(dtype)
        budget.add(*values)
        budget.check(name)


def gradients(loss: Callable[[Tensor], Tensor], input: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the input's gradient; `upstream` has the loss's shape."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


def second_gradients(
    loss: Callable[[Tensor], Tensor], input: Tensor, upstream: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of <direction, gradient> with respect to the input and the upstream value."""
    leaf = input.detach().requires_grad_()
    value = loss(leaf)
    factor = upstream.to(value.dtype).requires_grad_()
    (grad,) = torch.autograd.grad(value, leaf, factor, create_graph=True)
    by_input, by_upstream = torch.autograd.grad((grad * direction.to(grad.dtype)).sum(), (leaf, factor))
    return by_input, by_upstream
