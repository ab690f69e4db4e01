"""The build of the CUDA kernels: when they are built, the commands, the report on their resources. Needs no GPU."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from bench import cuda_resources
from csrc import nvcc
from tlkernels._core import native

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(nvcc.compiler() is None, reason="nvcc not found")


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("tlkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
def test_architectures(monkeypatch):
    monkeypatch.delenv("TLKERNELS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(nvcc, "cards", lambda: [])
    assert nvcc.architectures() == nvcc.WITHOUT_CARD
    monkeypatch.setattr(nvcc, "cards", lambda: [(8, 9), (9, 0), (8, 9)])
    assert nvcc.architectures() == ("sm_89", "sm_90a")
    monkeypatch.setattr(nvcc, "cards", lambda: [(7, 5)])
    assert nvcc.architectures() == ()
    monkeypatch.setenv("TLKERNELS_CUDA_ARCHS", "sm_90a, compute_90")
    assert nvcc.architectures() == ("sm_90a", "compute_90")
    assert nvcc.generate(nvcc.architectures()) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("TLKERNELS_CUDA_ARCHS", "9.0")
    with pytest.raises(SystemExit, match=r"TLKERNELS_CUDA_ARCHS: expected names such as sm_80 .*got '9.0'"):
        nvcc.architectures()


@pytest.mark.parametrize(
    ("card", "name"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
     ((10, 3), "compute_90"), ((11, 0), "compute_90"), ((12, 1), "sm_120"), ((13, 0), "compute_120")],
)  # fmt: skip
def test_what_a_card_runs(card, name):
    assert nvcc.for_card(card) == name
    assert (nvcc.for_card(card, nvcc.WITHOUT_CARD) is None) == (name is None)


def test_cards_are_those_of_nvidia_smi(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for prints, cards in (("9.0\n12.0", [(9, 0), (12, 0)]), ("NVIDIA-SMI has failed: driver 580.1", [])):
        script.write_text(f"#!/bin/sh\necho '{prints}'\n")
        script.chmod(0o755)
        assert nvcc.cards() == cards


def test_what_decides(setup, monkeypatch):
    monkeypatch.delenv("TLKERNELS_CUDA", raising=False)
    assert setup.cuda_architectures(None) == ((), "torch is not a CUDA build")
    monkeypatch.setenv("TLKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="TLKERNELS_CUDA=1: torch is not a CUDA build"):
        setup.cuda_architectures(None)
    monkeypatch.setattr(nvcc, "compiler", lambda: None)
    with pytest.raises(SystemExit, match="nvcc not found"):
        setup.cuda_architectures("13.0")
    monkeypatch.setattr(nvcc, "compiler", lambda: "nvcc")
    monkeypatch.setattr(nvcc, "version", lambda: "13.0")
    with pytest.raises(SystemExit, match=r"expected nvcc of CUDA 12.8, as torch's, got 13.0"):
        setup.cuda_architectures("12.8")
    monkeypatch.setenv("TLKERNELS_CUDA_ARCHS", "sm_80")
    monkeypatch.setattr(nvcc, "home", lambda: "cuda")
    monkeypatch.setattr(setup, "cuda_runtime", lambda: None)
    with pytest.raises(SystemExit, match="libcudart not found in cuda or in torch's packages"):
        setup.cuda_architectures("13.1")
    monkeypatch.setattr(setup, "cuda_runtime", lambda: "libcudart.so.13")
    assert setup.cuda_architectures("13.1") == (("sm_80",), "")
    monkeypatch.setenv("TLKERNELS_CUDA", "0")
    assert setup.cuda_architectures("13.1") == ((), "TLKERNELS_CUDA=0")
    monkeypatch.setenv("TLKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="TLKERNELS_CUDA: expected 0 or 1"):
        setup.cuda_architectures("13.1")


def test_no_gpu_is_asked_for():
    assert "is_available" not in "".join(line for line in (ROOT / "setup.py").read_text().splitlines() if "(" in line)


def test_build_info_and_doctor_tell_of_cuda():
    if not native.available():
        pytest.skip(native.why_not())
    info, why_not = (native.build_info()[key] for key in ("cuda", "no_cuda"))
    assert " for sm_" in info if info else why_not
    assert torch.version.cuda is not None or (info, why_not) == ("", "torch is not a CUDA build")


@needs_nvcc
def test_every_binding_has_a_command_that_fits_torch(setup, tmp_path):
    commands = dict(setup.cuda_commands(tmp_path, ("sm_80",)))
    assert {built.name for built in commands} == {
        f"{path.parent.name}-{path.stem}.o" for path in (ROOT / "csrc").rglob("*.cu")
    }
    for built, command in commands.items():
        assert command[0] == nvcc.compiler()
        assert command[-2:] == ["-o", str(built)]
        assert f'-DTLK_BUILD_TORCH="{torch.__version__}"' in command  # another torch compiles them again


@needs_nvcc
def test_the_toolkit_is_found_behind_a_script_that_calls_nvcc(monkeypatch, tmp_path):
    """torch would take the folder above the script, which has no headers and no libcudart."""
    toolkit = nvcc.home()
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    for cached in (nvcc.compiler, nvcc.home):
        monkeypatch.setattr(nvcc, cached.__name__, functools.cache(cached.__wrapped__))
    assert nvcc.compiler() == str(script)
    assert nvcc.home() == toolkit
    assert (Path(toolkit) / "include" / "cuda_runtime.h").exists()


@needs_nvcc
def test_the_extension_is_linked_with_the_toolkit(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", nvcc.version())
    monkeypatch.setenv("TLKERNELS_CUDA_ARCHS", "sm_90a")
    (extension,) = setup.native_extension()["ext_modules"]
    assert {"c10_cuda", "torch_cuda"} <= set(extension.libraries)
    assert Path(setup.cuda_runtime()).name == "libcudart.so"


def test_libcudart_is_found_under_the_name_that_packages_give_it(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "_ask", lambda *options: f'#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{tmp_path}/lib"\n')
    monkeypatch.setattr(nvcc, "home", lambda: str(tmp_path))
    assert nvcc.runtime() is None
    for folder, name in (("torch", "libcudart.so.13"), ("lib64", "libcudart.so.13"), ("lib", "libcudart.so")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
        assert nvcc.runtime([tmp_path / "torch"]) == str(tmp_path / folder / name)


# A header that a CPU build of torch lacks.
STAND_IN = "#pragma once\n"


@pytest.mark.full
@needs_nvcc
def test_what_bindings_share_compiles_against_torch(tmp_path):
    """The headers of torch and of the toolkit that tests/cuda_host replaces."""
    stand_in = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN)
    source = tmp_path / "binding.cpp"
    source.write_text(
        f'#include "{ROOT}/csrc/core/cuda/tensor.h"\n'
        "void use(const at::Tensor& x, cudaError_t error) {\n"
        "  const tlk::OnDevice device(x);\n"
        '  tlk::check_launch(device.stream() ? error : cudaSuccess, "use");\n'
        "}\n"
    )
    says = subprocess.run([nvcc.compiler(), "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    toolkit = re.search(r'INCLUDES="-I([^"]+)"', says)[1]
    includes = [f"-isystem{path}" for path in (tmp_path, toolkit, *include_paths())]
    compiler = os.environ.get("CXX", "c++")
    run = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", *includes, str(source)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_binding_compiles(setup, source, tmp_path, monkeypatch):
    """nvcc compiles it with the command of setup.py; one or two minutes each."""
    stand_in = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(STAND_IN)
    monkeypatch.chdir(ROOT)
    built, command = next(
        made
        for made in setup.cuda_commands(tmp_path, ("sm_90a",))
        if made[0].name == f"{source.parent.name}-{source.stem}.o"
    )
    run = subprocess.run([*command, f"-I{tmp_path}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert built.exists()


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3tlk6kernelI13__nv_bfloat16LNS_10DivergenceE1ELb0EEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN3tlk6kernelI13__nv_bfloat16LNS_10DivergenceE1ELb0EEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 256 bytes smem
ptxas info    : Compile time = 12.000 ms
ptxas info    : Compiling entry function '_ZN3tlk6kernelIfLNS_10DivergenceE0ELb1EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN3tlk6kernelIfLNS_10DivergenceE0ELb1EEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, 360 bytes cmem[0]
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")
class TestReport:
    def test_rows(self):
        spilling, plain = cuda_resources.parse("some", REPORT)
        assert spilling[1:] == (
            "kernel<__nv_bfloat16, 1, false>", "sm_90a", 40, 256, 16, 8, 12, "spills: 8 bytes stored, 12 loaded", "",
        )  # fmt: skip
        assert plain[1:] == ("kernel<float, 0, true>", "sm_80", 20, 0, 0, 0, 0, "", "")

    def test_spills_fail_without_a_reason(self, monkeypatch, tmp_path):
        fields = cuda_resources.Row._fields
        assert cuda_resources.report(fields, cuda_resources.parse("some", REPORT), tmp_path / "a.csv") == 1
        monkeypatch.setitem(cuda_resources.EXCEPTIONS, ("kernel<*bfloat16*", "sm_9*"), "for the test")
        assert cuda_resources.report(fields, cuda_resources.parse("some", REPORT), tmp_path / "b.csv") == 0
        assert "for the test" in (tmp_path / "b.csv").read_text()

    def test_a_report_that_is_not_understood_fails(self):
        with pytest.raises(ValueError, match="not understood"):
            cuda_resources.parse("some", REPORT.replace("spill stores", "spilt stores"))


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(nvcc, "compiler", lambda: None)
    assert cuda_resources.main(["--quick"]) == 2
    assert "nvcc not found" in capsys.readouterr().err
