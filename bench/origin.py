"""The commit, machine and versions of a result."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tlkernels._core import native

ROOT = Path(__file__).parents[1]
MEASURED = ("csrc", "tlkernels", "bench", "setup.py", "pyproject.toml", "constraints.txt")
NOT_MEASURED = (":!bench/results", ":!bench/*.md")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def describe() -> dict[str, Any]:
    """Return date, commit, machine and versions. Where the tree is no repository, GPU_COMMIT names the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    found = [name for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy") if _has(name)]
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in found}}
    versions |= {"compiler": native.build_info()["compiler"]} if native.available() else {}
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=10", "HEAD") or os.environ.get("GPU_COMMIT", "none"),
        "dirty": bool(_git("status", "--porcelain", "--", *MEASURED, *NOT_MEASURED)),
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "cpu": model[1] if model else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": native.isa() or "none",
        },
        "versions": versions,
    }


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
