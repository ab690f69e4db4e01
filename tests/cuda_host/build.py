"""Builds csrc/cuda with g++ into a library whose kernels run on the host, and puts its ops in the CPU's place.

The same .cu and .cuh files as on a GPU: this folder has the headers of the toolkit, and those of torch that need it.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# Those that belong to the extension module.
NOT_SHARED = ("module.cpp", "autograd.cpp")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTLK_CUDA_HOST"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1"]


def sources() -> list[Path]:
    """Return the ops on CUDA tensors, what they share with the CPU's, and the host run itself."""
    shared = [path for path in sorted(CSRC.glob("*.cpp")) if path.name not in NOT_SHARED]
    return [*sorted((CSRC / "cuda").glob("*.cu")), *shared, *sorted(HERE.glob("*.cpp"))]


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _compile(built: Path, command: list[str]) -> None:
    """Run a compiler command that writes `built`, unless it was made by this very command from the same files."""
    record = built.with_suffix(".json")
    if built.exists() and record.exists():
        made_by, digests = json.loads(record.read_text())
        if made_by == command and all(Path(p).exists() and _digest(p) == digest for p, digest in digests.items()):
            return
    done = subprocess.run([*command, "-MMD", "-MF", f"{built}.d"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    names = Path(f"{built}.d").read_text().replace("\\\n", " ").partition(":")[2].split()
    ours = [name for name in names if Path(name).resolve().is_relative_to(ROOT)]
    record.write_text(json.dumps([command, {name: _digest(name) for name in ours}]))


def build(sanitize: bool = False) -> Path:
    """Return the library, built if it is not there; one process at a time."""
    folder = ROOT / "build" / ("cuda_host_sanitize" if sanitize else "cuda_host")
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    flags = [*FLAGS, f"-DTLK_TORCH={torch.__version__}", *(["-Og", *SANITIZE] if sanitize else ["-O1"])]
    includes = [f"-I{HERE}", *(f"-isystem{path}" for path in include_paths())]
    library = folder / "libtlk_cuda_host.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands = []
        for source in sources():
            built = folder / f"{source.parent.name}-{source.name}.o"
            commands.append((built, [compiler, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(built)]))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(lambda args: _compile(*args), commands))
        objects = [str(built) for built, _ in commands]
        newest = max(os.path.getmtime(path) for path in objects)
        if not library.exists() or os.path.getmtime(library) < newest:
            torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
            link = [compiler, "-shared", *objects, *torch_libraries, *(SANITIZE if sanitize else []), "-o"]
            unfinished = library.with_suffix(".new")
            subprocess.run([*link, str(unfinished)], check=True)
            unfinished.replace(library)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library, whose ops are not in use yet; the sanitized one where this process runs with its runtime."""
    return ctypes.CDLL(str(build("libasan" in os.environ.get("LD_PRELOAD", ""))))


@contextmanager
def ops_on_cpu_tensors() -> Iterator[None]:
    """Serve the native ops of CPU tensors by the library meanwhile, where it has them."""
    library = load()
    library.tlk_cuda_host_switch(ctypes.c_bool(True))
    try:
        yield
    finally:
        library.tlk_cuda_host_switch(ctypes.c_bool(False))
