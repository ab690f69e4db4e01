"""What a run tells: files of lines, and a page that is printed last."""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.gpu.units import BEGUN, DIED, FAILED, PASSED, REFUSED, TIMEOUT, read_lines

Line = Mapping[str, Any]
COLUMNS = (PASSED, FAILED, DIED, TIMEOUT, REFUSED, BEGUN)
WRONG = (FAILED, DIED, TIMEOUT)
PAGE = 11_500
"""The characters of the page that are printed: so many come back with the answer of the device tool."""
TIES = 0.03
"""Times that differ by less are no reason to prefer either."""


def outcomes(parts: Path) -> list[Line]:
    """Return the last line of every case that was begun."""
    last: dict[tuple[Any, ...], Line] = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in read_lines(path):
            last[tuple(line[key] for key in ("kind", "loss", "impl", "shard", "job"))] = line
    return list(last.values())


def battery_table(lines: Sequence[Line]) -> list[str]:
    """Return how many cases of each loss and implementation came to what."""
    counts: dict[tuple[str, str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        counts[line["kind"], line["loss"], line["impl"]][line["status"]] += 1
    head = f"{'':8}{'loss':22}{'impl':10}" + "".join(f"{name:>9}" for name in COLUMNS)
    rows = [
        f"{kind:8}{loss:22}{impl:10}" + "".join(f"{count[name]:9}" for name in COLUMNS)
        for (kind, loss, impl), count in sorted(counts.items())
    ]
    return [head, *rows]


def failure_groups(lines: Sequence[Line]) -> list[list[Line]]:
    """Return what went wrong, cases with the same end of their message together, the most frequent first."""
    groups: dict[tuple[str, ...], list[Line]] = collections.defaultdict(list)
    for line in lines:
        if line["status"] in WRONG:
            groups[line["loss"], line["impl"], line["status"], line["error"].strip()[-120:]].append(line)
    return sorted(groups.values(), key=len, reverse=True)


def failures_text(groups: Sequence[Sequence[Line]]) -> str:
    """Return a paragraph for each group, with one whole message."""
    parts = []
    for group in groups:
        first = group[0]
        names = ", ".join(line["case"] for line in group[:6])
        parts.append(
            f"==== {len(group)} x {first['loss']} {first['impl']} {first['status']}: {names}\n{first['error']}\n"
        )
    return "\n".join(parts) or "nothing failed\n"


def failure_lines(groups: Sequence[Sequence[Line]]) -> list[str]:
    """Return a line for each group: how many, whose, the first case's name, the end of the message."""
    found = []
    for group in groups[:25]:
        first = group[0]
        message = " ".join(first["error"].split())[-150:]
        found.append(f"{len(group)} x {first['loss']} {first['impl']} {first['status']} {first['case']}: {message}")
    return found


def timed(figures: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """Return case -> contestant -> its line, of those that have a time."""
    cases: dict[str, dict[str, Line]] = collections.defaultdict(dict)
    for line in figures:
        if "ms" in line:
            cases[line["case"]][line["who"]] = line
    return cases


def figure_lines(figures: Sequence[Line]) -> list[str]:
    """Return a line for each figure, and one for each result that is wrong."""
    found = []
    for line in figures:
        if "ms" in line:
            share = f"{line['of_floor']:6.2f}" if "of_floor" in line else " " * 6
            memory = f"{line['peak_bytes'] / 1e9:7.2f} GB" if "peak_bytes" in line else ""
            found.append(
                f"{line['case']:44}{line['who']:18}{line['ms'][1]:9.3f} ms {share} of floor "
                f"{line.get('rate', 0):7.0f} {line.get('unit', ''):8}{line['host_us']:6.0f} us host {memory}"
            )
        elif "wrong" in line:
            found.append(f"{line['case']:44}WRONG {line['wrong']}")
        elif "failed" in line:
            found.append(f"{line['case']:44}{line['who']:18}{line['failed'][-120:]}")
        elif "first_ms" in line:
            found.append(f"{line['case']:44}{line['who']:18}{line['first_ms']:9.0f} ms first call")
    return found


def bar_lines(figures: Sequence[Line]) -> list[str]:
    """Return for each bar how many times as long that contestant takes as the faster of ours, and the bar."""
    found = []
    for case, lines in timed(figures).items():
        ours = [lines[name] for name in ("native", "triton") if name in lines]
        if not ours:
            continue
        best = min(ours, key=lambda line: line["ms"][1])
        for name, bar in best["bars"].items():
            if name in lines:
                ratio = lines[name]["ms"][1] / best["ms"][1]
                verdict = "met" if ratio >= bar else "missed"
                found.append(f"{case:44}{best['who']:8} {name:8} {ratio:6.2f}, bar {bar:.2f}: {verdict}")
    return found


def measured_rows(figures: Sequence[Line], date: str) -> list[str]:
    """Return rows for tlkernels/_core/choice.py: of each loss and dtype the faster implementation by size.

    A row stands for the sizes up to its own; the largest of a loss for everything above it too. That is a proposal: who
    takes it over sees whether the sizes measured are enough for it.
    """
    by_loss: dict[tuple[str, str, str], list[tuple[int, int, float, float]]] = collections.defaultdict(list)
    for lines in timed(figures).values():
        if "native" in lines and "triton" in lines:
            line = lines["native"]
            rows, columns = line["shape"][:2]
            key = line["loss"], line["architecture"], line["dtype"]
            by_loss[key].append((columns, rows, line["ms"][1], lines["triton"]["ms"][1]))
    found = []
    for (loss, architecture, dtype), sizes in by_loss.items():
        sizes.sort()
        for number, (columns, rows, native, triton) in enumerate(sizes):
            following = sizes[number + 1] if number + 1 < len(sizes) else None
            rows_limit = rows if following and following[0] == columns else None
            columns_limit = columns if following else None
            faster = "native" if native <= triton * (1 + TIES) else "triton"
            figures_text = f"{date}: native {native:.3g} ms, triton {triton:.3g} ms at {rows}x{columns}"
            found.append(
                f'Measured("{loss}", "{architecture}*", torch.{dtype}, {rows_limit}, {columns_limit}, "{faster}", '
                f'"{figures_text}"),'
            )
    return found


def write(out: Path, parts: Path, notes: Sequence[str], page: bool) -> str:
    """Write the files of the battery, and with `page` summary.txt too; return the page."""
    lines = outcomes(parts)
    groups = failure_groups(lines)
    with (out / "battery.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    (out / "failures.txt").write_text(failures_text(groups))
    if not page:
        return ""
    figures = read_lines(out / "figures.jsonl")
    date = next((str(line["date"])[:10] for line in figures if "date" in line), "")
    sections = {
        "rows for choice.py, a proposal": measured_rows(figures, date),
        "notes": notes,
        "figures": figure_lines(figures),
        "bars": bar_lines(figures),
        "battery": battery_table(lines),
        "failures": failure_lines(groups) or ["nothing failed"],
    }
    text = "\n\n".join("\n".join([f"== {title}", *body]) for title, body in sections.items()) + "\n"
    (out / "summary.txt").write_text(text)
    return text
