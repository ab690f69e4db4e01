"""The kit: the extension for the GPU machine, built in advance, and packages that the machine lacks.

    python -m scripts.gpu.kit       builds and packs it; `make gpu-kit` runs it with the kit's own Python

`.gpu/` gets the compressed extension and kit.json, which has a hash of its sources. On the GPU machine `unpack` puts
the extension into the package, if the checkout has the same C++ sources.
"""

import hashlib
import json
import lzma
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIT = ".gpu"
WHEELS = ".whl"
INFO = "kit.json"
ARCHITECTURE = "sm_90a"


class KitError(Exception):
    """The kit cannot be used, for the reason in the message."""


def sources(root: Path = ROOT) -> str:
    """Return a hash of all sources of the extension."""
    digest = hashlib.sha256()
    files = [root / "setup.py", *sorted(path for path in (root / "csrc").rglob("*") if _is_source(path))]
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def pack(extension: Path, folder: Path, preset: int = 9, root: Path = ROOT) -> Path:
    """Compress a built extension into `folder`, with a file that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("_C*.so.xz"):
        old.unlink()
    packed = folder / f"{extension.name}.xz"
    packed.write_bytes(lzma.compress(extension.read_bytes(), preset=preset))
    information = {"extension": extension.name, "architecture": ARCHITECTURE}
    information |= {"commit": commit(root), "sources": sources(root)}
    (folder / INFO).write_text(json.dumps(information, indent=1) + "\n")
    return packed


def unpack(architecture: str = ARCHITECTURE, root: Path = ROOT) -> str:
    """Unpack the kit's extension into the checkout's package, and return the commit that it was built from.

    Raises:
        KitError: there is no kit, or it is for another Python or card, or from other sources.
    """
    folder = root / KIT
    if not (folder / INFO).exists():
        raise KitError(f"{KIT}/{INFO}: not found; `make gpu-kit` makes it")
    information = json.loads((folder / INFO).read_text())
    name = information["extension"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not name.endswith(suffix):
        raise KitError(f"{KIT}/{name}.xz: expected an extension for this Python ({suffix})")
    if information["architecture"] != architecture:
        raise KitError(f"{KIT}/{name}.xz: built for {information['architecture']}, the card is {architecture}")
    if information["sources"] != sources(root):
        raise KitError(f"{KIT}/{name}.xz: built from other C++ sources (commit {information['commit']})")
    (root / "tlkernels" / name).write_bytes(lzma.decompress((folder / f"{name}.xz").read_bytes()))
    return str(information["commit"])


def unpack_wheels(target: Path, root: Path = ROOT) -> list[str]:
    """Unpack the pure Python wheels into `target`, and return their names."""
    wheels = sorted((root / WHEELS).glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in wheels]


def commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout, with "-dirty" if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def build_variables(architecture: str) -> dict[str, str]:
    """Return the environment variables with which setup.py builds the CUDA kernels."""
    return {"TLKERNELS_CUDA": "1", "TLKERNELS_CUDA_ARCHS": architecture}


def main() -> None:
    """Build the extension with this Python in separate folders, strip it and pack it."""
    work = Path("build/gpu-kit")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-temp", str(work / "temp"), "--build-lib", str(work / "lib")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **build_variables(ARCHITECTURE)}, check=True)
    (built,) = (ROOT / work / "lib" / "tlkernels").glob("_C*.so")
    stripped = ROOT / work / built.name
    subprocess.run(["strip", "--strip-unneeded", "-o", str(stripped), str(built)], check=True)
    packed = pack(stripped, ROOT / KIT)
    sizes = [path.stat().st_size / 1e6 for path in (packed, stripped)]
    print(f"{packed.relative_to(ROOT)}: {sizes[0]:.1f} MB, unpacked {sizes[1]:.1f} MB")


if __name__ == "__main__":
    main()
