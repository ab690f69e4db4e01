"""Units of the battery: some cases of a loss by one implementation, each unit in a process of its own.

A unit writes a line before a case and one after it. So a case that ends the process, or hangs, is known by its name,
and the unit goes on behind it in another process.
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
"""After so many deaths a unit is given up."""
GRACE = 3.0
"""Seconds that a process gets to end by itself."""
HUNG = "Timeout ("
"""What faulthandler writes when a case takes longer than it may."""


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
        """Return a name for files."""
        return f"{self.kind}-{self.loss}-{self.impl}-{self.shard}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, but for one that was cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class Pool:
    """Runs units, `slots` at a time and in their order, until the time is over."""

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
        """Wait until no unit of that kind is left, or until then."""

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
        """Run a unit in as many processes as it takes."""
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
            if status in (0, TIMED_OUT):  # cut off by the end of the phase: the line of its case says "begun"
                return
            last = bury(unit, status, lines, log, skip)
            if last is None:
                return
            skip = last + 1


def bury(unit: Unit, status: int, lines: Path, log: Path, first: int) -> int | None:
    """Write down what a dead process was at, and return the number of that job; None if it was none."""
    written = read_lines(lines)
    begun = written[-1] if written and written[-1]["status"] in (BEGUN, DIED) else None
    if begun is not None and begun["status"] == DIED:  # it has said so itself
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
