"""Compiles the Triton kernels for every architecture, without a GPU, and reads registers and spills from the code.

    python -m bench.triton_resources            all losses, writes bench/results/triton_resources.csv
    python -m bench.triton_resources mse ...    some losses, to standard output
    python -m bench.triton_resources --stale    compiles nothing, lists the rows of the file that are out of date

The kernels and their arguments come from `examples()` of bench/triton/<loss>.py, whose calls are made with meta tensors
while launches are recorded. Such a call fails where a launcher depends on the values of a tensor.
"""

import ast
import csv
import functools
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import tlkernels
from bench.resources import report
from bench.triton import Example
from bench.triton_launches import Specialisation, compiled, specialised
from tlkernels._core.triton import INTERPRETED
from tlkernels._core.triton.launch import Launch, recorded

LOSSES = sorted(path.parent.name for path in Path(tlkernels.__file__).parent.glob("losses/*/triton.py"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CSV = Path(__file__).parent / "results" / "triton_resources.csv"
# AMD's names of the instructions that examples claim.
_AMD = {"LDG.E.128": "global_load_dwordx4", "STG.E.128": "global_store_dwordx4", "HGMMA": "v_mfma"}


class Row(NamedTuple):
    """One kernel, compiled for one architecture."""

    loss: str
    example: str
    kernel: str
    architecture: str
    constants: str
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    local: int
    """Bytes of stack and local memory of a thread, spills among them."""
    spills: int
    """LDL and STL instructions; registers on AMD."""
    loads_128: int
    stores_128: int
    hgmma: int
    problem: str
    """Spills, local memory, and instructions that the example claims and the code does not have."""
    exception: str
    """Why the problem is accepted."""
    source: str
    """A hash of the kernel and what it calls, types, constants, options, and Triton's version."""


def distinct(loss: str) -> Iterator[tuple[Example, str, Launch, str]]:
    """Yield each kernel that a loss's examples launch once for each architecture, with the hash of its source."""
    module = importlib.import_module(f"bench.triton.{loss}")
    for architecture in ARCHITECTURES:
        seen = set()
        for example in module.examples():
            with recorded(architecture) as launches:
                example.run()
            for launch in launches:
                source = _hash(architecture, launch)
                if source not in seen:
                    seen.add(source)
                    yield example, architecture, launch, source


def compile_all(loss: str) -> list[Row]:
    """Compile the kernels that the examples of a loss launch."""
    return [_row(loss, *launch) for launch in distinct(loss)]


def stale() -> list[str]:
    """Return the rows of the file that are not of these sources, and those that it lacks."""
    with CSV.open(newline="") as file:
        have = {(row["loss"], row["architecture"], row["kernel"], row["source"]) for row in csv.DictReader(file)}
    need = {
        (loss, architecture, specialised(launch, architecture).name, source)
        for loss in LOSSES
        for _, architecture, launch, source in distinct(loss)
    }
    return [f"out of date: {row}" for row in sorted(have - need)] + [f"missing: {row}" for row in sorted(need - have)]


def _hash(architecture: str, launch: Launch) -> str:
    import triton

    _, *parts = specialised(launch, architecture).key
    parts = [triton.__version__, architecture, *parts, _source(launch.kernel)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@functools.cache
def _source(kernel: Any) -> str:
    seen: dict[str, str] = {}
    _add_source(kernel, seen)
    return "\n".join(f"{name} {source}" for name, source in sorted(seen.items()))


def _add_source(function: Any, seen: dict[str, str]) -> None:
    """Add the source of a function and of what it calls, without comments, and the constants that it uses."""
    tree = ast.parse(function.src)
    seen[function.__name__] = ast.dump(tree)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {*seen}):
        value = function.fn.__globals__.get(name)
        if hasattr(value, "src"):
            _add_source(value, seen)
        elif type(value).__name__ == "constexpr":
            seen[name] = repr(value)


def _row(loss: str, example: Example, architecture: str, launch: Launch, source: str) -> Row:
    kernel = specialised(launch, architecture)
    result = compiled(kernel, architecture)
    usage = _nvidia(result.asm["cubin"]) if "cubin" in result.asm else _amd(result.asm["amdgcn"])
    problem = ", ".join(_problems(example, kernel.name, architecture, usage))
    exceptions = {
        why
        for (name, pattern, accepted), why in example.exceptions.items()
        if name == kernel.name and fnmatchcase(architecture, pattern) and accepted in problem
    }
    return Row(
        loss, example.name, kernel.name, architecture, _constants(kernel), result.metadata.num_warps,
        result.metadata.num_stages, usage["registers"], result.metadata.shared, usage["local"], usage["spills"],
        usage["LDG.E.128"], usage["STG.E.128"], usage["HGMMA"], problem, "; ".join(sorted(exceptions)), source,
    )  # fmt: skip


def _constants(kernel: Specialisation) -> str:
    names = kernel.kernel.arg_names
    return " ".join(f"{names[k]}={str(value).replace(' ', '')}" for (k, *_), value in kernel.constants.items())


def _problems(example: Example, kernel: str, architecture: str, usage: dict[str, int]) -> Iterator[str]:
    if usage["spills"]:
        yield f"spills: {usage['spills']}"
    if usage["local"]:
        yield f"local: {usage['local']} bytes"
    for instruction in example.claims.get(kernel, ()):
        if instruction == "HGMMA" and architecture not in ("sm_90", "gfx942"):
            continue  # their tensor instructions have other names
        if not usage[instruction]:
            yield f"no {instruction}"


def _nvidia(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(_with_modifiers(name), code)) for name in (*_AMD, "LDL", "STL")}
    return {
        **counts,
        "registers": used["REG"],
        "local": used["STACK"] + used["LOCAL"],
        "spills": counts["LDL"] + counts["STL"],
    }


def _with_modifiers(instruction: str) -> str:
    """Return a pattern that for "LDG.E.128" also finds it with a cache hint, "LDG.E.EF.128"."""
    return r"\b" + re.escape(instruction).replace(r"\.128", r"(\.\w+)*\.128") + r"\b"


def _amd(text: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    counts = {
        ours: len(re.findall(rf"\b({theirs}|{theirs.replace('global', 'buffer')})", text))
        for ours, theirs in _AMD.items()
    }
    return {
        **counts,
        "registers": field("vgpr_count"),
        "local": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
    }


def main(losses: list[str]) -> int:
    """Compile, write, and return 1 if a problem has no exception."""
    if INTERPRETED:
        print("TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    if losses == ["--stale"]:
        print(*(lines := stale()), sep="\n", file=sys.stderr)
        return bool(lines)
    with ProcessPoolExecutor() as pool:
        rows = [row for found in pool.map(compile_all, losses or LOSSES) for row in found]
    return report(Row._fields, rows, None if losses else CSV)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
