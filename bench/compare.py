"""`python -m bench.compare OLD NEW`: what became slower between two result files, beyond the spread of either.

Times of two runs are not compared, only ratios within a run: how many times eager's speed ours had then, and has now.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


def changes(old: Json, new: Json) -> Iterator[tuple[str, str, float, float, str]]:
    """Case, contestant, speed-up then and now, and "slower" or "faster" where the two spreads do not meet."""
    before = {case["id"]: case["speedup"] for case in old["cases"]}
    for case in new["cases"]:
        for name in ("eager", "copy"):
            if name in case["speedup"] and name in before.get(case["id"], {}):
                then, now = before[case["id"]][name], case["speedup"][name]
                word = "slower" if now[2] < then[0] else "faster" if now[0] > then[2] else ""
                yield case["id"], name, then[1], now[1], word


def differences(old: Json, new: Json) -> list[str]:
    """What else is not the same, and so may be the reason."""
    return [
        f"{part}.{key}: {old[part].get(key)} -> {new[part].get(key)}"
        for part in ("machine", "versions")
        for key in sorted({*old[part], *new[part]})
        if old[part].get(key) != new[part].get(key)
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
