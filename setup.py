"""Builds tlkernels._C.

Environment: TLKERNELS_BUILD=0 leaves it out (the package then has the `reference` and `triton` implementations);
TLKERNELS_SANITIZE=1 builds it with AddressSanitizer and UBSan; CXX and MAX_JOBS as usual. The CUDA kernels are in it
where a toolkit is here and torch is a CUDA build, whether or not there is a GPU: TLKERNELS_CUDA=1 asks for them,
TLKERNELS_CUDA=0 leaves them out, TLKERNELS_CUDA_ARCHS narrows what they are compiled for (csrc/nvcc.py).
"""

import itertools
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CPU = Path("csrc/cpu")

sys.path.insert(0, str(ROOT))
from csrc import nvcc  # noqa: E402

# csrc/cpu/<name>.inl is compiled for each instruction set
KERNELS = ["cross_entropy", "distillation", "info_nce", "mse", "sigmoid_contrastive"]

# What each instruction set may use; csrc/cpu/isa.cpp asks the CPU for the same features before it calls one.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]

SANITIZE = os.environ.get("TLKERNELS_SANITIZE") == "1"
# At -O3 the sanitized AVX-512 target takes five minutes to compile.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-Og", "-g1", "-fno-var-tracking"]
SANITIZE_FLAGS = SANITIZE_FLAGS if SANITIZE else []


def switch(name: str, default: str) -> bool:
    """Return an environment variable that is 0 or 1."""
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def fresh(built: Path, command: list[str]) -> bool:
    """Return whether `built` was made by this very command from files that have not changed since."""
    made_by = built.with_suffix(".command")
    if not (built.exists() and made_by.exists() and made_by.read_text() == shlex.join(command)):
        return False
    sources = built.with_suffix(".d").read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(Path(source).exists() and os.path.getmtime(source) < os.path.getmtime(built) for source in sources)


def compile_kernels(built: Path, command: list[str]) -> None:
    """Run a compiler command, showing it."""
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)
    built.with_suffix(".command").write_text(shlex.join(command))


def why_no_cuda(torch_cuda: str | None) -> str:
    """Return why the CUDA kernels cannot be built for a torch of that CUDA version, or an empty string."""
    if torch_cuda is None:
        return "torch is not a CUDA build"
    if SANITIZE:
        return "the sanitizers are for the CPU's kernels"
    if nvcc.compiler() is None:
        return "there is no nvcc: CUDA_HOME names a toolkit"
    if nvcc.version().split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc.version()}, torch of {torch_cuda}"
    return ""


def cuda_architectures(torch_cuda: str | None) -> tuple[str, ...]:
    """Return what to compile the CUDA kernels for; nothing leaves them out."""
    asked = os.environ.get("TLKERNELS_CUDA")
    if not switch("TLKERNELS_CUDA", "1"):
        return ()
    why_not = why_no_cuda(torch_cuda)
    if why_not and asked:
        raise SystemExit(f"TLKERNELS_CUDA=1: {why_not}")
    print(f"CUDA kernels: {'left out, since ' + why_not if why_not else ' '.join(nvcc.architectures())}", flush=True)
    return () if why_not else nvcc.architectures()


def cuda_commands(folder: Path, names: tuple[str, ...]) -> list[tuple[Path, list[str]]]:
    """Return the object of each csrc/cuda/<name>.cu, and the command that makes it for these architectures."""
    from torch.utils.cpp_extension import include_paths

    commands = []
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        built = folder / f"{source.stem}-cuda.o"
        includes = [f"-I{path}" for path in include_paths()]
        dependencies = ["-MD", "-MF", str(built.with_suffix(".d"))]
        command = [str(nvcc.compiler()), *nvcc.OPTIONS, *nvcc.generate(names), *includes, "-c", str(source)]
        commands.append((built, [*command, *dependencies, "-o", str(built)]))
    return commands


def native_extension() -> dict:
    """Return setup()'s arguments for the extension."""
    import pybind11
    import torch

    cuda = cuda_architectures(torch.version.cuda)
    if cuda:  # torch takes the folder above the first nvcc on PATH, which may be only a script; it asks when imported
        os.environ["CUDA_HOME"] = nvcc.home()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Compiles csrc/cpu/<name>.inl first, each for every instruction set with its flags, and csrc/cuda/*.cu."""

        def build_extension(self, ext) -> None:
            compiler = os.environ.get("CXX", "c++")
            folder = Path(self.build_temp) / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            common = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
            common += ["-fno-math-errno", "-fno-trapping-math", *SANITIZE_FLAGS]
            # GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for ours.
            common += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
            commands = []
            for name, (isa, flags) in itertools.product(KERNELS, ISA_FLAGS.items()):
                built = folder / f"{name}-{isa}.o"
                source = ["-x", "c++", "-c", str(CPU / f"{name}.inl")]
                command = [compiler, *common, *flags, f"-DTLK_ISA={isa}", *source, "-MD", "-o", str(built)]
                commands.append((built, command))
            if cuda:
                commands = cuda_commands(folder, cuda) + commands  # they take longest
            ext.extra_objects += [str(built) for built, _ in commands]
            stale = [made for made in commands if not fresh(*made)]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                list(pool.map(lambda args: compile_kernels(*args), stale))
            super().build_extension(ext)

    about = {"TORCH": torch.__version__, "SANITIZE": int(SANITIZE)}
    about["CUDA"] = f"{nvcc.version()} for {' '.join(cuda)}" if cuda else ""
    extension = (CUDAExtension if cuda else CppExtension)(
        "tlkernels._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        include_dirs=[pybind11.get_include()],
        define_macros=[(f"TLK_BUILD_{name}", f'"{value}"') for name, value in about.items()],
        extra_compile_args=["-O2", "-fopenmp", "-fvisibility=hidden", "-Wall", *SANITIZE_FLAGS],
        extra_link_args=["-fopenmp", *SANITIZE_FLAGS],
        depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*")],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**(native_extension() if switch("TLKERNELS_BUILD", "1") else {}))
