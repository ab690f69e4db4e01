"""The profile of a training loop: what each of its steps measures."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tlkernels import html
from tlkernels.profiling import report
from tlkernels.profiling.compare import Comparison
from tlkernels.profiling.discover import Discovery
from tlkernels.profiling.functions import Functions, compiled
from tlkernels.profiling.memory import Peaks, free_bytes
from tlkernels.profiling.replay import replay
from tlkernels.profiling.result import Measured, result_of
from tlkernels.profiling.timed import Timed
from tlkernels.profiling.trace import Trace
from tlkernels.profiling.watch import Listener, Watch
from tlkernels.train.errors import RunError

LEAST_STEPS, TRACED = 3, 3


def _eager() -> AbstractContextManager[Any]:
    """Run compiled functions as they were written: PyTorch's counter of operations cannot look into graphs."""
    return torch.compiler.set_stance("force_eager") if compiled() else nullcontext()


_Plan = Generator[None, bool, None]
"""Each `yield` lets the loop do a step, and returns whether its optimiser did one."""


class Profile:
    """A context around a training loop; see `tlkernels.profile`.

    Attributes:
        folder: where the files go.
        warmup: the steps before those that are timed.
        seen: the steps of the loop so far, with those that the optimiser skipped.
        done: whether everything is measured.
        result: what profile.json has; empty until the steps are done that every profile needs.
    """

    def __init__(self, model: nn.Module | None, *, steps: int, warmup: int, folder: str | Path, compare: bool) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module or None, got {type(model).__name__}")
        for name, value, least in (("steps", steps, LEAST_STEPS), ("warmup", warmup, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        self.folder, self.seen, self.done = Path(folder), 0, False
        self.result: dict[str, Any] = {}
        self.warmup, self._steps, self._compare = warmup, steps, compare
        self._watch = Watch(model)
        self._functions = Functions(self._watch)
        self._comparison: Comparison | None = None
        self._plan: _Plan | None = None
        self._optimised = False

    @property
    def needed(self) -> int:
        """The number of steps that a profile needs, without those in which losses take turns."""
        return self.warmup + self._steps + 3 + TRACED

    @property
    def report(self) -> str:
        """The results as a table and in words.

        Raises:
            RunError: the loop has done too few steps.
        """
        if not self.result:
            raise self._too_few()
        return report.text(self.result)

    def _too_few(self) -> RunError:
        return RunError(
            f"the loop did {self.seen} steps of its optimiser; the profile needs {self.needed}: {self.warmup} to warm "
            f"up, {self._steps} that are timed and {3 + TRACED} that are looked into, before losses take turns"
        )

    def __enter__(self) -> Profile:
        if self._plan is not None:
            raise RuntimeError("a profile is entered once; make another with tlkernels.profile()")
        self._plan = self._measured()
        next(self._plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is None and not self.result:
            raise self._too_few()

    def end(self) -> None:
        """Measure no further; the results are those of the steps so far."""
        if self._plan is not None:
            self._plan.close()  # removes the hooks
        self.done = True
        if self.result:
            self._finish()

    def step(self) -> bool:
        """Tell that the loop has done a step of its optimiser; return whether everything is measured.

        A step in which no optimiser of PyTorch stepped, though one did before, is measured again: a GradScaler skips
        steps.
        """
        if self._plan is None:
            raise RuntimeError("step: expected a call within `with tlkernels.profile() as p`")
        if not self.done:
            self.seen += 1
            stepped, self._watch.optimiser_stepped = self._watch.optimiser_stepped, False
            self._optimised |= stepped
            try:
                self._plan.send(stepped or not self._optimised)
            except StopIteration:
                self.end()
        return self.done

    # ---- the plan

    def _measured(self) -> _Plan:
        watch = self._watch
        with watch.hooked():
            with watch.finding_roots():
                yield
            for _ in range(1, self.warmup):
                yield
            timed = Timed(watch.device)
            yield from self._watched(timed, self._steps)
            yield from self._looked_into(timed)
            self._write()
            comparison = self._comparison
            if comparison is not None:
                with self._functions.seen():
                    yield from self._taking_turns(comparison)

    def _watched(self, listener: Listener, count: int) -> _Plan:
        """Let the loop do `count` steps with a listener; those that the optimiser skips do not count."""
        self._watch.listener = listener
        while count:
            listener.begin()
            taken = yield
            listener.end(taken)
            count -= taken
        self._watch.listener = Listener()

    def _looked_into(self, timed: Timed) -> _Plan:
        """Count operations and record losses; measure memory; trace."""
        watch, device = self._watch, self._watch.device
        found, functions = Discovery(watch), self._functions
        with functions.seen(all_calls=True), found.recorded(), _eager():
            yield from self._watched(found, 1)
        losses = [replay(recorded) for recorded in found.losses.values()]
        found.losses.clear()  # frees their tensors, before the units need memory for the logits
        units = [
            said | {"unit": None if recorded is None else replay(recorded)} for said, recorded in found.units.recorded()
        ]
        found.units.clear()
        if found.head_layer is not None:
            watch.hook_head(found.head_layer)
        peaks, trace = Peaks(device), Trace(device)
        with functions.seen():
            with peaks.measured():
                yield from self._watched(peaks, 1)
            with trace.recorded():
                yield from self._watched(trace, 1 + TRACED)
        steps = trace.steps()
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export(self.folder / "trace.json.gz", steps)
        measured = Measured(timed, found.operations, losses, units, peaks, steps)
        self.result = result_of(measured, device, watch.compiled, has_head=trace.saw_head or not found.with_head)
        self._plan_comparison(losses, peaks, device)

    def _plan_comparison(self, losses: list[dict[str, Any]], peaks: Peaks, device: torch.device) -> None:
        if not self._compare:
            return
        free = free_bytes(device) - max(0, (peaks.at_loss or 0) - peaks.now()) if peaks.measurable else 0
        comparison = Comparison(losses, self._steps, free, device)
        self.result["notes"] += [f"No steps with {name}: {reason}." for name, reason in comparison.refused.items()]
        if len(comparison.ways) > 1:
            self._comparison = comparison

    def _taking_turns(self, comparison: Comparison) -> _Plan:
        while not comparison.complete:
            self._watch.way = comparison.begin()
            taken = yield
            comparison.end(taken)
        self._watch.way = None

    # ---- the results

    @property
    def _writes(self) -> bool:
        return os.environ.get("RANK", "0") == "0"  # of several processes, one writes

    def _finish(self) -> None:
        """Add the comparison, as far as it came, and write the results."""
        comparison, self._comparison = self._comparison, None
        if comparison is None:
            return
        self.result |= {
            "step_speedups": comparison.measured(self.result["step"]["seconds"][1]),
            "baseline": comparison.baseline,
        }
        if self._watch.unserved:
            self.result["notes"].append(
                f"In these steps {self._watch.unserved} calls of losses had no other way and were computed as is."
            )
        if not comparison.complete:
            self.result["notes"].append(
                f"The loop ended after {comparison.done} of {len(comparison.order)} steps in which losses take turns."
            )
        self._write()

    def _write(self) -> None:
        if self._writes:
            file = self.folder / "profile.json"
            file.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")
            if importlib.util.find_spec("plotly") is not None:
                html.write(self.folder / "report.html", self.result)
