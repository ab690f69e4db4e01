"""Options of the benchmarks; writes the result file and prints its tables."""

import json
import os
from typing import Any, cast

import pytest
import torch

# torch.compile compiles in this process: its workers would run while others are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from bench.cases import CASES
from bench.report import RESULTS, refusal
from tlkernels.bench import busy
from tlkernels.bench.ceilings import add_roofs
from tlkernels.bench.origin import ROOT, describe
from tlkernels.bench.peers import versions
from tlkernels.bench.tables import tables
from tlkernels.bench.work import OURS

NAMES = (*OURS, "eager", "compile", "floor")
result_key = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tlkernels benchmarks")
    group.addoption("--quick", action="store_true", help="a subset that takes about two minutes")
    group.addoption("--impl", default="auto", choices=OURS, help="the implementation whose speed-up is measured")
    group.addoption("--contestant", action="append", default=[], choices=NAMES, help="one more to time")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[result_key] = {**describe(versions()), "whole": False, "cases": [], "scales": []}


@pytest.fixture
def results(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], pytestconfig.stash[result_key]["cases"])


@pytest.fixture
def growth(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], pytestconfig.stash[result_key]["scales"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        quick = {case.id for case in CASES if case.quick}
        items[:] = [item for item in items if item.name.partition("[")[2].rstrip("]") in quick]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    result = config.stash[result_key]
    found = result["cases"]
    if not found:
        return
    result["whole"] = {case["id"] for case in found} == {case.id for case in CASES}
    result["machine"]["busy"] = busy.of_run(found)
    add_roofs(result, torch.device("cpu"))
    reason = refusal(result)
    folder = ROOT / "build" / "bench" if reason else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date'][:10]}-{result['commit']}{'-dirty' * result['dirty']}-cpu.json"
    # One case a line: what changed between two files can be read in a diff.
    text = json.dumps({**result, "cases": [], "scales": []}, indent=1)
    for part in ("cases", "scales"):
        lines = ",\n  ".join(json.dumps(one) for one in result[part])
        text = text.replace(f'"{part}": []', f'"{part}": [\n  {lines}\n ]')
    path.write_text(text + "\n")
    terminalreporter.write_line(f"\n{tables(result)}\n\nwritten: {path.relative_to(ROOT)}")
    if reason:
        terminalreporter.write_line(f"not for bench/results: {reason}")
