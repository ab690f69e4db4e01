"""Units of the battery: some cases of a loss with one implementation, each unit in its own process.

A unit writes a line before and after each case. So the case that crashes or hangs its process is known, and the unit
continues after it in a new process.
"""

import collections
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.gpu.session import TIMED_OUT, Session

BEGUN, PASSED, FAILED, REFUSED = "begun", "passed", "failed", "refused"
DIED, TIMEOUT = "died", "timeout"
MOST_DEATHS = 4
"""A unit is given up after so many crashes."""
GRACE = 3.0
"""Seconds before the end of a phase in which a process must end by itself."""
HUNG = "Timeout ("
"""The beginning of faulthandler's message when a case exceeds its time."""


@dataclass(frozen=True)
class Unit:
    """Every `shards`-th job of a loss, from `shard` on."""

    kind: str
    """"smoke": the first case of every dtype; "battery": all."""
    loss: str
    impl: str
    isa: str = ""
    shard: int = 0
    shards: int = 1

    @property
    def name(self) -> str:
        """Return the name of the unit's files."""
        return f"{self.kind}-{self.loss}-{self.impl}-{self.shard}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, except one that was cut off."""
    objects = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects


class Pool:
    """Runs units in order, `slots` at a time, until the time is over."""

    def __init__(self, session: Session, units: Sequence[Unit], slots: int, until: float) -> None:
        self.session, self.until = session, until
        self.waiting = collections.deque(units)
        self.running: set[Unit] = set()
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self._work) for _ in range(slots)]
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        """Wait until all units are done, or the time is over."""
        for thread in self.threads:
            thread.join()

    def wait_for(self, kind: str, until: float) -> None:
        """Wait until no unit of that kind is left, or until the time `until`."""

        def over() -> bool:
            return all(unit.kind != kind for unit in (*self.waiting, *self.running))

        with self.changed:
            self.changed.wait_for(over, max(0.0, self.session.left(until)))

    def _work(self) -> None:
        while self.session.left(self.until) > GRACE:
            with self.changed:
                if not self.waiting:
                    return
                unit = self.waiting.popleft()
                self.running.add(unit)
            self._run(unit)
            with self.changed:
                self.running.remove(unit)
                self.changed.notify_all()

    def _run(self, unit: Unit) -> None:
        """Run a unit; after a crash continue it in a new process."""
        skip = 0
        for attempt in range(MOST_DEATHS):
            seconds = self.session.left(self.until)
            if seconds < GRACE:
                return
            lines = self.session.parts / f"{unit.name}-{attempt}.jsonl"
            log = lines.with_suffix(".log")
            order = {**asdict(unit), "skip": skip, "lines": str(lines), "seconds": seconds - GRACE}
            command = self.session.python("-m", "scripts.gpu.battery", json.dumps(order))
            status = self.session.call(command, seconds, log)
            if status in (0, TIMED_OUT):  # TIMED_OUT: the phase ended, and the line of the case says "begun"
                return
            last = bury(unit, status, lines, log, skip)
            if last is None:
                return
            skip = last + 1


def bury(unit: Unit, status: int, lines: Path, log: Path, first: int) -> int | None:
    """Record the job in which a process died and return its number, or None if it was in no job."""
    written = read_lines(lines)
    begun = written[-1] if written and written[-1]["status"] in (BEGUN, DIED) else None
    if begun is not None and begun["status"] == DIED:  # the process has written so itself
        return int(begun["job"])
    output = log.read_text().partition("\nExtension modules:")[0][-1500:]
    line = {
        **asdict(unit),
        "job": begun["job"] if begun else first,
        "case": begun["case"] if begun else "(start)",
        "status": TIMEOUT if HUNG in output else DIED,
        "error": f"status {status}\n{output}",
    }
    with lines.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return int(begun["job"]) if begun else None
