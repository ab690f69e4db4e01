"""Finds nvcc, and chooses its options and architectures, for setup.py and bench/cuda_resources.py.

Environment:
    CUDA_HOME or CUDA_PATH: the toolkit's folder; otherwise nvcc is looked for in PATH and in /usr/local/cuda.
    TLKERNELS_CUDA_ARCHS: the architectures to compile for, such as "sm_90a sm_120"; see `architectures`.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120", "compute_90", "compute_120")
"""Machine code (sm_) and PTX (compute_). The PTX of 120 serves newer GPUs; that of 90 serves sm_103 and sm_110, which
run neither the code of sm_100a nor newer PTX."""

WITHOUT_CARD = ("sm_80", "sm_90a", "compute_90")
"""The architectures on a machine without a GPU. They run on every GPU that the kernels support: code for 8.x and 9.0,
and PTX, which the driver compiles, for newer ones. Each further architecture takes two or three minutes of a core."""

OPTIONS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
"""C++20, which torch's headers need."""


@functools.cache
def compiler() -> str | None:
    """Return the path of nvcc; None if not found."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home and (found := Path(home) / "bin" / "nvcc").exists():
            return str(found)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def _ask(*options: str) -> str:
    path = compiler()
    if path is None:
        raise RuntimeError("nvcc not found (set CUDA_HOME)")
    run = subprocess.run([path, *options], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


@functools.cache
def home() -> str:
    """Return the toolkit's folder, as nvcc reports it: `compiler()` may be a link, or a script that calls nvcc."""
    found = re.search(r"^#\$ TOP=(.+?)\s*$", _ask("--dryrun", "-c", "x.cu"), re.MULTILINE)
    if not found:
        raise RuntimeError("nvcc --dryrun: no TOP found")
    return str(Path(found[1]).resolve())


def runtime(others: Sequence[Path] = ()) -> str | None:
    """Return the path of libcudart, from the toolkit or from one of the folders `others`; None if not found.

    pip's packages of the toolkit have only libcudart.so.<major version>.
    """
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", _ask("--dryrun", "-c", "x.cu"), re.MULTILINE)
    folders = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', libraries[1] if libraries else "")]
    for folder in [*folders, Path(home()) / "lib64", Path(home()) / "lib", *others]:
        for found in sorted(folder.glob("libcudart.so*")):
            return str(found.resolve().parent / found.name)
    return None


@functools.cache
def version() -> str:
    """Return the toolkit's version, such as "13.0"."""
    found = re.search(r"release (\d+\.\d+)", _ask("--version"))
    if not found:
        raise RuntimeError("nvcc --version: no release found")
    return found[1]


def cards() -> list[tuple[int, int]]:
    """Return the compute capability of each GPU that nvidia-smi lists, such as (9, 0) for an H100."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", output, re.MULTILINE)]


def architectures() -> tuple[str, ...]:
    """Return the architectures to compile for.

    They are those of TLKERNELS_CUDA_ARCHS; or else one for each GPU of this machine; or, without a GPU, WITHOUT_CARD.
    The last two skip architectures that this nvcc does not know, and GPUs older than compute capability 8.0.

    Raises:
        SystemExit: TLKERNELS_CUDA_ARCHS contains a word that is not an architecture.
    """
    named = tuple(re.split(r"[\s,;]+", os.environ.get("TLKERNELS_CUDA_ARCHS", "").strip()))
    if named != ("",):
        for name in named:
            if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
                raise SystemExit(
                    f"TLKERNELS_CUDA_ARCHS: expected names such as {' '.join(ARCHITECTURES)}, got {name!r}"
                )
        return named
    listed = _ask("--list-gpu-arch").split()
    known = [name for name in ARCHITECTURES if "compute_" + re.sub(r"\D", "", name) in listed]
    found = cards()
    wanted = {for_card(card, known) for card in found} if found else WITHOUT_CARD
    return tuple(name for name in known if name in wanted)


def for_card(card: tuple[int, int], names: Sequence[str] = ARCHITECTURES) -> str | None:
    """Return the architecture that is best for a GPU, machine code rather than PTX; None if it runs none of them."""
    runnable = [name for name in names if _runs(card, name)]
    return max(runnable, key=lambda name: (name.startswith("sm_"), _capability(name)), default=None)


def _runs(card: tuple[int, int], name: str) -> bool:
    needed = _capability(name)
    if name.endswith("a"):
        return needed == card
    return needed <= card and (needed[0] == card[0] or name.startswith("compute_"))


def _capability(name: str) -> tuple[int, int]:
    return divmod(int(re.sub(r"\D", "", name)), 10)


def generate(names: tuple[str, ...]) -> list[str]:
    """Return nvcc's options for these architectures."""
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]
