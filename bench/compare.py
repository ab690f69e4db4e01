"""`python -m bench.compare OLD NEW`: what changed between two result files by more than its spread.

Speed-ups are compared, which are ratios within a run, and memory; the times of two runs are not. The exit code is 1 if
a speed-up fell or memory grew.
"""

import argparse
import json
import sys
from pathlib import Path

from tlkernels.bench.compare import WORSE, changes, differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    found = list(changes(old, new))
    if not found:
        parser.error("the two files have no case in common")
    for line in differences(old, new):
        print(f"not the same: {line}")
    print(f"{'case':56} {'against':8} {'old':>10} {'new':>10} {'new/old':>8}")
    for case, name, then, now, word in found:
        print(f"{case:56} {name:8} {then:10.4g} {now:10.4g} {now / max(then, 1e-9):8.3f}  {word}".rstrip())
    worse = sum(word in WORSE for *_, word in found)
    print(f"{worse} of {len(found)} figures became worse beyond their spread")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
