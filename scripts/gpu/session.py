"""The clock, the folders and the processes of one run on a GPU machine."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.gpu.kit import ROOT

TIMED_OUT = 124
"""The status of a command that ran too long, as `timeout` returns it."""
RESERVE = 5.0
"""Seconds kept for the summary."""


class Session:
    """One run: `out` gets the files that are returned, `parts` all others.

    Its processes get no TLKERNELS_CHECK and no TRITON_INTERPRET, and find `tests` on PYTHONPATH.
    """

    def __init__(self, out: Path, budget: float, fake: bool) -> None:
        self.start = time.monotonic()
        self.out, self.budget, self.fake = out.resolve(), budget, fake
        self.parts = Path(tempfile.mkdtemp(prefix="gpu-run-"))
        self.notes: list[str] = []
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.findings = 0  # of the sanitizers, and commands that failed
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = self._environment()

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "tests"), str(self.parts / "site"), os.environ.get("PYTHONPATH", "")]
        kept = {
            name: value for name, value in os.environ.items() if name not in ("TLKERNELS_CHECK", "TRITON_INTERPRET")
        }
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(self.parts / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.parts / "inductor"),
        }

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.start

    def left(self, until: float | None = None) -> float:
        """Return the seconds until the time `until`, or until the summary has to be written."""
        end = self.budget - RESERVE
        return (end if until is None else min(until, end)) - self.now()

    def note(self, text: str) -> None:
        """Print a line and add it to the summary."""
        line = f"[{self.now():4.0f} s] {text}"
        self.notes.append(line)
        print(line, flush=True)

    def call(
        self,
        command: Sequence[str],
        seconds: float,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Append a command's output to `log` and return its status; after `seconds` kill it and its children."""
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(environment or {})},
                cwd=ROOT,
                start_new_session=True,
            )
            self.processes.add(process)
            try:
                return process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return TIMED_OUT
            finally:
                self.processes.discard(process)

    def end(self) -> None:
        """Kill the processes that still run."""
        for process in list(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def python(self, *arguments: str) -> list[str]:
        """Return a command that runs this Python."""
        return [sys.executable, *arguments]
