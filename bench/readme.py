"""`make readme`: write README's figures and picture, and bench/RESULTS.md, from the newest result file of a CPU."""

import io
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import report
from bench.report import newest, read
from tlkernels.bench.origin import ROOT
from tlkernels.bench.tables import Json, memory_share, name_of, of_group, shape_of, tables, verdicts

README, TABLES, PICTURE = ROOT / "README.md", ROOT / "bench/RESULTS.md", report.RESULTS / "cpu.svg"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
INK, FASTER, SLOWER, SAVED, USED = "#24292f", "#0969da", "#cf222e", "#1a7f37", "#d0d7de"


def rewrite(text: str, block: str) -> str:
    """Replace the lines between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected {BEGIN} and then {END}, each once")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


def _speed(case: Json) -> float:
    return float(case["speedup"]["eager"][1])


def _described(case: Json) -> str:
    return f"`{name_of(case)}`, {shape_of(case)}, {case['dtype']}"


def sentence(result: Json) -> str:
    """Return the best and the worst figure of the table and of the grid, and the range of memory."""
    table, grid = of_group(result, "table"), of_group(result, "grid")
    machine, version = result["machine"], result["versions"]["torch"].partition("+")[0]
    best, worst = max(table, key=_speed), min(table, key=_speed)
    parts = [
        f"Against eager PyTorch {version} on {machine['threads']} threads of {machine['cpu']}, forward and backward: "
        f"**{_speed(best):.2g}× at best** ({_described(best)}), "
        f"**{_speed(worst):.2g}× at worst** ({_described(worst)}; below 1 is slower), "
        f"{statistics.median(map(_speed, table)):.2g}× in the median of {len(table)} rows"
    ]
    if shares := [share for case in table if (share := memory_share(case)) is not None]:
        parts.append(
            f"; peak memory above the inputs is {min(shares):.2f} to {max(shares):.2f} of eager's, "
            f"{statistics.median(shares):.2f} in the median"
        )
    parts.append(".")
    if grid:
        slower = sum(verdicts(case)["eager"] == "missed" for case in grid)
        parts.append(
            f" Of {len(grid)} small calls of cross entropy {slower} are slower than eager by more than 5 %, "
            f"at worst {min(map(_speed, grid)):.2g}×."
        )
    parts.append(" [All figures](bench/RESULTS.md), where we lose first.")
    return "".join(parts)


def results_page(result: Json, name: str) -> str:
    return f"# Results\n\n`make readme` writes this page from `bench/results/{name}`.\n\n{tables(result)}\n"


def drawn(result: Json) -> list[Json]:
    """Return the rows of the picture: every float32 row but those in place."""
    rows = [case for case in of_group(result, "table") if case["dtype"] == "float32"]
    losses = [case["loss"] for case in rows]
    rows = [case for case in rows if not case["options"].get("inplace_grad")]
    return sorted(rows, key=lambda case: losses.index(case["loss"]))


def picture(result: Json) -> str:
    """Draw speed-up and memory as SVG. The same matplotlib gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = drawn(result)
    places = range(len(rows))
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style: Any = {"svg.hashsalt": "tlkernels", "font.size": 8, **ink}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(9.2, 0.8 + 0.19 * len(rows)), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(5, 3))
        for place, case in zip(places, rows, strict=True):
            low, middle, high = case["speedup"]["eager"]
            left.barh(place, middle - 1, left=1, height=0.7, color=FASTER if middle >= 1 else SLOWER)
            left.plot((low, high), (place, place), color=INK, linewidth=0.8)
            left.text(max(high, 1) * 1.07, place, f"{middle:.2g}×", va="center_baseline")
            share = memory_share(case)
            if share is None:
                right.text(0.01, place, "too small to measure", va="center_baseline", color="#6e7781")
                continue
            right.barh(place, 1, height=0.7, color=USED)
            right.barh(place, share, height=0.7, color=SAVED)
            right.text(max(share, 1) + 0.015, place, f"{share:.2f}", va="center_baseline")
        left.axvline(1, color=INK, linewidth=0.8)
        left.set_xscale("log")
        left.set_xlim(min(0.5, *(0.9 * case["speedup"]["eager"][0] for case in rows)), left.get_xlim()[1] * 1.4)
        left.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["½", "1", "2", "5", "10", "20", "50"])
        left.minorticks_off()
        left.set_yticks(places, [f"{name_of(case)}  {shape_of(case)}" for case in rows])
        left.invert_yaxis()
        left.set_title("Speed-up over eager PyTorch", fontsize=9, loc="left")
        right.set_title("Peak memory, share of eager's", fontsize=9, loc="left")
        right.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def pages(path: Path) -> dict[Path, str]:
    """Return the text of README and RESULTS.md for a result file."""
    result = read(path)
    return {
        README: rewrite(README.read_text(), sentence(result)),
        TABLES: results_page(result, path.name),
    }


def main() -> int:
    try:
        path = newest()
        written = {**pages(path), PICTURE: picture(read(path))}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for place, text in written.items():
        place.write_text(text)
        print(f"written: {place.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
