"""Writes a report on compiled kernels; used for Triton and for CUDA."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Compiled(Protocol):
    """A row of a report: one kernel, compiled for one architecture."""

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is."""

    @property
    def exception(self) -> str:
        """Why the problem is accepted; empty if it is not."""


def report(fields: Sequence[str], rows: Sequence[Any], path: Path | None) -> int:
    """Write the rows as CSV to `path` or standard output; print rows whose problem has no exception, and return 1 if
    there are any."""
    with sys.stdout if path is None else path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(rows)
    wrong: list[Compiled] = [row for row in rows if row.problem and not row.exception]
    for row in wrong:
        print(row, file=sys.stderr)
    return int(bool(wrong))
