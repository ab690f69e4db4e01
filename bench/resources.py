"""What the reports on compiled kernels share: rows of which some have a problem, and perhaps a reason for it."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Compiled(Protocol):
    """A named tuple about one kernel, compiled for one architecture."""

    @property
    def problem(self) -> str:
        """What is wrong, or an empty string."""

    @property
    def exception(self) -> str:
        """Why that is right all the same."""


def report(fields: Sequence[str], rows: Sequence[Any], path: Path | None) -> int:
    """Write the rows as CSV to `path` or standard output, tell what is wrong, and return whether anything is."""
    with sys.stdout if path is None else path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(rows)
    wrong: list[Compiled] = [row for row in rows if row.problem and not row.exception]
    for row in wrong:
        print(row, file=sys.stderr)
    return int(bool(wrong))
