"""Compiles the CUDA kernels outside torch, no GPU needed, and reads what they take from the compiler's report.

    python -m bench.cuda_resources             for every architecture, writes bench/results/cuda_resources.csv
    python -m bench.cuda_resources --quick     for two of them, or those of TLKERNELS_CUDA_ARCHS, to standard output

bench/cuda/<loss>.cu has a launcher for C of each loss; all of them make up build/cuda/<architecture>/libtlk_cuda.so. A
kernel that spills registers is an error, unless EXCEPTIONS has a reason. What was compiled from the same files before
is not compiled again.
"""

import argparse
import hashlib
import itertools
import json
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
BUILD = ROOT / "build" / "cuda"
# The oldest, and the one with everything that kernels can use.
QUICK = ("sm_80", "sm_90a")
# (pattern of the kernel, pattern of the architecture) -> why it may spill
_FEW = "a few numbers of a thread, up to 84 bytes, although its bound leaves registers: ptxas keeps to 64 to 80"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("cross_entropy_rows<*, InShared<*>, *, true>", "*"): _FEW,
    ("cross_entropy_rows<double, InRegisters<double>, *>", "*"): _FEW,
    ("cross_entropy_columns<double, *>", "*"): _FEW,
    # js. __launch_bounds__ with one block a multiprocessor ends this, but takes 101 to 128 registers for it.
    ("distillation_kernel<*, 1, *>", "*"): "up to 76 bytes: ptxas goes down to 64 registers, so that two blocks fit",
    ("cross_entropy_rows<*, InMemory<*>, *>", "sm_1*"): _FEW,
    ("cross_entropy_rows<double, InShared<double>, 512, false>", "*"): _FEW,
    ("cross_entropy_columns<*, true>", "*"): _FEW,
    ("distillation_kernel<double, 2, false, *>", "*"): "up to 64 bytes, in float64",
    (
        "distillation_kernel<*>",
        "sm_1*",
    ): "up to 36 bytes of 64 or 128 registers in five kernels; not looked at, no such GPU",
    ("distillation_kernel<float, 2, false, *, true>", "*"): "24 bytes, of total variation with a softcap in float32",
    (
        "contrastive::statistics_of_tiles<contrastive::Products<*, contrastive::Shape<float, 128, 128, 2, 4> > >",
        "sm_1*",
    ): "up to 244 bytes with 128 registers, so that two blocks fit; where in the kernel has not been looked at",
}


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


def compile_loss(source: Path, architecture: str) -> list[Row]:
    """Compile one launcher with its kernels, unless that was done from the same files; return the rows."""
    built = BUILD / architecture / f"{source.stem}.o"
    built.parent.mkdir(parents=True, exist_ok=True)
    made, dependencies, said = (built.with_suffix(suffix) for suffix in (".json", ".d", ".txt"))
    options = [*nvcc.OPTIONS, *nvcc.generate((architecture,)), "-Xptxas=-v", "-MD", "-MF", str(dependencies)]
    command = [str(nvcc.compiler()), *options, "-c", str(source), "-o", str(built)]
    if not (made.exists() and json.loads(made.read_text()) == [command, _digests(dependencies)]):
        made.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        said.write_text(done.stdout + done.stderr)
        made.write_text(json.dumps([command, _digests(dependencies)]))
    return parse(source.stem, said.read_text())


def _digests(dependencies: Path) -> dict[str, str]:
    """Return the digests of our files among those that the compiler says it has read."""
    names = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
    ours = [path for path in map(Path, names) if path.resolve().is_relative_to(ROOT)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "" for path in ours}


def main(arguments: list[str]) -> int:
    """Compile, link, write, and return whether anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources")
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(arguments).quick
    if nvcc.compiler() is None:
        print("nvcc not found (set CUDA_HOME)", file=sys.stderr)
        return 2
    names: tuple[str, ...] = nvcc.ARCHITECTURES
    if quick:
        names = nvcc.architectures() if "TLKERNELS_CUDA_ARCHS" in os.environ else QUICK
    sources = sorted((ROOT / "bench" / "cuda").glob("*.cu"))
    pairs = list(itertools.product(sources, names))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        rows = sorted(row for found in pool.map(lambda pair: compile_loss(*pair), pairs) for row in found)
    for name in names:
        objects = [str(BUILD / name / f"{source.stem}.o") for source in sources]
        library = str(BUILD / name / "libtlk_cuda.so")
        subprocess.run([str(nvcc.compiler()), "-shared", *objects, "-o", library], check=True)
    return report(Row._fields, rows, None if quick else CSV)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
