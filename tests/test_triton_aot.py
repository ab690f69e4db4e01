"""Every Triton kernel and table row compiles for every architecture, with the instructions that its model needs."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
ROOT = Path(__file__).parent.parent
LOSSES = sorted(path.parent.name for path in ROOT.glob("tlkernels/losses/*/triton.py"))
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_the_report_is_of_these_sources_and_without_a_problem():
    """So every commit is checked, though compiling all kernels takes a quarter of an hour."""
    with (ROOT / "bench/results/triton_resources.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["architecture"] for row in rows} == ARCHITECTURES
    assert not [row for row in rows if row["problem"] and not row["exception"]]
    run = python("-m", "bench.triton_resources", "--stale")
    assert run.returncode == 0, f"{run.stderr}\nrun python -m bench.triton_resources"


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_spills_and_with_the_claimed_instructions(loss):
    run = python("-m", "bench.triton_resources", loss)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(run.stdout.splitlines()))
    assert {row["architecture"] for row in rows} == ARCHITECTURES
    assert all(int(row["registers"]) > 0 for row in rows)


PROBLEMS = """
import torch, triton, triton.language as tl
from bench import triton_resources as resources
from bench.triton import Example
from tlkernels._core.triton.launch import Config, launch, recorded

@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(x + i)  # 512 numbers for a thread
    tl.store(y + i, row - tl.max(row, 0))

@triton.jit
def narrow(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + 3 * i))

x = torch.empty(2**16, device="meta")
one_warp = Config("*", 0, None, {}, 1)
example = Example("", lambda: (
    launch(spilling, (1,), x, x, BLOCK=16384, config=one_warp), launch(narrow, (1,), x, x, BLOCK=1024)
), {"narrow": ("LDG.E.128", "HGMMA")}, {("narrow", "sm_*", "LDG.E.128"): "for the test"})
with recorded("sm_90") as launches:
    example.run()
for made in launches:
    row = resources._row("", example, "sm_90", made, "")
    print(row.kernel, row.problem, row.exception, sep="|")
"""


def test_the_check_can_fail(tmp_path):
    script = tmp_path / "problems.py"
    script.write_text(PROBLEMS)
    run = python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import problems")
    assert run.returncode == 0, run.stderr
    spilling, narrow = (line.split("|") for line in run.stdout.splitlines())
    assert spilling[1].startswith("spills: ")
    assert narrow[1:] == ["no LDG.E.128, no HGMMA", "for the test"]


ROUNDED = """
import re
import torch
from bench import triton_launches as launches
from bench.triton import info_nce
from tlkernels._core.triton.launch import recorded

with recorded("sm_90") as calls:
    info_nce._both(info_nce._arguments(8192, 384, torch.float32, symmetric=True))
for name in ("statistics", "slopes", "gradient"):
    kernel = next(k for k in (launches.specialised(call, "sm_90") for call in calls) if k.name == name)
    made_by = {}
    for line in launches.compiled(kernel, "sm_90").asm["ptx"].splitlines():
        if found := re.match(r"\\s*([a-z0-9_.]+)\\s+(%r\\d+), (.*);", line):
            instruction, result, operands = found.groups()
            made_by[result] = instruction
            if instruction.startswith("ex2"):
                print(name, made_by[operands.strip()].partition(".")[0])
"""


def test_info_nce_rounds_its_logits_alike_in_all_kernels():
    """A logit that the gradient's kernel does not round, while `statistics` does, makes p of a sure row 1 + 1e-6."""
    run = python("-c", ROUNDED)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.splitlines()) == {"statistics sub", "slopes sub", "gradient sub"}
