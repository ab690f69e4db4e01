"""The command `tlkernels bench`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

# torch.compile compiles in this process: its workers would run while others are timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from tlkernels.arguments import Parser
from tlkernels.bench import busy
from tlkernels.bench.cases import case_of, of_model, parse_dtype, parse_options, parse_shape, selected
from tlkernels.bench.ceilings import add_roofs
from tlkernels.bench.compare import WORSE, changes, differences
from tlkernels.bench.cost import COSTS
from tlkernels.bench.measure import measure
from tlkernels.bench.origin import describe
from tlkernels.bench.peers import versions
from tlkernels.bench.scale import in_words as growth
from tlkernels.bench.scale import scales
from tlkernels.bench.tables import tables
from tlkernels.bench.terminal import in_words, lost
from tlkernels.bench.work import OURS, Case
from tlkernels.train.errors import RunError, UserError, one_line

ABOUT = """\
Time the losses on this machine, forward and backward: tlkernels against eager PyTorch, torch.compile, the limits of the
machine, and with --peers other libraries. Every contestant runs once a round, and before it the caches are emptied; a
speed-up is the median of the ratios within the rounds. Beside each time is the error against float64.
"""


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write result.json, report.html and report.md; return 1 if a result is wrong or became slower.

    Raises:
        UserError: an argument is wrong.
        RunError: nothing could be measured.
    """
    if importlib.util.find_spec("plotly") is None:
        raise UserError("the report needs plotly: pip install 'tlkernels[bench]'")
    given = _parser().parse_args(arguments)
    cases = list(_cases(given))
    before = _earlier(given.against)
    folder = Path(given.folder or f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--folder: {folder} is not empty")
    result = _measured(cases, given, folder)
    print(f"\n{lost(result['cases'])}")
    if given.scale:
        result["scales"] = [one for case in cases for one in scales(case, (given.impl[0], "eager"))]
        print(f"\n{growth(result['scales'])}")
    write(folder, result, before)
    print(f"\nwritten: {', '.join(str(folder / name) for name in ('result.json', 'report.html', 'report.md'))}")
    worse = _compared(before, result) if before else 0
    return 1 if worse or any(case["wrong"] for case in result["cases"]) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tlkernels bench", description=ABOUT)
    add = parser.add_argument
    add("--loss", nargs="+", default=[], metavar="LOSS", help=f"default: all; {', '.join(COSTS)}")
    add(
        "--shape",
        nargs="+",
        default=[],
        metavar="SIZES",
        help="such as 8192x32000, or 4096x576x49152 for a linear loss",
    )
    add("--dtype", nargs="+", default=["float32"], help="float32 (default), bfloat16, float16, float64")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--from-model", metavar="FOLDER", help="take the sizes from a model of transformers and --batch")
    add("--batch", default="8x512", metavar="SIZES", help="sequences x tokens for --from-model (default: 8x512)")
    add(
        "--option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of the loss: label_smoothing=0.1, divergence=js, ...",
    )
    add("--impl", nargs="+", default=["auto"], choices=OURS, help="the first is the one whose speed-ups are given")
    add("--peers", action="store_true", help="time the losses of other libraries that are installed")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--warm", action="store_true", help="leave the caches as they are, and repeat short calls: their overhead")
    add(
        "--seconds", type=float, default=3.0, help="of rounds for each case, of which there are at least 7 (default: 3)"
    )
    add("--scale", action="store_true", help="fit how time and memory grow with each size, up to that of the case")
    add("--against", metavar="FILE", help="an earlier result.json to compare with")
    add("--folder", help="for the report (default: bench-DATE)")
    return parser


def _cases(given: argparse.Namespace) -> list[Case]:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU that PyTorch can use")
    if given.seconds <= 0:
        raise UserError(f"--seconds: expected more than 0, got {given.seconds}")
    model = of_model(given.from_model, given.batch) if given.from_model else None
    if model and given.shape:
        raise UserError("--shape and --from-model exclude each other")
    shapes, options = [parse_shape(text) for text in given.shape], parse_options(given.option)
    contestants = (*given.impl[1:], "eager", *(() if given.no_compile else ("compile",)), "floor")
    return [
        case_of(loss, shape, dtype, device, contestants, options, given.seconds, not given.warm, given.peers)
        for loss, shape in selected(given.loss, shapes, device, model)
        for dtype in map(parse_dtype, dict.fromkeys(given.dtype))
    ]


def _earlier(file: str | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        assert found["cases"] and found["machine"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"--against: expected a result.json of tlkernels bench, got {file!r}") from error
    return found


def _measured(cases: Sequence[Case], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the cases. After each, result.json has what was measured until then, should the run be interrupted."""
    device = torch.device(cases[0].device)
    result: dict[str, Any] = {**describe(versions()), "whole": False, "cases": []}
    print(f"measuring {len(cases)} case{'s' * (len(cases) != 1)} on {result['machine']['device']}", flush=True)
    for case in cases:
        try:
            info, _ = measure(case, given.impl[0])
        except (RuntimeError, MemoryError) as error:
            print(f"\n{case.id} could not be measured: {one_line(error)}", flush=True)
            continue
        result["cases"].append(info)
        result["whole"] = len(result["cases"]) == len(cases)
        result["machine"]["busy"] = busy.of_run(result["cases"])
        add_roofs(result, device)
        save(folder, result)
        print(f"\n{in_words(info, result['ceilings'])}", flush=True)
    if not result["cases"]:
        raise RunError("no case could be measured")
    return result


def save(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write(folder: Path, result: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Write result.json, report.md and report.html."""
    from tlkernels import html

    save(folder, result)
    (folder / "report.md").write_text(tables(result) + "\n", encoding="utf-8")
    html.write(folder / "report.html", result, before)


def _compared(before: dict[str, Any], result: dict[str, Any]) -> int:
    found = list(changes(before, result))
    print("\n" + ("compared with the earlier run:" if found else "the earlier run has none of these cases"))
    for line in differences(before, result):
        print(f"  not the same: {line}")
    for case, name, then, now, word in found:
        if word:
            print(f"  {case}, {name}: {then:.4g} -> {now:.4g}, {word}")
    return sum(word in WORSE for *_, word in found)
