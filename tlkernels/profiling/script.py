"""Run a training script and profile it: `python -m tlkernels.profiling.script [options] -- train.py ARGS`.

`tlkernels profile -- python train.py ARGS` calls it. With torchrun or accelerate, launch it in place of the script:
`torchrun ... -m tlkernels.profiling.script -- train.py ARGS`; rank 0 reports.

A step ends when an optimiser of PyTorch has stepped; with several, when the one has that stepped last in the first
cycle. A step that a GradScaler skips is measured again.
"""

from __future__ import annotations

import os
import runpy
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tlkernels.arguments import Parser
from tlkernels.profiling.session import Profile
from tlkernels.train.errors import RunError, UserError, one_line


class _Steps:
    """Tells a profile of the steps that a script does."""

    def __init__(self, profile: Profile, stop: bool) -> None:
        self.error: RunError | None = None
        self._profile, self._stop = profile, stop
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._last: Optimizer | None = None
        self._cycle = False
        """Whether an optimiser stepped twice."""
        self._calls = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count steps."""
        scaled = torch.amp.GradScaler.step
        steps = self

        def step(self: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
            before = steps._calls
            result = scaled(self, optimizer, *args, **kwargs)
            if steps._calls == before:
                steps._stepped(optimizer)
            return result

        handle = register_optimizer_step_post_hook(self._hook)
        torch.amp.GradScaler.step = step  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.amp.GradScaler.step = scaled  # type: ignore[method-assign]
            handle.remove()

    def _hook(self, optimizer: Optimizer, *_: Any) -> None:
        self._calls += 1
        self._stepped(optimizer)

    def _stepped(self, optimizer: Optimizer) -> None:
        """The optimiser has stepped, or a GradScaler has skipped its step."""
        if self._profile.done or self.error is not None:
            return
        if optimizer not in self._known:
            self._known.add(optimizer)
            self._last = optimizer
            if self._profile.seen > self._profile.warmup:
                self.error = RunError(
                    f"an optimiser stepped for the first time after {self._profile.seen} steps; give --warmup a larger "
                    "number, so that all have stepped before"
                )
            return
        if not self._cycle:  # the first cycle was a step, which only now is known to have ended
            self._cycle = True
            self._profile.step()
        if optimizer is self._last and self._profile.step():
            print_report(self._profile)
            if self._stop:
                raise SystemExit(0)


def print_report(profile: Profile) -> None:
    """Print the report and where the files are; of several processes, one prints."""
    if _reports():
        page = profile.folder / "report.html"
        first = (
            "report.html" if page.exists() else "no report.html, which needs plotly (pip install 'tlkernels[bench]')"
        )
        files = f"{first}, profile.json, trace.json.gz (open it at ui.perfetto.dev)"
        print(f"\n{profile.report}\n\nin {profile.folder}: {files}\n", flush=True)


def _reports() -> bool:
    return os.environ.get("RANK", "0") == "0"


def add_options(parser: Parser) -> None:
    """Add the options that the command and this module share."""
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed (default: 8)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, at least 2 (default: 3)")
    parser.add_argument("--folder", default="profile", help="where the files go (default: profile)")
    parser.add_argument("--no-compare", action="store_true", help="do not train steps with other losses' kernels")
    parser.add_argument("--stop", action="store_true", help="end the script when all is measured")


def split(arguments: Sequence[str], example: str) -> tuple[list[str], list[str]]:
    """Return the options and what follows `--`.

    Raises:
        UserError: there is no `--`, or nothing after it.
    """
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    if not words[at + 1 :] and not {"-h", "--help"} & set(words[:at]):
        raise UserError(f"expected `--` and a command after it, such as: {example}")
    return words[:at], words[at + 1 :]


def run(words: Sequence[str]) -> None:
    """Run `train.py ARGS` or `-m module ARGS` as Python does."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def main(arguments: Sequence[str]) -> int:
    """Run a script under a profile and return the exit code."""
    options, words = split(arguments, "-- train.py --epochs 1")
    parser = Parser(prog="python -m tlkernels.profiling.script", description=__doc__)
    add_options(parser)
    given = parser.parse_args(options)
    if given.warmup < 2:  # that the first step has ended is seen in the second
        raise UserError(f"--warmup: expected a whole number of at least 2, got {given.warmup}")
    try:
        profile = Profile(
            None, steps=given.steps, warmup=given.warmup, folder=given.folder, compare=not given.no_compare
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if words[0] != "-m" and not Path(words[0]).is_file():
        raise UserError(f"script: expected a file, got {words[0]!r}")
    steps = _Steps(profile, given.stop)
    with profile:
        with steps.counted():
            try:
                run(words)
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
        if steps.error is not None:
            raise steps.error
        if profile.result and not profile.done:
            profile.end()
            print_report(profile)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, RunError) as problem:
        if _reports():
            print(f"tlkernels profile: {one_line(problem)}", file=sys.stderr)
        sys.exit(2 if isinstance(problem, UserError) else 1)
