"""Options of the benchmarks; writes the result file and prints its table."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench import cases, gpu, losses
from bench.contestants import NAMES, OURS
from bench.report import RESULTS, table
from tlkernels._core import native

ON_CPU: tuple[cases.Case | losses.Case, ...] = (*cases.CASES, *losses.CASES)
ROOT = Path(__file__).parents[1]
MEASURED = ("csrc", "tlkernels", "bench", "setup.py", "pyproject.toml", "constraints.txt", ":!bench/results")
result_key = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tlkernels benchmarks")
    group.addoption("--quick", action="store_true", help="a subset that ends within a minute")
    group.addoption("--impl", default="auto", choices=OURS, help="the implementation whose speed is told")
    group.addoption("--contestant", action="append", default=[], choices=NAMES, help="one more to time beside it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[result_key] = {**describe(), "cases": []}


@pytest.fixture
def results(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], pytestconfig.stash[result_key]["cases"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        quick = {case.id for case in (*ON_CPU, *gpu.CASES) if case.quick}
        items[:] = [item for item in items if item.name.partition("[")[2].rstrip("]") in quick]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def describe() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    found = [name for name in ("torch", "triton") if importlib.util.find_spec(name)]
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in found}}
    versions |= {"compiler": native.build_info()["compiler"]} if native.available() else {}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=10", "HEAD") or "none",
        "dirty": bool(_git("status", "--porcelain", "--", *MEASURED)),
        "machine": {
            "device": "cpu",
            "cpu": model[1] if model else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": native.isa() or "none",
            "load": os.getloadavg()[0],  # what others did on these cores when the run began
        },
        "versions": versions,
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    result = config.stash[result_key]
    found = result["cases"]
    if not found:
        return
    # Only a whole run, in which every result was right, can become the README's table.
    device = "cpu"
    ids = {case["id"] for case in found}
    whole = ids == {case.id for case in ON_CPU}
    if any("peak_bytes" in case for case in found):
        device, whole = "gpu", ids == {case.id for case in gpu.CASES}
        result["machine"]["device"] = torch.cuda.get_device_name()
    folder = RESULTS if whole else ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date'][:10]}-{result['commit']}{'-dirty' * result['dirty']}-{device}.json"
    # One case a line: what changed between two files can be read in a diff.
    head = json.dumps({**result, "cases": []}, indent=1)
    lines = ",\n  ".join(json.dumps(case) for case in found)
    path.write_text(head.replace('"cases": []', f'"cases": [\n  {lines}\n ]') + "\n")
    terminalreporter.write_line(f"\n{table(result)}\n\nwritten: {path.relative_to(ROOT)}")
