"""The CUDA compiler, for setup.py and bench/cuda_resources.py: where it is, what it compiles for, its options.

Environment: TLKERNELS_CUDA_ARCHS narrows what is compiled for, as in "sm_90a sm_120"; CUDA_HOME names the toolkit.
"""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120", "compute_90", "compute_120")
"""Machine code (sm_), and PTX (compute_) for what comes after: that of 120 for everything newer, and that of 90 for
sm_103 and sm_110, which run neither the code of sm_100a nor newer PTX."""

OPTIONS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
"""C++20 since torch's headers ask for it."""


@functools.cache
def compiler() -> str | None:
    """Return the path of nvcc, or None."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home and (found := Path(home) / "bin" / "nvcc").exists():
            return str(found)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def _ask(*options: str) -> str:
    path = compiler()
    if path is None:
        raise RuntimeError("there is no nvcc")
    run = subprocess.run([path, *options], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


@functools.cache
def home() -> str:
    """Return the folder of the toolkit that nvcc itself uses: `compiler()` may be a link or a script that calls it."""
    found = re.search(r"^#\$ TOP=(.+?)\s*$", _ask("--dryrun", "-c", "x.cu"), re.MULTILINE)
    if not found:
        raise RuntimeError("nvcc --dryrun: no TOP found")
    return str(Path(found[1]).resolve())


def libraries() -> list[str]:
    """Return the folders of the toolkit's libraries for the linker, libcudart's among them."""
    return [str(path) for path in (Path(home()) / "lib64", Path(home()) / "lib") if path.is_dir()]


@functools.cache
def version() -> str:
    """Return the toolkit's version, such as "13.0"."""
    found = re.search(r"release (\d+\.\d+)", _ask("--version"))
    if not found:
        raise RuntimeError("nvcc --version: no release found")
    return found[1]


def architectures() -> tuple[str, ...]:
    """Return what to compile for: what the environment names, or of ARCHITECTURES what this nvcc knows.

    Raises:
        SystemExit: the environment names something that is not an architecture.
    """
    named = tuple(re.split(r"[\s,;]+", os.environ.get("TLKERNELS_CUDA_ARCHS", "").strip()))
    if named != ("",):
        for name in named:
            if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
                raise SystemExit(
                    f"TLKERNELS_CUDA_ARCHS: expected names such as {' '.join(ARCHITECTURES)}, got {name!r}"
                )
        return named
    known = _ask("--list-gpu-arch").split()
    return tuple(name for name in ARCHITECTURES if "compute_" + re.sub(r"\D", "", name) in known)


def generate(names: tuple[str, ...]) -> list[str]:
    """Return the options that ask for these architectures."""
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]
