"""`python -m bench.compare OLD NEW`: which speed-ups fell between two result files by more than their spread.

Only speed-ups are compared, which are ratios within a run; the times of two runs are not. The exit code is 1 if any
fell.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


def changes(old: Json, new: Json) -> Iterator[tuple[str, str, float, float, str]]:
    """Yield case, contestant, both speed-ups, and "slower" or "faster" where the quartiles do not overlap."""
    before = {case["id"]: case["speedup"] for case in old["cases"]}
    for case in new["cases"]:
        for name in ("eager", "floor"):
            if name in case["speedup"] and name in before.get(case["id"], {}):
                then, now = before[case["id"]][name], case["speedup"][name]
                word = "slower" if now[2] < then[0] else "faster" if now[0] > then[2] else ""
                yield case["id"], name, then[1], now[1], word


def differences(old: Json, new: Json) -> list[str]:
    """Return what else differs between the runs, and so may be the reason."""
    return [
        f"{part}.{key}: {old[part].get(key)} -> {new[part].get(key)}"
        for part in ("machine", "versions")
        for key in sorted({*old[part], *new[part]})
        if key != "busy" and old[part].get(key) != new[part].get(key)
    ]


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
    print(f"{'case':56} {'against':8} {'old':>8} {'new':>8} {'new/old':>8}")
    for case, name, then, now, word in found:
        print(f"{case:56} {name:8} {then:8.3g} {now:8.3g} {now / then:8.3f}  {word}".rstrip())
    slower = sum(word == "slower" for *_, word in found)
    print(f"{slower} of {len(found)} ratios became worse beyond their spread")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
