"""Running out of memory, and how much memory a step takes."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tlkernels.train.errors import RunError, one_line

_STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
"""Writing 5 to it sets the process's high-water mark to its present size."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers in glibc


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; on the CPU PyTorch raises a plain RuntimeError."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def halved(rows: int, processes: int, error: BaseException) -> int:
    """Return half the size of the micro-batches. Raises `RunError` where it cannot be halved."""
    if rows < 2 or processes > 1:
        # One process cannot tell the others, which already wait for its gradients.
        why = "one row is too much" if rows < 2 else "give each of the processes a smaller --run.micro_batch"
        raise RunError(f"out of memory: {why} ({one_line(error)})") from error
    return (rows + 1) // 2


def peak_bytes(step: Callable[[], object]) -> int | None:
    """Return the most memory that `step` takes in addition to what is there before; None where it cannot be measured.

    On a GPU that of the device, otherwise that of the process (Linux).
    """
    if torch.cuda.is_available():
        reset_peak()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not RESET.exists():
        step()
        return None
    with own_mappings():
        reset_peak()
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before


@contextmanager
def own_mappings() -> Iterator[None]:
    """Give each tensor from 1 MiB a mapping of its own (Linux): its gaps in the heap would count as well."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # where glibc itself puts it after the first large tensor is freed
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


def reset_peak() -> None:
    """Begin a measurement that ends with `peak`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        reset_resident()


def reset_resident() -> None:
    """Give back what is free, and set the process's high-water mark to its present size (Linux)."""
    gc.collect()
    # Free pages that the allocator keeps would be used again without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5", encoding="ascii")


def peak() -> int | None:
    """Return the most memory that was in use since `reset_peak`; None where it cannot be measured.

    On a GPU that of the device's tensors, otherwise that of the whole process (Linux).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") if RESET.exists() else None


def resident(field: str) -> int:
    """Return a number of bytes of /proc/self/status, such as VmRSS or VmHWM."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])
