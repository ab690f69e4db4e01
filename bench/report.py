"""`python -m bench.report [FILE]`: print all tables of a result file, in markdown. `make readme` writes them."""

import argparse
import json
import sys
from pathlib import Path

from tlkernels.bench.busy import BUSY, BUSY_CASE
from tlkernels.bench.tables import Json, tables

RESULTS = Path(__file__).parent / "results"


def newest() -> Path:
    """Return the newest result file of a CPU."""
    paths = sorted(RESULTS.glob("*-cpu.json"), key=lambda path: str(json.loads(path.read_text())["date"]))
    if not paths:
        raise ValueError("bench/results: expected a result file, got none; run make bench")
    return paths[-1]


def read(path: Path) -> Json:
    """Return the results of a file, or raise ValueError with the reason why its figures cannot be used."""
    result: Json = json.loads(path.read_text())
    if reason := refusal(result):
        raise ValueError(f"{path.name}: {reason}")
    return result


def refusal(result: Json) -> str:
    """Return why the figures of a result file cannot be used, or an empty string."""
    reasons = []
    if result["dirty"]:
        reasons.append("dirty: expected the files of a commit, got local changes")
    if not result.get("whole"):
        reasons.append("whole: expected every case, got a part of them")
    busy = result["machine"].get("busy")
    if busy is None:
        reasons.append("machine.busy: expected the share of the cores that other processes used, got nothing")
    elif busy > BUSY:
        reasons.append(
            f"machine.busy: expected at most {BUSY:.0%} of the cores used by other processes, got {busy:.1%}"
        )
    for case in result["cases"]:
        if (case.get("busy") or 0.0) > BUSY_CASE:
            reasons.append(f"{case['id']}: busy: expected at most {BUSY_CASE:.0%}, got {case['busy']:.1%}")
    return "; ".join(reasons)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="default: the newest in bench/results")
    path = parser.parse_args().file
    try:
        print(tables(read(path or newest())))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
