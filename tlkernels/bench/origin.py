"""The commit, machine and versions of a result."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tlkernels._core import native
from tlkernels.machine import machine, version_of

ROOT = Path(__file__).parents[2]
MEASURED = ("csrc", "tlkernels", "bench", "setup.py", "pyproject.toml", "constraints.txt")
NOT_MEASURED = (":!bench/results", ":!bench/*.md")


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():  # installed: a repository around it is somebody else's
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def describe(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return date, commit, machine and versions, of these packages too.

    GPU_COMMIT names the commit of a copy, which has no repository or that of another commit.
    """
    found = machine()
    versions = {"python": found["python"], **found["packages"], **{name: version_of(name) for name in packages}}
    if native.available():
        versions["compiler"] = native.build_info()["compiler"]
    copied = os.environ.get("GPU_COMMIT")
    return {
        "kind": "bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": copied or _git("rev-parse", "--short=10", "HEAD") or "none",
        "dirty": not copied and bool(_git("status", "--porcelain", "--", *MEASURED, *NOT_MEASURED)),
        "machine": {
            "device": found["cuda"] or "cpu",
            "cpu": found["processor"],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": found["isa"] or "none",
        },
        "versions": {name: number for name, number in versions.items() if number is not None},
    }
