"""The CUDA compiler, for setup.py and bench/cuda_resources.py: where it is, what it compiles for, its options.

Environment: TLKERNELS_CUDA_ARCHS names what is compiled for, as in "sm_90a sm_120"; CUDA_HOME names the toolkit.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120", "compute_90", "compute_120")
"""Machine code (sm_), and PTX (compute_) for what comes after: that of 120 for everything newer, and that of 90 for
sm_103 and sm_110, which run neither the code of sm_100a nor newer PTX."""

WITHOUT_CARD = ("sm_80", "sm_90a", "compute_90")
"""What is compiled for where there is no card. It runs on every card that the kernels support: code for 8.x and 9.0,
and PTX, which the driver compiles, for what is newer. Each one more takes two or three minutes of a core."""

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


def runtime(others: Sequence[Path] = ()) -> str | None:
    """Return the path of libcudart: that of the toolkit, or else one in the folders `others`; None if there is none.

    The toolkit's packages for pip have it under the name of its major version alone.
    """
    told = re.search(r"^#\$ LIBRARIES=(.*)$", _ask("--dryrun", "-c", "x.cu"), re.MULTILINE)
    named = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', told[1] if told else "")]
    for folder in [*named, Path(home()) / "lib64", Path(home()) / "lib", *others]:
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
    """Return the compute capability of each card of this machine, as nvidia-smi tells it: (9, 0) of an H100."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", told, re.MULTILINE)]


def architectures() -> tuple[str, ...]:
    """Return what to compile for: what the environment names, or what the cards here need, or WITHOUT_CARD.

    Of ARCHITECTURES, those that this nvcc does not know are left out. Nothing is left for cards that are too old.

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
    able = [name for name in ARCHITECTURES if "compute_" + re.sub(r"\D", "", name) in known]
    here = cards()
    wanted = {for_card(card, able) for card in here} if here else WITHOUT_CARD
    return tuple(name for name in able if name in wanted)


def for_card(card: tuple[int, int], names: Sequence[str] = ARCHITECTURES) -> str | None:
    """Return which architecture a card runs best, machine code rather than PTX; None if it runs none of them."""
    able = [name for name in names if _runs(card, name)]
    return max(able, key=lambda name: (name.startswith("sm_"), _capability(name)), default=None)


def _runs(card: tuple[int, int], name: str) -> bool:
    needed = _capability(name)
    if name.endswith("a"):
        return needed == card
    return needed <= card and (needed[0] == card[0] or name.startswith("compute_"))


def _capability(name: str) -> tuple[int, int]:
    return divmod(int(re.sub(r"\D", "", name)), 10)


def generate(names: tuple[str, ...]) -> list[str]:
    """Return the options that ask for these architectures."""
    return [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in names]
