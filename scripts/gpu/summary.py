"""The results of a run: files of JSON lines, and a summary, whose end is printed last."""

import collections
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.gpu import commands
from scripts.gpu.units import BEGUN, DIED, FAILED, PASSED, REFUSED, TIMEOUT, read_lines

Line = Mapping[str, Any]
COLUMNS = (PASSED, FAILED, DIED, TIMEOUT, REFUSED, BEGUN)
WRONG = (FAILED, DIED, TIMEOUT)
PAGE = 11_500
"""The number of characters that are printed; the caller sees no more of the output."""
OURS = ("native", "triton")
TIES = 0.03
"""Times that differ by less are a tie."""


def outcomes(parts: Path) -> list[Line]:
    """Return the last line of every case that has begun."""
    last: dict[tuple[Any, ...], Line] = {}
    for path in sorted(parts.glob("*.jsonl")):
        for line in read_lines(path):
            if "job" in line:  # ncu's run leaves a file of figures
                last[tuple(line[key] for key in ("kind", "loss", "impl", "shard", "job"))] = line
    return list(last.values())


def battery_table(lines: Sequence[Line]) -> list[str]:
    """Return a table: how many cases of each loss and implementation have each status."""
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        counts[line["loss"], line["impl"]][line["status"]] += 1
    if not lines:
        return ["NOTHING WAS RUN"]
    head = f"{'loss':22}{'impl':10}" + "".join(f"{name:>9}" for name in COLUMNS)
    rows = [
        f"{loss:22}{impl:10}" + "".join(f"{count[name]:9}" for name in COLUMNS)
        for (loss, impl), count in sorted(counts.items())
    ]
    return [head, *rows]


def _gist(error: str) -> str:
    """Return the last line of a message that names an error."""
    lines = error.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1]).strip()[-150:]


def failure_groups(lines: Sequence[Line]) -> list[list[Line]]:
    """Group the failures by message, ignoring numbers; the largest group is first."""
    groups: dict[tuple[str, ...], list[Line]] = collections.defaultdict(list)
    for line in lines:
        if line["status"] in WRONG:
            message = re.sub(r"\d+", "#", _gist(line["error"]))
            groups[line["loss"], line["impl"], line["status"], message].append(line)
    return sorted(groups.values(), key=len, reverse=True)


def failures_text(groups: Sequence[Sequence[Line]]) -> str:
    """Return a paragraph for each group, with one full message."""
    parts = []
    for group in groups:
        first = group[0]
        names = ", ".join(line["case"] for line in group[:6])
        parts.append(
            f"==== {len(group)} x {first['loss']} {first['impl']} {first['status']}: {names}\n{first['error']}\n"
        )
    return "\n".join(parts)


def failure_lines(groups: Sequence[Sequence[Line]]) -> list[str]:
    """Return a line for each group: its size, and the first case with its error."""
    lines = []
    for group in groups[:25]:
        first = group[0]
        who = f"{first['loss']} {first['impl']} {first['status']}"
        lines.append(f"{len(group)} x {who} {first['case']}: {_gist(first['error'])}")
    return lines or ["none"]


