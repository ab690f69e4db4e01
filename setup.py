"""Builds the extension tlkernels._C from csrc.

The CUDA kernels are built if torch is a CUDA build and nvcc is found; no GPU is needed.

Environment:
    TLKERNELS_BUILD=0: do not build the extension; `reference` and `triton` are then the only implementations.
    TLKERNELS_CUDA: 1 requires the CUDA kernels, 0 leaves them out.
    TLKERNELS_CUDA_ARCHS, CUDA_HOME, CUDA_PATH: the architectures and the toolkit; see csrc/nvcc.py.
    TLKERNELS_SANITIZE=1: build with AddressSanitizer and UBSan, without the CUDA kernels.
    CXX, MAX_JOBS: the C++ compiler and the number of processes; see csrc/objects.py.
"""

import itertools
import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

sys.path.insert(0, str(ROOT))
from csrc import nvcc, objects, prerequisites  # noqa: E402

# The compiler's options for each instruction set. csrc/core/cpu/isa.cpp checks that the CPU has the same features.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]

CUDA_LIBRARIES = ("c10_cuda", "torch_cuda")

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


def why_no_cuda(torch_cuda: str | None) -> str:
    """Return why the CUDA kernels cannot be built for a torch of that CUDA version, or an empty string."""
    if torch_cuda is None:
        return "torch is not a CUDA build"
    if SANITIZE:
        return "TLKERNELS_SANITIZE=1 builds the CPU kernels only"
    if nvcc.compiler() is None:
        return "nvcc not found (set CUDA_HOME)"
    if nvcc.version().split(".")[0] != torch_cuda.split(".")[0]:
        return f"expected nvcc of CUDA {torch_cuda}, as torch's, got {nvcc.version()}"
    if cuda_runtime() is None:
        return f"libcudart not found in {nvcc.home()} or in torch's packages"
    if not nvcc.architectures():
        return "expected a GPU of compute capability 8.0 or newer"
    return ""


def cuda_runtime() -> str | None:
    """Return the path of libcudart, from the toolkit or from the packages that torch depends on; None if not found."""
    import torch

    packages = Path(torch.__file__).parents[1]
    return nvcc.runtime([*packages.glob("nvidia/*/lib")])


def cuda_architectures(torch_cuda: str | None) -> tuple[tuple[str, ...], str]:
    """Return the architectures to compile the CUDA kernels for; or none, and why the kernels are left out."""
    asked = os.environ.get("TLKERNELS_CUDA")
    why_not = why_no_cuda(torch_cuda) if switch("TLKERNELS_CUDA", "1") else "TLKERNELS_CUDA=0"
    if why_not and asked == "1":
        raise SystemExit(f"TLKERNELS_CUDA=1: {why_not}")
    print(f"CUDA kernels: {'left out: ' + why_not if why_not else ' '.join(nvcc.architectures())}", flush=True)
    return () if why_not else nvcc.architectures(), why_not


def cuda_commands(folder: Path, names: tuple[str, ...]) -> list[objects.Command]:
    """Return the object of each .cu file of csrc, and the command that makes it for these architectures."""
    import torch
    from torch.utils.cpp_extension import include_paths

    commands = []
    for source in sorted(Path("csrc").rglob("*.cu")):
        built = folder / f"{source.parent.name}-{source.stem}.o"
        includes = [f"-I{path}" for path in include_paths()]
        command = [str(nvcc.compiler()), *nvcc.OPTIONS, *nvcc.generate(names), *includes, "-c", str(source)]
        command += [f'-DTLK_BUILD_TORCH="{torch.__version__}"']  # so that another torch compiles it again
        commands.append((built, [*command, "-o", str(built)]))
    return commands


def kernel_commands(folder: Path) -> list[objects.Command]:
    """Return the object of each csrc/<loss>/cpu.inl for each instruction set, and the command that makes it."""
    common = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    common += ["-fno-math-errno", "-fno-trapping-math", *SANITIZE_FLAGS]
    # GCC 12 warns of the undefined operand inside its own AVX-512 intrinsics.
    common += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    commands = []
    for source, (isa, flags) in itertools.product(sorted(Path("csrc").glob("*/cpu.inl")), ISA_FLAGS.items()):
        built = folder / f"{source.parent.name}-cpu-{isa}.o"
        command = [*objects.compiler(), *common, *flags, f"-DTLK_ISA={isa}", "-x", "c++", "-c", str(source)]
        commands.append((built, [*command, "-o", str(built)]))
    return commands


def op_flags(cuda: tuple[str, ...], no_cuda: str) -> list[str]:
    """Return the compiler's options for sources that include torch's headers."""
    import torch
    from torch.utils.cpp_extension import include_paths

    about = {"TORCH": torch.__version__, "SANITIZE": int(SANITIZE)}
    about |= {"CUDA": f"{nvcc.version()} for {' '.join(cuda)}" if cuda else "", "NO_CUDA": no_cuda}
    includes = [*include_paths(), sysconfig.get_path("include")]
    flags = ["-O2", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-DNDEBUG", *SANITIZE_FLAGS]
    # GCC 12 warns that a small vector of torch is uninitialised where it is moved.
    flags += ["-Wno-maybe-uninitialized"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f'-DTLK_BUILD_{name}="{value}"' for name, value in about.items()]
    return flags + [f"-isystem{path}" for path in includes]


def native_extension() -> dict:
    """Return the arguments of setup() for the extension."""
    prerequisites.check()
    import torch
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext
    from torch.utils.cpp_extension import library_paths

    cuda, no_cuda = cuda_architectures(torch.version.cuda)

    class Build(build_ext):
        """Compiles each csrc/<loss>/cpu.inl for every instruction set, and every .cu and .cpp file, and links them."""

        def build_extension(self, ext) -> None:
            # Each editable install has a new build_temp, so objects are kept in another folder.
            kept = Path("build") / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            folder = (kept if self.editable_mode else Path(self.build_temp)) / "objects"
            folder.mkdir(parents=True, exist_ok=True)
            flags = op_flags(cuda, no_cuda)
            ops = [
                objects.from_source(path, folder / f"{path.parent.name}-{path.stem}.o", flags)
                for path in sorted(Path("csrc").rglob("*.cpp"))
            ]
            # The longest first.
            commands = [*(cuda_commands(folder, cuda) if cuda else []), *kernel_commands(folder), *ops]
            objects.compile_stale(commands, objects.precompiled_header(folder, flags), verbose=self.verbose)
            ext.extra_objects = [*(str(built) for built, _ in commands), *([cuda_runtime()] if cuda else [])]
            self.force = True  # always link: it is quick, and the list of objects may have changed
            super().build_extension(ext)

    extension = Extension(
        "tlkernels._C",
        sources=[],
        language="c++",
        libraries=["c10", "torch", "torch_cpu", "torch_python", *(CUDA_LIBRARIES if cuda else ())],
        library_dirs=library_paths(),
        extra_link_args=["-fopenmp", *SANITIZE_FLAGS],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**(native_extension() if switch("TLKERNELS_BUILD", "1") else {}))
