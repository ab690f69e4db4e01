"""Builds the .cu files of csrc with g++ into a library, and lets its ops serve CPU tensors.

The same .cu and .cuh files as on a GPU: this folder has the headers of the toolkit, and those of torch that need it.
"""

import ctypes
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent  # of a link: `make sanitize` has one
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from csrc import objects  # noqa: E402

CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-maybe-uninitialized", "-DTLK_CUDA_HOST"]  # GCC 12 takes a small vector of torch for uninitialised
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1"]


def sources() -> list[Path]:
    """Return the ops on CUDA tensors, what they share with the CPU's, and the host run itself."""
    shared = {*(CSRC / "core").glob("*.cpp"), *CSRC.glob("*/call.cpp")}
    return [*sorted(CSRC.rglob("*.cu")), *sorted(shared), *sorted(HERE.glob("*.cpp"))]


def build() -> Path:
    """Return the library, built if it is not there, one process at a time; sanitized in a process with the runtime."""
    sanitize = "libasan" in os.environ.get("LD_PRELOAD", "")
    folder = ROOT / "build" / ("cuda_host_sanitize" if sanitize else "cuda_host")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"-DTLK_TORCH={torch.__version__}", *(["-Og", *SANITIZE] if sanitize else ["-O1"])]
    flags += [f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]
    library = folder / "libtlk_cuda_host.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands = [
            objects.from_source(source, folder / f"{source.parent.name}-{source.name}.o", flags)
            for source in sorted(sources(), key=lambda path: -path.stat().st_size)  # the longest first
        ]
        objects.compile_stale(commands, objects.precompiled_header(folder, flags))
        built = [str(path) for path, _ in commands]
        newest = max(os.path.getmtime(path) for path in built)
        if not library.exists() or os.path.getmtime(library) < newest:
            torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
            link = [*objects.compiler(), "-shared", *built, *torch_libraries, *(SANITIZE if sanitize else []), "-o"]
            unfinished = library.with_suffix(".new")
            subprocess.run([*link, str(unfinished)], check=True)
            unfinished.replace(library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library, whose ops are not in use yet."""
    return ctypes.CDLL(str(build()))


@contextmanager
def ops_on_cpu_tensors() -> Iterator[None]:
    """Let the library serve the native ops of CPU tensors within the context, where it implements them."""
    library = load()
    library.tlk_cuda_host_switch(ctypes.c_bool(True))
    try:
        yield
    finally:
        library.tlk_cuda_host_switch(ctypes.c_bool(False))


if __name__ == "__main__":
    import harness

    if harness.on_cuda_host("cross_entropy"):
        build()
