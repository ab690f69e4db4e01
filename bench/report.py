"""The README's speed table, made from a result file: `python -m bench.report [RESULT]` rewrites it in place."""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MARKS = {"met": "✓", "missed": "✗", "unclear": "?"}
HEADER = """\
| logits | dtype | time | against eager | against torch.compile | time / `copy_` | of the roof | memory | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
LOSSES_HEADER = """\
| loss | size | dtype | time | against eager | against torch.compile | against others | time / floor | error |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
Json = Mapping[str, Any]
_COLUMNS = ("eager", "compile", "floor")  # the others share one


def verdict(ratio: Sequence[float], bar: float) -> str:
    """Of a ratio given by its quartiles: "met", "missed", or "unclear" where the bar lies within the spread."""
    if ratio[1] >= bar:
        return "met"
    return "missed" if ratio[2] < bar else "unclear"


def verdicts(case: Json) -> dict[str, str]:
    found = {name: verdict(case["speedup"][name], bar) for name, bar in case["bars"].items() if name in case["speedup"]}
    memory = case["memory"].get(case["ours"])
    return found if memory is None else found | {"memory": "met" if memory <= case["memory_bar"] else "missed"}


def _ratio(case: Json, name: str, inverse: bool = False) -> str:
    """How many times our speed, or the inverse: our time in units of that contestant's."""
    if name not in case["speedup"]:
        return "–"
    values, bar = case["speedup"][name], case["bars"].get(name)
    if inverse:
        values, bar = [1 / value for value in reversed(values)], bar and 1 / bar
    text = f"{values[1]:.3g} ({values[0]:.3g}–{values[2]:.3g})"
    return text if bar is None else f"{text} {'≤' if inverse else '≥'} {bar:.3g} {MARKS[verdicts(case)[name]]}"


def _roof(case: Json) -> str:
    """The bytes that have to move, at the rate at which `copy_` moved its own, as a share of our time."""
    if "copy" not in case["speedup"] or case["gradient_bytes"] < 1 << 20:
        return "–"
    rate = 2 * case["gradient_bytes"] / case["seconds"]["copy"][1]
    time = case["seconds"][case["ours"]][1]
    return f"{case['bytes'] / rate / time:.0%}, {case['bytes'] / time / 1e9:.3g} GB/s"


def _memory(case: Json) -> str:
    """Peak above the inputs, in gradients."""
    if case["ours"] not in case["memory"]:
        return "–"
    return f"{case['memory'][case['ours']] / case['gradient_bytes']:.2f} gradients {MARKS[verdicts(case)['memory']]}"


def _row(case: Json) -> str:
    cells = (
        "×".join(map(str, case["shape"])),
        case["dtype"] + (", in place" if case["inplace"] else ""),
        _time(case),
        _ratio(case, "eager", inverse=case["bars"].get("eager", 1) < 1),
        _ratio(case, "compile"),
        _ratio(case, "copy", inverse=True),
        _roof(case),
        _memory(case),
        _errors(case),
    )
    return f"| {' | '.join(cells)} |"


def _loss_row(case: Json) -> str:
    cells = (
        f"`{case['loss']}`",
        "×".join(map(str, case["shape"])),
        case["dtype"],
        _time(case),
        _ratio(case, "eager", inverse=case["bars"].get("eager", 1) < 1),
        _ratio(case, "compile"),
        ", ".join(f"{name} {_ratio(case, name)}" for name in case["speedup"] if name not in _COLUMNS) or "–",
        _ratio(case, "floor", inverse=True),
        _errors(case),
    )
    return f"| {' | '.join(cells)} |"


def _time(case: Json) -> str:
    seconds = case["seconds"][case["ours"]][1]
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _errors(case: Json) -> str:
    return " / ".join(f"{case['error'][name]['gradient']:.1e}" for name in (case["ours"], "eager"))


def _shape(case: Json) -> str:
    return str(case["id"]).removeprefix("grid-").partition("-")[0]


def _grid(cases: Sequence[Json]) -> str:
    ordered = sorted(cases, key=lambda case: case["speedup"]["eager"][1])
    missed = [case for case in ordered if verdicts(case)["eager"] == "missed"]
    unclear = [case for case in ordered if verdicts(case)["eager"] == "unclear"]
    median = statistics.median(case["speedup"]["eager"][1] for case in cases)
    head = (
        f"On a grid of {len(cases)} combinations of shape, dtype, reduction, target and smoothing, eager takes "
        f"{median:.3g} times as long (median). Slower than eager by more than 5 %: {len(missed)}, "
        f"and {len(unclear)} whose spread reaches that bar."
    )
    lines = []
    for shape in dict.fromkeys(_shape(case) for case in missed + unclear):
        here = [case for case in missed + unclear if _shape(case) == shape]
        worst = here[0]
        lines.append(f"- {shape}: {len(here)}, at worst `{worst['id']}`: {_ratio(worst, 'eager', inverse=True)}")
    return "\n".join([head, *lines])


def table(result: Json) -> str:
    """The whole block in markdown, with the machine and the commit that it was measured on."""
    machine = result["machine"]
    origin = (
        f"Measured on {result['date'][:10]}, commit {result['commit']}{' with local changes' * result['dirty']}, "
        f"{machine['device']}: {machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}."
    )
    if machine["load"] > machine["cores"] / 4:
        origin += f" **The machine was busy (load {machine['load']:.1f}): these figures say little.**"
    groups: dict[str, list[Json]] = {"rows": [], "losses": [], "grid": []}
    for case in result["cases"]:
        groups[case["group"] if case["group"] in groups else "rows"].append(case)
    grid = [case for case in groups["grid"] if "eager" in case["speedup"]]
    parts = [
        "\n".join([HEADER, *map(_row, groups["rows"])]) if groups["rows"] else "",
        _grid(grid) if grid else "",
        "\n".join([LOSSES_HEADER, *map(_loss_row, groups["losses"])]) if groups["losses"] else "",
    ]
    return "\n\n".join(part for part in (origin, *parts) if part)


def rewrite(text: str, block: str) -> str:
    """`text` with what stands between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, each once")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "result", nargs="?", type=Path, help="the name of a file in bench/results (default: the newest of a CPU)"
    )
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    arguments = parser.parse_args()
    # A file from elsewhere is refused: a figure in the README can be looked up in the repository.
    paths = [RESULTS / arguments.result.name] if arguments.result else list(RESULTS.glob("*-cpu.json"))
    if not paths or not paths[0].exists():
        parser.error(f"bench/results/{arguments.result.name if arguments.result else ''}: no such result")
    path, result = max(((path, json.loads(path.read_text())) for path in paths), key=lambda pair: str(pair[1]["date"]))
    block = f"{table(result)}\n\nAll figures: `bench/results/{path.name}`."
    arguments.readme.write_text(rewrite(arguments.readme.read_text(), block))


if __name__ == "__main__":
    main()
