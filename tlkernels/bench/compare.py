"""Comparing two result files.

Only speed-ups are compared, which are ratios within a run; the times of two runs are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]
LEAST = 0.05
"""A change of the median by less is none: it is what a machine's state changes from one run to the next."""
WORSE = ("slower", "more memory")


def changes(old: Json, new: Json) -> Iterator[tuple[str, str, float, float, str]]:
    """Yield case, what is compared, both figures, and a word where they differ beyond their spread, "" elsewhere.

    Compared are the speed-ups over "eager" and "floor" ("slower" or "faster": the quartiles do not overlap, and the
    medians differ by more than `LEAST`), and the bytes of "memory" ("more memory" or "less memory").
    """
    before = {case["id"]: case for case in old["cases"]}
    for case in new["cases"]:
        if case["id"] in before:
            for name, then, now, word in _compared(before[case["id"]], case):
                yield case["id"], name, then, now, word


def _compared(old: Json, new: Json) -> Iterator[tuple[str, float, float, str]]:
    for name in ("eager", "floor"):
        if name in old["speedup"] and name in new["speedup"]:
            then, now = old["speedup"][name], new["speedup"][name]
            slower = now[2] < then[0] and now[1] < (1 - LEAST) * then[1]
            faster = now[0] > then[2] and now[1] > (1 + LEAST) * then[1]
            yield name, then[1], now[1], "slower" if slower else "faster" if faster else ""
    # What eager needs too says whether the machine or PyTorch has changed, and not we.
    if {old["ours"], "eager"} <= old["memory"].keys() and {new["ours"], "eager"} <= new["memory"].keys():
        then_bytes, now_bytes = old["memory"][old["ours"]], new["memory"][new["ours"]]
        grain = LEAST * max(then_bytes, old["memory"]["eager"])
        more, less = now_bytes > then_bytes + grain, now_bytes < then_bytes - grain
        yield "memory", then_bytes, now_bytes, "more memory" if more else "less memory" if less else ""


def differences(old: Json, new: Json) -> list[str]:
    """Return what else differs between the runs, and so may be the reason."""
    return [
        f"{part}.{key}: {old[part].get(key)} -> {new[part].get(key)}"
        for part in ("machine", "versions")
        for key in sorted({*old[part], *new[part]})
        if key != "busy" and old[part].get(key) != new[part].get(key)
    ]
