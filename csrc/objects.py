"""Compiles C++ and CUDA sources to objects in parallel, for setup.py and tests/cuda_host/build.py.

A source is compiled again only if it, a header of it or its command has changed. Torch's headers are compiled once, as
a precompiled header: they are 6 of the 8 s that a source with them takes.

Environment:
    CXX: the C++ compiler, with options if need be; c++ by default.
    MAX_JOBS: the number of compilers that run at once; by default one for each CPU.
"""

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent
ROOT = CSRC.parent
HEADER = CSRC / "precompiled.h"

Command = tuple[Path, list[str]]
"""A file, and the command that builds it."""


def compiler() -> list[str]:
    """Return the C++ compiler with its options."""
    return shlex.split(os.environ.get("CXX", "c++"))


def precompiled_header(folder: Path, flags: Sequence[str]) -> Command:
    """Return the command that compiles torch's headers; `flags` must be those of the sources that use them."""
    built = folder / f"{HEADER.name}.gch"
    return built, [*compiler(), *flags, "-x", "c++-header", str(HEADER), "-o", str(built)]


def from_source(source: Path, built: Path, flags: Sequence[str]) -> Command:
    """Return the command that compiles a source with the precompiled header, which is in the folder of `built`."""
    header = ["-Winvalid-pch", "-include", str(built.parent / HEADER.name)]
    return built, [*compiler(), *flags, *header, "-x", "c++", "-c", str(source), "-o", str(built)]


def compile_stale(commands: Sequence[Command], header: Command | None = None, verbose: bool = False) -> None:
    """Run the commands in parallel, those that use the precompiled header after it.

    A command is skipped if the same command has run on files with the same contents.

    Raises:
        RuntimeError: a command failed; the message is the command and the compiler's output.
    """
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        ready = pool.submit(_compile, *header, (), verbose) if header else None

        def run(made: Command) -> None:
            built, command = made
            if "-include" not in command:
                return _compile(built, command, (), verbose)
            assert ready is not None
            ready.result()
            return _compile(built, command, (HEADER,), verbose)

        list(pool.map(run, commands))


def _compile(built: Path, command: list[str], further: Sequence[Path], verbose: bool) -> None:
    """Run a command unless its file is up to date; `further` are dependencies that the compiler does not list."""
    record = built.with_name(f"{built.name}.json")
    if built.exists() and record.exists():
        made_by, digests = json.loads(record.read_text())
        if made_by == command and all(_digest(path) == digest for path, digest in digests.items()):
            return
    record.unlink(missing_ok=True)
    if verbose:
        print(shlex.join(command), flush=True)
    names = f"{built}.d"
    done = subprocess.run([*command, "-MD", "-MF", names], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, flush=True)
    sources = Path(names).read_text().replace("\\\n", " ").partition(":")[2].split()
    ours = {Path(name).resolve() for name in [*sources, *further]}
    tracked = sorted(str(path.relative_to(ROOT)) for path in ours if path.is_relative_to(ROOT) and _is_source(path))
    record.write_text(json.dumps([command, {path: _digest(path) for path in tracked}]))


def _is_source(path: Path) -> bool:
    """Whether a file of the checkout is a source: not one in a virtual environment or a build inside it."""
    return path.relative_to(ROOT).parts[0] in ("csrc", "tests")


def _digest(path: str) -> str | None:
    """Return a hash of a file, whose path is relative to the checkout; None if it does not exist."""
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
