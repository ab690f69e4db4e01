"""The machine and the software of a measurement: versions, processor, instruction set, device, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tlkernels as tlk
from tlkernels._core import native

PACKAGES = ("torch", "triton", "numpy", "accelerate", "transformers", "datasets", "jsonargparse", "safetensors")


def machine() -> dict[str, Any]:
    """Return a description; a package that is not installed and an unknown commit are None."""
    return {
        "packages": {"tlkernels": tlk.__version__} | {name: version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": native.isa() or None,
        "isas": list(native.isas()),
        "extension": native.build_info() or native.why_not(),
        "commit": _commit(),
    }


def version_of(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that has this package; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
