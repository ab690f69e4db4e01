"""Triton: whether it runs here, ops whose kernels load late, tables of configurations, launches.

Nothing here imports triton before a kernel is asked for. Kernels that several losses share are in `triton_kernels.py`.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core.ops import define_implemented

# Triton decides so when a kernel is defined, and the ops below when they are registered: once for the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether kernels are interpreted on CPU tensors, for tests."""

CHECK = os.environ.get("TLKERNELS_CHECK") == "1"
"""Whether class indices on a GPU are checked, which the host then waits for."""

AUTOTUNE = os.environ.get("TLKERNELS_AUTOTUNE") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
"""The type of device that kernels run on; "cuda" is also torch's name for AMD GPUs."""


_MISSING = "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def available() -> bool:
    """Return whether Triton kernels can run in this process."""
    return not _MISSING and (INTERPRETED or torch.cuda.is_available())


def refuse_triton(*tensors: Tensor | None) -> str | None:
    """Return why Triton cannot serve a call with these tensors, or None."""
    if _MISSING:
        return _MISSING
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            kind = "CPU" if INTERPRETED else "GPU"
            return f"it serves {kind} tensors; there is one on {tensor.device}"
        if not INTERPRETED and not torch.compiler.is_compiling() and _too_old(tensor.device.index):
            return "it serves GPUs from sm_80 on"
    return None


@functools.cache
def _too_old(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)


def define(schema: str, fake: Callable[..., Any], module: str, function: str, differentiable: bool = False) -> Any:
    """Define `tlkernels::<schema>`, implemented by a function of `module`, which is imported by the first call."""

    def implementation(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    return define_implemented(schema, fake, implementation, DEVICE.upper(), differentiable)


def tf32() -> bool:
    """Return whether PyTorch's setting lets products of float32 be made in TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError if a class index is out of range; on a GPU only with TLKERNELS_CHECK=1."""
    if target.device.type == "cpu" or (CHECK and target.device.type == "cuda"):
        y = target.long()
        bad = (y != ignore_index) & ((y < 0) | (y >= classes))
        if bool(bad.any()):
            raise IndexError(f"target: expected class indices in [0, {classes}), got {int(y[bad][0])}")


def architecture(device: torch.device) -> str:
    """Return the name of the device in the tables: "sm_90", "gfx942"; "interpreter" for the CPU."""
    if _recorder is not None:
        return _recorder.architecture
    return "interpreter" if device.type == "cpu" else _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


class Config(NamedTuple):
    """One row of a table: what a kernel is launched with, and where."""

    architecture: str
    """A pattern, such as "sm_9*"."""
    itemsize: int
    """The bytes of an element that the row is for, or 0 for any."""
    up_to: int | None
    """The largest size that the row is for, or None."""
    meta: dict[str, int]
    """The constants of the kernel, such as block sizes, and further options of the compiler, such as `maxnreg`."""
    num_warps: int
    num_stages: int = 1


class Table:
    """Configurations by architecture, bytes of an element, and size; the first row that fits is taken.

    With TLKERNELS_AUTOTUNE=1 in the environment, all rows of the architecture compete instead, once for each bucket of
    sizes, and the best one is printed as a row for the table.
    """

    def __init__(self, name: str, *rows: Config):
        """Each loss says beside its table when and why the rows were chosen."""
        self.name, self.rows = name, rows
        self.tuned: dict[tuple[str, int, int], Config] = {}

    def find(self, device: torch.device, itemsize: int, size: int) -> Config:
        """Return the row for `size` elements of `itemsize` bytes on the device."""
        where = architecture(device)
        return next(
            row for row in self.rows if _fits(row, where, itemsize) and (row.up_to is None or size <= row.up_to)
        )

    def run(
        self,
        device: torch.device,
        itemsize: int,
        size: int,
        launches: Callable[[Config], None],
        repeatable: bool = True,
    ) -> None:
        """Call `launches` with the row to use. Nothing is tuned where it gives something else when called again."""
        if not (AUTOTUNE and repeatable) or _recorder is not None:
            launches(self.find(device, itemsize, size))
            return
        key = architecture(device), itemsize, size.bit_length()
        if key not in self.tuned:
            self.tuned[key] = self._tune(key, launches)
        launches(self.tuned[key])

    def _tune(self, key: tuple[str, int, int], launches: Callable[[Config], None]) -> Config:
        from triton.testing import do_bench

        times = []
        for row in self.rows:
            if _fits(row, key[0], key[1]):
                times.append((do_bench(lambda row=row: launches(row), return_mode="median"), row))
        best, row = min(times, key=lambda pair: pair[0])
        row = row._replace(architecture=key[0], itemsize=key[1], up_to=2 ** key[2] - 1)
        print(f"{self.name}: {row!r},  # {best * 1e3:.1f} us", flush=True)
        return row


def _fits(row: Config, where: str, itemsize: int) -> bool:
    return fnmatchcase(where, row.architecture) and row.itemsize in (0, itemsize)


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


class _Recorder(NamedTuple):
    architecture: str
    take: Callable[[Launch], None]


_recorder: _Recorder | None = None


@contextmanager
def recorded(where: str, take: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Record launches, of tensors that may be on the meta device, as on the architecture `where`; make none.

    They are in the list that is given, or go to `take` at the time of the launch.
    """
    global _recorder
    launches: list[Launch] = []
    before, _recorder = _recorder, _Recorder(where, take or launches.append)
    try:
        yield launches
    finally:
        _recorder = before


def launch(kernel: Any, grid: Sequence[int], *args: Any, config: Config | None = None, **constants: Any) -> None:
    """Launch a kernel; `config` gives constants, warps and stages. A grid of no programs is nothing to do.

    A product and a sum may be fused into one rounding, as in C++ for GPUs; where that matters a kernel says so itself.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if config is not None:
        constants = {**config.meta, **constants}
        options.update(num_warps=config.num_warps, num_stages=config.num_stages)
        options.update((name, value) for name, value in config.meta.items() if name not in kernel.arg_names)
        constants = {name: value for name, value in constants.items() if name not in options}
    if _recorder is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        _recorder.take(Launch(kernel, tuple(grid), {**named, **constants}, options))
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with _on(first.device):
        kernel[tuple(grid)](*args, **constants, **options)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


class Example(NamedTuple):
    """A call of a launcher on meta tensors, whose kernels are compiled ahead of time for every architecture."""

    name: str
    run: Callable[[], Any]
    claims: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Kernel -> instructions that its byte or operation model counts on: "LDG.E.128", "STG.E.128", "HGMMA"."""
    exceptions: Mapping[tuple[str, str, str], str] = MappingProxyType({})
    """(kernel, pattern of the architecture, what: "spills" or an instruction) -> why it is right all the same."""
