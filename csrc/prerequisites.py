"""Checks that everything a build needs is installed. An error is one line that says which command to run.

    python -m csrc.prerequisites

pip isolates a build: it hides the environment's packages. The build uses the environment's torch nevertheless, since
the extension runs only with the torch that it was compiled for.

Environment: CXX names the C++ compiler (csrc/objects.py).
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csrc import objects

WITHOUT = "or set TLKERNELS_BUILD=0 to install without the compiled extension"


def check_setuptools() -> None:
    """Stop unless setuptools is installed and new enough."""
    wanted = _requirement("setuptools")
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or _release(found) < _release(wanted):
        _stop(f"expected {wanted}, got {found} in {sys.prefix}; run: pip install '{wanted}'")


def check() -> None:
    """Stop unless everything that compiles the extension is installed; afterwards torch can be imported."""
    check_setuptools()
    _check_torch()
    compiler = objects.compiler()[0]
    if shutil.which(compiler) is None:
        _stop(f"C++ compiler not found ({compiler}): install one (apt: g++), {WITHOUT}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        _stop(f"Python.h not found: install Python's headers (apt: python3-dev), {WITHOUT}")


def _check_torch() -> None:
    wanted = _requirement("torch")
    if importlib.util.find_spec("torch") is None:
        _see_environment()
    if importlib.util.find_spec("torch") is None:
        _stop(
            f"torch not found in {sys.prefix}; run: pip install '{wanted}' "
            f"'{_requirement('setuptools')}', then this command again with --no-build-isolation ({WITHOUT})"
        )
    try:
        found = importlib.import_module("torch").__version__
    except ImportError as error:
        _stop(f"torch in {sys.prefix} cannot be imported ({error}); run: pip install --force-reinstall '{wanted}'")
    if _release(found) < _release(wanted):
        _stop(f"expected {wanted}, got torch {found} in {sys.prefix}; run: pip install --upgrade '{wanted}'")


def _see_environment() -> None:
    """Append to sys.path what pip hides: the paths of the environment's interpreter."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    command = [sys.executable, "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]
    found = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    sys.path += [path for path in found if path not in sys.path]
    importlib.invalidate_caches()


def _requirement(package: str) -> str:
    """Return pyproject.toml's requirement of a package, such as "torch>=2.11"."""
    project = tomllib.loads((objects.ROOT / "pyproject.toml").read_text())
    everything = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return next(text for text in everything if text.startswith(f"{package}>="))


def _release(text: str) -> list[int]:
    """Return the numbers of the first version in a text: [2, 13, 0] for "2.13.0+cpu"."""
    found = re.search(r"\d+(\.\d+)*", text)
    return [int(number) for number in found[0].split(".")] if found else []


def _stop(why: str) -> None:
    raise SystemExit(f"tlkernels: {why}")


if __name__ == "__main__":
    check()
