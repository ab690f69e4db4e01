"""Compiles the Triton kernels ahead of time, no GPU needed, and reads what they take from the machine code.

    python -m bench.triton_resources            all losses, writes bench/results/triton_resources.csv
    python -m bench.triton_resources mse ...    some losses, to standard output
    python -m bench.triton_resources --stale    compiles nothing, says what in the file is not of these sources

The kernels and their arguments are those of each loss's `examples()`, which calls its launcher on meta tensors while
launches are recorded; what is not a function of the tensors' shapes alone could not pass there.
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
from bench.triton_launches import compiled, specialised
from tlkernels._core import triton as core

LOSSES = sorted(path.parent.name for path in Path(tlkernels.__file__).parent.glob("losses/*/triton.py"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CSV = Path(__file__).parent / "results" / "triton_resources.csv"
# What an instruction of a claim is called on AMD.
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
    """What a claim of the example or the absence of spills asks, and is not there."""
    exception: str
    """Why that is right all the same."""
    source: str
    """A hash of what was compiled: the kernel, what it calls, types and constants, options, and Triton's version."""


def distinct(loss: str) -> Iterator[tuple[core.Example, str, core.Launch, str]]:
    """Yield what the examples of a loss launch on each architecture, each kernel once, and the hash of its source."""
    module = importlib.import_module(f"tlkernels.losses.{loss}.triton")
    for architecture in ARCHITECTURES:
        seen = set()
        for example in module.examples():
            with core.recorded(architecture) as launches:
                example.run()
            for launch in launches:
                source = _hash(architecture, launch)
                if source not in seen:
                    seen.add(source)
                    yield example, architecture, launch, source


def compile_all(loss: str) -> list[Row]:
    """Compile what the examples of a loss launch."""
    return [_row(loss, *launch) for launch in distinct(loss)]


def stale() -> list[str]:
    """Return what the file has of other sources than these, and what it lacks."""
    with CSV.open(newline="") as file:
        have = {(row["loss"], row["architecture"], row["kernel"], row["source"]) for row in csv.DictReader(file)}
    need = {
        (loss, architecture, specialised(launch, architecture).name, source)
        for loss in LOSSES
        for _, architecture, launch, source in distinct(loss)
    }
    return [f"of other sources: {row}" for row in sorted(have - need)] + [
        f"missing: {row}" for row in sorted(need - have)
    ]


def _hash(architecture: str, launch: core.Launch) -> str:
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
    """Add a function of a kernel and what it calls, without comments, and the constants that it names."""
    tree = ast.parse(function.src)
    seen[function.__name__] = ast.dump(tree)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {*seen}):
        value = function.fn.__globals__.get(name)
        if hasattr(value, "src"):
            _add_source(value, seen)
        elif type(value).__name__ == "constexpr":
            seen[name] = repr(value)


def _row(loss: str, example: core.Example, architecture: str, launch: core.Launch, source: str) -> Row:
    of = specialised(launch, architecture)
    kernel = of.name
    result = compiled(of, architecture)
    found = _nvidia(result.asm["cubin"]) if "cubin" in result.asm else _amd(result.asm["amdgcn"])
    names = launch.kernel.arg_names
    meta = " ".join(f"{names[place[0]]}={_short(value)}" for place, value in of.constants.items())
    problem = ", ".join(_problems(example, kernel, architecture, found))
    exceptions = {
        why
        for (of, pattern, what), why in example.exceptions.items()
        if of.lstrip("_") == kernel and fnmatchcase(architecture, pattern) and what in problem
    }
    return Row(
        loss, example.name, kernel, architecture, meta, result.metadata.num_warps, result.metadata.num_stages,
        found["registers"], result.metadata.shared, found["local"], found["spills"], found["LDG.E.128"],
        found["STG.E.128"], found["HGMMA"], problem, "; ".join(sorted(exceptions)), source,
    )  # fmt: skip


def _short(value: Any) -> str:
    return str(value).replace(" ", "")


def _problems(example: core.Example, kernel: str, architecture: str, found: dict[str, int]) -> Iterator[str]:
    if found["spills"]:
        yield f"spills: {found['spills']}"
    if found["local"]:
        yield f"local: {found['local']} bytes"
    claims = next((what for name, what in example.claims.items() if name.lstrip("_") == kernel), ())
    for instruction in claims:
        if instruction == "HGMMA" and architecture not in ("sm_90", "gfx942"):
            continue  # other tensor instructions there
        if not found[instruction]:
            yield f"no {instruction}"


def _nvidia(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
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
    """Return a pattern that also finds, for "LDG.E.128", the same with a hint to the cache, "LDG.E.EF.128"."""
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
    """Compile, write, and return whether anything is wrong."""
    if core.INTERPRETED:
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
