"""Launches of Triton kernels, and the tables of configurations that they are launched with."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels._core import triton as core

AUTOTUNE = os.environ.get("TLKERNELS_AUTOTUNE") == "1"
"""Whether TLKERNELS_AUTOTUNE=1 is set: `Table.run` times the rows of a table and uses the fastest."""


class Config(NamedTuple):
    """One row of a table: when it applies, and what a kernel is then launched with."""

    architecture: str
    """A pattern, such as "sm_9*"."""
    itemsize: int
    """Bytes of an element, or 0 for any."""
    up_to: int | None
    """The largest size, or None for any."""
    meta: dict[str, int]
    """The kernel's constants, such as block sizes, and options of the compiler, such as `maxnreg`."""
    num_warps: int
    num_stages: int = 1

    def fits(self, architecture: str, itemsize: int) -> bool:
        """Return whether the row is for this architecture and these bytes of an element."""
        return fnmatchcase(architecture, self.architecture) and self.itemsize in (0, itemsize)


class Table:
    """Configurations by architecture, bytes of an element, and size; the first row that fits is used.

    With TLKERNELS_AUTOTUNE=1 in the environment, `run` times all rows of the architecture, once for each power of two
    of the size, uses the fastest, and prints it as a row for the table.
    """

    def __init__(self, name: str, *rows: Config):
        """Keep the rows; a comment at each table says when and why they were chosen."""
        self.name, self.rows = name, rows
        self.tuned: dict[tuple[str, int, int], Config] = {}

    def find(self, device: torch.device, itemsize: int, size: int) -> Config:
        """Return the row for `size` elements of `itemsize` bytes on the device."""
        architecture = core.architecture(device)
        return next(
            row for row in self.rows if row.fits(architecture, itemsize) and (row.up_to is None or size <= row.up_to)
        )

    def run(
        self,
        device: torch.device,
        itemsize: int,
        size: int,
        launches: Callable[[Config], None],
        repeatable: bool = True,
    ) -> None:
        """Call `launches` with the row to use. Not `repeatable`: calling it twice gives other results, so no tuning."""
        if not (AUTOTUNE and repeatable) or core.recorded_architecture is not None:
            launches(self.find(device, itemsize, size))
            return
        key = core.architecture(device), itemsize, size.bit_length()
        if key not in self.tuned:
            self.tuned[key] = self._tune(*key, launches)
        launches(self.tuned[key])

    def _tune(self, architecture: str, itemsize: int, bits: int, launches: Callable[[Config], None]) -> Config:
        from triton.testing import do_bench

        times = []
        for row in self.rows:
            if row.fits(architecture, itemsize):
                times.append((do_bench(lambda row=row: launches(row), return_mode="median"), row))
        best, row = min(times, key=lambda pair: pair[0])
        row = row._replace(architecture=architecture, itemsize=itemsize, up_to=2**bits - 1)
        print(f"{self.name}: {row!r},  # {best * 1e3:.1f} us", flush=True)
        return row


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


_record: Callable[[Launch], None] | None = None


@contextmanager
def recorded(architecture: str, record: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Record launches instead of making them, as if on `architecture`; tensors may be on the meta device.

    Launches are appended to the list that the context manager returns, or passed to `record`.
    """
    global _record
    launches: list[Launch] = []
    before = _record, core.recorded_architecture
    _record, core.recorded_architecture = record or launches.append, architecture
    try:
        yield launches
    finally:
        _record, core.recorded_architecture = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    config: Config | None = None,
    fusion: bool = True,
    **constants: Any,
) -> None:
    """Launch a kernel; `config` gives constants, warps and stages. An empty grid launches nothing.

    With `fusion` the compiler may fuse a product and a sum into one rounding, as in CUDA C++.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {"enable_fp_fusion": fusion}
    if config is not None:
        constants = {**config.meta, **constants}
        options.update(num_warps=config.num_warps, num_stages=config.num_stages)
        options.update((name, value) for name, value in config.meta.items() if name not in kernel.arg_names)
        constants = {name: value for name, value in constants.items() if name not in options}
    if _record is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        _record(Launch(kernel, tuple(grid), {**named, **constants}, options))
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    with _on(first.device):
        kernel[tuple(grid)](*args, **constants, **options)


def _on(device: torch.device) -> Any:
    """Make the device current, on which Triton launches."""
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if other else nullcontext()
