"""Checks of the battery's Triton launches without a GPU: they compile, and the host waits for nothing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from battery import LOSSES

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
ROOT = Path(__file__).parents[1]
OTHER = "3.6.0"
"""The Triton of torch 2.11, the oldest that is supported."""


def run(module, *arguments, **environment):
    """Run a module in a process without TRITON_INTERPRET, and return its output."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def compiled(output, version=""):
    """Return how many kernels a run compiled, and check the version of Triton."""
    found = re.search(r"Triton (\S+), sm_90: .* (?:compiled|front end of) (\d+), 0 failed", output)
    assert found, output
    assert found[1].startswith(version)
    return int(found[2])


@pytest.mark.full  # the quick part checks that the report of all kernels is of these sources
def test_a_kernel_of_each_kind_compiles():
    assert compiled(run("tests.recorded_battery", "--quick")) > 250


@pytest.mark.full
def test_the_front_end_of_every_kernel():
    assert compiled(run("tests.recorded_battery")) > 2500


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
def test_every_kernel_compiles(loss, tmp_path):
    assert compiled(run("tests.recorded_battery", "--compile", loss, TRITON_CACHE_DIR=str(tmp_path))) > 20


@pytest.fixture(scope="session")
def other_triton():
    """Return a folder with the other Triton, installed once; the test fails if it cannot be installed."""
    folder = ROOT / "build" / f"triton-{OTHER}"
    if not (folder / "triton").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"triton=={OTHER}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.fail(f"not run under Triton {OTHER}, which could not be installed:\n{done.stderr}")
    return str(folder)


@pytest.mark.full
def test_the_front_end_of_every_kernel_under_another_triton(other_triton):
    assert compiled(run("tests.recorded_battery", PYTHONPATH=other_triton), OTHER) > 2500


@pytest.mark.full
@pytest.mark.skipif(
    not torch.backends.cuda.is_built() and not shutil.which(os.environ.get("CXX", "c++")),
    reason="needs a CUDA build of torch, or a C++ compiler",
)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_host_waits_for_nothing(loss):
    calls = re.search(r"(\d+) calls .* 0 failed", output := run("tests.fake_battery", loss))
    assert calls and int(calls[1]) > 40, output


ANOTHER_BATCH = """
import itertools, torch
from bench.triton_launches import specialised
from tlkernels._core.triton.launch import recorded
from tlkernels.losses.cross_entropy import triton as cross_entropy
from tlkernels.losses.distillation import triton as distillation
from tlkernels.losses.info_nce import triton as info_nce
from tlkernels.losses.sigmoid_contrastive import triton as sigmoid

def kernels(call, rows):
    found = {}
    recording = recorded("sm_90", lambda launch: found.setdefault(specialised(launch, "sm_90").key, launch))
    with recording, torch.device("meta"):
        call(rows)
    return found

def ce(rows):
    x, y = torch.empty(rows, 32000, dtype=torch.bfloat16), torch.empty(rows, dtype=torch.int64)
    cross_entropy.step(x, y, None, -100, 0.0, 1.0, None, 0.0, None, None, True)

def distill(rows):
    x = torch.empty(rows, 32000, dtype=torch.bfloat16)
    distillation.step(x, x, None, None, 2.0, "forward_kl", 0.5, 0.0, -100, 0.0, None, None, True, [True, False])

def clip(rows):
    x, scale = torch.empty(rows, 512, dtype=torch.bfloat16), torch.empty(())
    call = x, x, None, scale, None, None, None, None, -1, False, True, False, 0.0
    info_nce.backward(*info_nce.forward(*call), *call, [True] * 4)

def siglip(rows):
    x, number = torch.empty(rows, 768, dtype=torch.bfloat16), torch.empty(())
    sigmoid.step(number, x, x, number, number, 0, [True] * 4)

for call, *sizes in (ce, 4096, 4001), (distill, 4096, 4001), (clip, 8192, 7001), (siglip, 8192, 7001):
    first, second = (kernels(call, rows) for rows in sizes)
    more = sorted(launch.kernel.__name__ for key, launch in second.items() if key not in first)
    print(call.__name__, len(first), *more)
"""


def test_a_shorter_batch_compiles_only_kernels_whose_loads_and_stores_are_narrower():
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_BATCH], cwd=ROOT, env=inherited, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    more = {name: rest for name, _, *rest in map(str.split, done.stdout.splitlines())}
    assert more == {"ce": [], "distill": [], "clip": ["gradient"], "siglip": ["pairs"]}
