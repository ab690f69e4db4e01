"""Compiles the CUDA kernels outside torch, no GPU needed, and reads what they take from the compiler's report.

    python -m bench.cuda_resources             for every architecture, writes bench/results/cuda_resources.csv
    python -m bench.cuda_resources --quick     for two of them, or those of TLKERNELS_CUDA_ARCHS, to standard output

bench/cuda/<loss>.cu has a launcher for C of each loss; all of them make up build/cuda/libtlk_cuda.so. A kernel that
spills registers is an error, unless EXCEPTIONS has a reason.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from bench.resources import report
from csrc import nvcc

ROOT = Path(__file__).parents[1]
CSV = Path(__file__).parent / "results" / "cuda_resources.csv"
LIBRARY = ROOT / "build" / "cuda" / "libtlk_cuda.so"
# The oldest, and the one with everything that kernels can use.
QUICK = ("sm_80", "sm_90a")
# (pattern of the kernel, pattern of the architecture) -> why it may spill
EXCEPTIONS: dict[tuple[str, str], str] = {}


class Row(NamedTuple):
    """One kernel, compiled for one architecture."""

    loss: str
    kernel: str
    architecture: str
    registers: int
    shared: int
    """Bytes of a block, without what is asked for at launch."""
    stack: int
    """Bytes of a thread, spills among them."""
    spill_stores: int
    spill_loads: int
    problem: str
    exception: str


def parse(loss: str, text: str) -> list[Row]:
    """Return a row for each kernel in what `nvcc -Xptxas -v` says."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        text,
        re.DOTALL,
    )
    if len(found) != text.count("Compiling entry function"):
        raise ValueError(f"{loss}: the compiler's report has lines that are not understood:\n{text}")
    names = _demangle([mangled for mangled, *_ in found])
    rows = []
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = int(registers), int(shared[1]) if shared else 0, int(stack), int(stores), int(loads)
        problem = f"spills: {stores} bytes stored, {loads} loaded" if int(stores) or int(loads) else ""
        exceptions = [
            why
            for (kernel, pattern), why in EXCEPTIONS.items()
            if problem and fnmatchcase(name, kernel) and fnmatchcase(architecture, pattern)
        ]
        rows.append(Row(loss, name, architecture, *numbers, problem, "; ".join(exceptions)))
    return rows


def _demangle(names: list[str]) -> list[str]:
    """Return kernels' names as in the source, without what they return and take."""
    text = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout if names else ""
    plain = [re.sub(r"\(anonymous namespace\)::|\((tlk::)?\w+\)(?=-?\d)", "", line) for line in text.splitlines()]
    return [line.partition("(")[0].removeprefix("void ").replace("tlk::", "") for line in plain]


def compile_loss(source: Path, names: tuple[str, ...]) -> tuple[Path, list[Row]]:
    """Compile one launcher with its kernels; return the object and the rows."""
    built = LIBRARY.parent / f"{source.stem}.o"
    command = [str(nvcc.compiler()), *nvcc.OPTIONS, *nvcc.generate(names), "-Xptxas=-v"]
    done = subprocess.run([*command, "-c", str(source), "-o", str(built)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} {source}\n{done.stdout}{done.stderr}")
    return built, parse(source.stem, done.stdout + done.stderr)


def main(arguments: list[str]) -> int:
    """Compile, link, write, and return whether anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(arguments).quick
    if nvcc.compiler() is None:
        print("there is no nvcc: CUDA_HOME names a toolkit", file=sys.stderr)
        return 2
    narrowed = quick and "TLKERNELS_CUDA_ARCHS" not in os.environ
    names = QUICK if narrowed else nvcc.architectures() if quick else nvcc.ARCHITECTURES
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        sources = sorted((ROOT / "bench" / "cuda").glob("*.cu"))
        compiled = list(pool.map(lambda source: compile_loss(source, names), sources))
    link = [str(nvcc.compiler()), "-shared", *(str(built) for built, _ in compiled), "-o", str(LIBRARY)]
    subprocess.run(link, check=True)
    rows = sorted(row for _, found in compiled for row in found)
    return report(Row._fields, rows, None if quick else CSV)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