def timed(figures: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """Return case -> contestant -> its line, for all lines with a time."""
    cases: dict[str, dict[str, Line]] = collections.defaultdict(dict)
    for line in figures:
        if "ms" in line:
            cases[line["case"]][line["who"]] = line
    return cases


def figure_lines(figures: Sequence[Line]) -> list[str]:
    """Return a line for each case: ms, and in brackets the share of the floor and, for ours, the host's µs."""
    result = []
    for case, lines in timed(figures).items():
        parts = []
        for who, line in lines.items():
            share = f"{line['of_floor']:.2f}" if "of_floor" in line and who != "floor" else ""
            host = f"{line['host_us']:.0f} us" if who in OURS else ""
            inside = ", ".join(filter(None, (share, host)))
            parts.append(f"{who} {line['ms'][1]:.4g}" + (f" ({inside})" if inside else ""))
        result.append(f"{case}: {' | '.join(parts)}")
    return result


def trouble_lines(figures: Sequence[Line]) -> list[str]:
    """Return a line for each wrong result, and for each contestant that failed."""
    wrong = [f"{line['case']} WRONG {line['wrong']}" for line in figures if "wrong" in line]
    failed = [f"{line['case']} {line['who']}: {line['failed'][-120:]}" for line in figures if "failed" in line]
    return [*wrong, *failed]


def first_call_lines(figures: Sequence[Line]) -> list[str]:
    """Return a line for each case: the ms of the first call of each contestant that compiles."""
    cases: dict[str, list[str]] = collections.defaultdict(list)
    for line in figures:
        if "first_ms" in line:
            cases[line["case"]].append(f"{line['who']} {line['first_ms']:.3g}")
    return [f"{case}: {' | '.join(parts)}" for case, parts in cases.items()]


def cost(line: Line) -> float:
    """Return the ms that a call takes in a loop: those of the GPU, or of the host if it is slower."""
    return max(float(line["ms"][1]), float(line["host_us"]) / 1e3)


def bar_lines(figures: Sequence[Line]) -> list[str]:
    """Return for each bar the contestant's time divided by that of the faster of ours, and the bar.

    A floor is compared by the GPU's time alone.
    """
    result = []
    for case, lines in timed(figures).items():
        ours = [lines[name] for name in OURS if name in lines]
        if not ours:
            continue
        best = min(ours, key=cost)
        for name, bar in best["bars"].items():
            if name in lines:
                on_gpu = lines[name]["ms"][1] / best["ms"][1]
                ratio = on_gpu if name == "floor" else cost(lines[name]) / cost(best)
                verdict = "met" if ratio >= bar else "missed"
                result.append(f"{case:44}{best['who']:8} {name:8} {ratio:6.2f}, bar {bar:.2f}: {verdict}")
    return result


def measured_rows(figures: Sequence[Line]) -> list[str]:
    """Return rows for tlkernels/_core/choice.py: the faster implementation for each loss, dtype and size.

    A row applies to sizes up to its own; the largest one of a loss also to all above. The rows are a proposal: somebody
    has to judge whether enough sizes were measured.
    """
    head = next((line for line in figures if "date" in line), None)
    origin = f"{head['date'][:10]}, {head['machine']['device']}" if head else ""
    by_loss: dict[tuple[Any, ...], list[tuple[int, int, float, float]]] = collections.defaultdict(list)
    for lines in timed(figures).values():
        if all(name in lines for name in OURS):
            native, triton = (lines[name] for name in OURS)
            rows, columns = native["shape"][:2]
            key = native["loss"].partition("[")[0], native["architecture"], native["dtype"]
            by_loss[key].append((columns, rows, cost(native), cost(triton)))
    result = []
    for key, sizes in by_loss.items():
        sizes.sort()
        following = [*sizes[1:], None]
        result += [_measured_row(key, *pair, origin) for pair in zip(sizes, following, strict=True)]
    return result


def _measured_row(key: tuple[Any, ...], size: Any, following: Any, origin: str) -> str:
    loss, architecture, dtype = key
    columns, rows, native, triton = size
    faster = "native" if native <= triton * (1 + TIES) else "triton"
    figures = f"{origin}: {rows} x {columns} takes {native:.3g} ms, Triton {triton:.3g} ms"
    limits = f", rows={rows}" if following and following[0] == columns else ""
    limits += f", columns={columns}" if following else ""
    conditions = f'architecture="{architecture}", dtypes=(torch.{dtype},)'
    return f'Row(("{loss}",), "{faster}", MEASURED, "{figures}", {conditions}{limits}),'


def write(out: Path, parts: Path, notes: Sequence[str]) -> tuple[str, bool]:
    """Write the battery's files and summary.txt; return the summary, and whether something ran and nothing failed."""
    lines = outcomes(parts)
    groups = failure_groups(lines)
    with (out / "battery.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    (out / "failures.txt").write_text(failures_text(groups))
    figures = read_lines(out / "figures.jsonl")
    sections = {
        "first calls, ms": first_call_lines(figures),
        "rows for choice.py, a proposal": measured_rows(figures),
        "figures: ms (share of the floor, host)": figure_lines(figures),
        "commands": commands.tail(parts),
        "figures: wrong or failed": trouble_lines(figures),
        "bars: time of the contestant / time of the faster of ours": bar_lines(figures),
        "notes": notes,
        "battery": battery_table(lines),
        "failures": failure_lines(groups),
    }
    text = "\n\n".join("\n".join([f"== {title}", *body]) for title, body in sections.items()) + "\n"
    (out / "summary.txt").write_text(text)
    ran = bool(lines or figures or (parts / commands.LOG).exists())
    return text, ran and not groups and not any("wrong" in line for line in figures)
