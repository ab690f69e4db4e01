"""The HTML page of a profile: its data, and the page in Chromium."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from browser import Browser, written
from torch import nn

import tlkernels as tlk
from tlkernels import html
from tlkernels.bench import ceilings
from tlkernels.html.profile import page
from tlkernels.profiling import profile, replay, report

STEP, REST, EAGER, NATIVE = 0.1, 0.06, 0.04, 0.01  # seconds: of the step with eager's loss, and without a loss
NAMES = (
    "data", "host to device", "forward of the trunk", "head and loss forward", "head and loss backward",
    "backward of the trunk", "optimiser", "communication", "idle: the GPU waits for the host", "other",
)  # fmt: skip
SHARES = (0.05, 0.01, 0.2, 0.15, 0.25, 0.2, 0.1, 0.01, 0.02, 0.01)
LOGITS = {"rows": 8192, "classes": 32000, "dtype": "torch.bfloat16", "stored": True, "bytes": 524288000}
TRACES = (
    "return document.getElementById(arguments[0]).data.map(t => ({name: t.name, x: t.x, y: t.y, error: t.error_y}))"
)


def around(middle: float) -> list[float]:
    return [0.98 * middle, middle, 1.02 * middle]


def way(seconds: float, speedup: float | None, error: tuple[float, float] | None, wrong: str | None) -> dict[str, Any]:
    return {
        "seconds": seconds / 2,
        "step_seconds": seconds,
        "speedup": speedup,
        "peak_bytes": 300_000_000,
        "error": error and {"value": error[0], "gradient": error[1]},
        "wrong": wrong,
    }


def unit_way(seconds: float, speedup: float | None, error: float, wrong: str | None = None) -> dict[str, Any]:
    parts = {"hidden": error, "weight": 2 * error, "bias": 3 * error}
    found = way(seconds, speedup, (error, 3 * error), wrong)
    return found | {"error": found["error"] | parts, "expected": None if wrong else STEP / (STEP - 0.05 + seconds)}


def head_and_loss() -> dict[str, Any]:
    """Return a head and its loss, whose reference is wrong."""
    return {
        "loss": "F.cross_entropy", "head": "lm_head", "auto": "native", "why_not": None,
        "swap": "tlkernels.linear_cross_entropy(hidden, model.lm_head.weight, target, linear_bias=model.lm_head.bias)",
        "unit": {
            "name": "lm_head and F.cross_entropy", "own": "eager", "baseline": "eager", "calls": 2,
            "shape": [[8192, 512], [32000, 512], [32000]], "dtype": "bfloat16", "logits": LOGITS,
            "ways": {
                "eager": unit_way(0.05, 1.0, 1e-3),
                "native": unit_way(0.02, 2.5, 2e-4) | {"peak_bytes": 100_000_000},
                "reference": unit_way(0.06, None, 0.5, "error of the value 5.0e-01, more than 1.0e-02"),
            },
            "refused": {"triton": "supports GPU tensors only; got one on cpu"},
        },
    }  # fmt: skip


def result() -> dict[str, Any]:
    """Return a profile on a GPU: a loss in two calls, an implementation that is wrong, one not compared."""
    return {
        "kind": "profile",
        "date": "2026-11-28T03:24:04+00:00",
        "machine": {
            "packages": {"tlkernels": "0.1.0", "torch": "2.13.0", "accelerate": None},
            "python": "3.11.7", "processor": "A processor", "threads": 8, "cuda": "A GPU", "isa": "avx512",
            "isas": ["avx512"], "extension": {}, "commit": "0123456789ab",
        },
        "device": "A GPU",
        "step": {"seconds": around(STEP), "rounds": 8},
        "rate": {"samples": 640.0, "tokens": 163840.0},
        "starvation": {"seconds": 0.005, "share": 0.05, "by": "DataLoader"},
        "phases": [
            {"name": name, "seconds": 0.11 * share, "share": share, "peak_bytes": 1_000_000_000 + 100_000_000 * place}
            for place, (name, share) in enumerate(zip(NAMES, SHARES, strict=True))
        ],
        "traced_step": {"seconds": 0.11, "steps": 4},
        "overhead": 1.1,
        "flops": 5_000_000_000_000,
        "flops_by_dtype": {"bfloat16": 4_000_000_000_000, "float32": 1_000_000_000_000},
        "ceiling": {"bfloat16": 4e14, "float32": 5e13},
        "mfu": 0.3,
        "losses": [
            {
                "name": "F.cross_entropy", "own": "eager", "baseline": "eager", "calls": 2, "shape": [[8192, 32000]],
                "dtype": "bfloat16",
                "logits": LOGITS,
                "ways": {
                    "eager": way(EAGER, 1.0, (1e-3, 2e-3), None),
                    "native": way(NATIVE, 4.0, (3e-4, 4e-4), None),
                    "triton": way(0.02, None, (0.5, float("nan")), "error of the value 5.0e-01, more than 1.0e-02"),
                },
                "refused": {"reference": "out of memory"},
            }
        ],
        "head_and_loss": [head_and_loss()],
        "loss_seconds": EAGER,
        "loss_share": EAGER / STEP,
        "bound": STEP / REST,
        "logits": {**LOGITS, "share_of_peak": 0.276},
        "peak_bytes": 1_900_000_000,
        "step_speedups": {
            "as it is": {"seconds": around(STEP), "speedup": [1.0, 1.0, 1.0], "expected": 1.0, "rounds": 8},
            "native": {"seconds": around(0.072), "speedup": around(1.39), "expected": 1 / 0.7, "rounds": 8},
        },
        "baseline": "as it is",
        "notes": ["No steps with triton: error of the value 5.0e-01, more than 1.0e-02."],
    }  # fmt: skip


def bare() -> dict[str, Any]:
    """Return a profile in which everything is missing that may be."""
    shown = result()
    shown["machine"] |= {"cuda": None, "isa": None, "commit": None}
    shown |= {"device": "cpu", "flops": None, "flops_by_dtype": {}, "ceiling": {}, "mfu": None, "losses": []}
    shown["head_and_loss"] = []
    shown |= {"loss_seconds": None, "loss_share": None, "bound": None, "logits": None, "peak_bytes": None}
    shown |= {"step_speedups": {}, "baseline": None, "notes": [], "rate": {"samples": None, "tokens": None}}
    shown["starvation"] |= {"seconds": None, "share": None}
    for row in shown["phases"]:
        row["peak_bytes"] = None
    return shown


def half_bare() -> dict[str, Any]:
    """Return a profile whose losses were not compared, and of which the loop's own did not run alone; no ceiling."""
    shown = result()
    (loss,) = shown["losses"]
    why = "not compared: float64 needs 12.6 GB of free memory"
    loss |= {"ways": {"native": way(NATIVE, None, None, why)}, "refused": {"eager": "out of memory"}}
    loss["ways"]["native"]["peak_bytes"] = None
    shown |= {"loss_seconds": None, "loss_share": None, "bound": None, "step_speedups": {}, "baseline": None}
    shown |= {"ceiling": {}, "mfu": None}  # no memory for the products that measure it
    shown["logits"]["share_of_peak"] = None
    shown["head_and_loss"] = [
        {
            "loss": "F.cross_entropy",
            "head": None,
            "auto": None,
            "swap": None,
            "unit": None,
            "why_not": "the head is odd",
        }
    ]
    return shown


# ---- the data


class Net(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head, self.inside = nn.Sequential(nn.Embedding(50, 16)), nn.Linear(16, 50), inside

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(ids)
        if self.inside:
            return tlk.linear_cross_entropy(hidden, self.head.weight, ids, linear_bias=self.head.bias)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, inside: bool, micro: int) -> dict[str, Any]:
    """Return what profile.json says of a small loop. The ceiling is a number, since measuring it takes seconds."""
    monkeypatch.setattr(replay, "SECONDS", 0.0)
    monkeypatch.setattr(replay, "peak_bytes", lambda run: (run(), 1000)[1])  # without collecting all garbage
    monkeypatch.setattr(ceilings, "matmul", lambda device, dtype: 5e9)
    net, ids = Net(inside), torch.arange(24).view(4, 6)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    with profile(net, steps=3, folder=folder) as p:
        while not p.done:
            for _ in range(micro):
                net(ids).div(micro).backward()
            optimiser.step()
            optimiser.zero_grad()
            p.step()
    parsed: dict[str, Any] = json.loads((folder / "profile.json").read_text())
    return parsed


def keys(data: Any) -> Any:
    """Return the names of the format: keys of dictionaries, without those that are the data's own."""
    own = {"ways", "refused", "step_speedups", "flops_by_dtype", "ceiling", "packages", "extension"}
    if isinstance(data, dict):
        return {key: keys(next(iter(value.values()), None) if key in own else value) for key, value in data.items()}
    return keys(data[0]) if isinstance(data, list) and data and isinstance(data[0], dict) else None


@pytest.mark.parametrize(
    ("inside", "micro"), [(False, 2), pytest.param(True, 1, marks=pytest.mark.full)], ids=["eager", "linear"]
)
def test_a_real_profile_has_the_format_that_the_page_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool, micro: int
) -> None:
    shown = measured(tmp_path, monkeypatch, inside, micro)
    expected = keys(result())
    expected["flops_by_dtype"] = expected["ceiling"] = None
    if inside:
        expected["head_and_loss"] = None  # a loss that has its head inside
    assert keys(shown) == expected
    data = page(shown, None).data
    assert {key: data[key] for key in shown} == shown
    assert data["sentences"] and all(sentence in report.text(shown) for sentence in data["sentences"])
    html.write(tmp_path / "report.html", shown)
    (loss,), steps = shown["losses"], shown["step_speedups"]
    times = {name: one["step_seconds"] for name, one in loss["ways"].items()}
    base = times[loss["baseline"]]
    assert loss["calls"] == micro and set(steps) >= {"as it is", "eager" if inside else "native"}
    if data["amdahl"]:  # a loss of some microseconds may take as long as the step
        own = {"as it is": loss["own"]}
        for name, kernel in data["amdahl"]["kernels"].items():
            assert kernel == pytest.approx(base / times[own.get(name, name)])


@pytest.mark.parametrize("own", ["eager", "native"])
def test_amdahls_bound_and_the_speed_up_of_the_loss_are_over_the_baseline(own: str) -> None:
    shown = result()
    if own == "native":  # the loop has our loss, and eager's is compared with
        steps = shown["step_speedups"]
        expected = STEP / (REST + NATIVE)
        shown["step_speedups"] = {
            "as it is": {**steps["native"], "expected": expected},
            "eager": {**steps["as it is"], "expected": 1.0},
        }
        shown |= {"bound": (REST + NATIVE) / REST, "baseline": "eager"}
    found = page(shown, None).data["amdahl"]
    assert found["bound"] == pytest.approx(STEP / REST)
    kernels = {"as it is": 1.0, "native": 4.0} if own == "eager" else {"as it is": 4.0, "eager": 1.0}
    assert found["kernels"] == pytest.approx(kernels)
    assert page({**shown, "step_speedups": {}}, None).data["amdahl"] == {"bound": shown["bound"], "kernels": {}}
    assert page({**shown, "bound": None}, None).data["amdahl"] is None


def test_the_head_says_what_was_measured_and_leaves_out_what_is_not_known() -> None:
    facts = dict(page(result(), None).facts)
    assert facts["Machine"] == "A GPU; A processor, 8 threads, kernels for avx512"
    assert facts["Versions"] == "python 3.11.7, tlkernels 0.1.0, torch 2.13.0"
    assert facts["Measured"] == "2026-11-28 03:24 UTC, commit 0123456789ab"
    assert facts["Timeline"].startswith("trace.json.gz, beside profile.json. Open it at ui.perfetto.dev")
    assert facts["How"].startswith("8 steps without") and "4 run under torch.profiler" in facts["How"]
    assert "Compared with" not in facts
    facts = dict(page(bare(), result()).facts)
    assert facts["Machine"] == "A processor, 8 threads, no compiled kernels"
    assert facts["Measured"].endswith("UTC, no commit")
    assert facts["Compared with"] == "2026-11-28 03:24 UTC, commit 0123456789ab"


def earlier() -> dict[str, Any]:
    before = copy.deepcopy(result())
    before["step"]["seconds"] = around(0.09)
    before["step_speedups"]["native"]["speedup"] = around(1.2)
    before["peak_bytes"] = 1_850_000_000
    before["phases"][0]["name"] = "forward without gradient"
    before["machine"]["packages"]["torch"] = "2.12.0"
    before["machine"]["commit"] = "ba9876543210"
    return before


def test_what_changed_beyond_the_quartiles_has_a_word() -> None:
    found = page(result(), earlier()).data["before"]
    assert [(row["what"], row["word"], row["worse"]) for row in found["changes"]] == [
        ("time of the step", "slower", True),
        ("speed-up of the step by native over as it is", "faster", False),
        ("peak memory", "", False),  # 3 % more
    ]
    assert found["differences"] == ["torch: 2.12.0 -> 2.13.0"]
    assert page(bare(), result()).data["before"]["differences"] == ["device: A GPU -> cpu", "isa: avx512 -> none"]
    phases = {row["name"]: (row["then"], row["now"]) for row in found["phases"]}
    assert phases["data"] == (None, pytest.approx(0.0055))
    assert phases["forward without gradient"] == (pytest.approx(0.0055), None)
    back = page(earlier(), result()).data["before"]["changes"]
    assert [(row["word"], row["worse"]) for row in back] == [("faster", False), ("slower", True), ("", False)]
    wide = {**earlier(), "step": {"seconds": [0.08, 0.09, 0.11], "rounds": 8}, "peak_bytes": 1_000_000_000}
    changes = page(result(), wide).data["before"]["changes"]
    assert [changes[place]["word"] for place in (0, 2)] == ["", "more memory"]
    other = page({**result(), "baseline": "eager"}, earlier()).data["before"]["changes"]
    assert [row["what"] for row in other] == ["time of the step", "peak memory"]
    assert [row["what"] for row in page(bare(), earlier()).data["before"]["changes"]] == ["time of the step"]


def test_a_profile_is_not_compared_with_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="before: expected a result of kind 'profile', got 'bench'"):
        html.write(tmp_path / "report.html", result(), {"kind": "bench"})


# ---- the page


def traces(page: Browser, figure: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.js(TRACES, figure)
    return found


def rows(page: Browser, table: str) -> list[list[str]]:
    """Return the texts of a table; of a cell the lines are parted by a bar."""
    cell = "[...cell.childNodes].map(node => node.textContent).filter(text => text).join(' | ')"
    script = (
        f"return [...document.querySelectorAll('#{table} tbody tr')].map(row => [...row.cells].map(cell => {cell}))"
    )
    found: list[list[str]] = page.js(script)
    return [[text.replace("\u00a0", " ") for text in row] for row in found]


def test_a_page_of_a_profile_opens_without_network_or_errors_and_answers(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result(), earlier()))
    figures = [text.replace("\u00a0", " ") for text in chromium.texts("#figures dd")]
    assert figures == [
        "100 ms (98.0 ms – 102 ms in half of 8 steps)",
        "164 k (padding counts)",
        "640",
        "5.00 ms, 5 % of the step (DataLoader)",
    ]
    assert chromium.texts("#answer li")[0] == (
        "The loss is 40 % of the step: a loss that costs nothing would make it at most 1.67x as fast."
    )
    assert [row[0] for row in rows(chromium, "phase-table")] == list(NAMES)
    chromium.click("phase-table-seconds")
    chromium.click("phase-table-seconds")
    assert rows(chromium, "phase-table")[0][:3] == ["head and loss backward", "27.5 ms", "25 %"]
    assert chromium.js("return location.hash") == "#phase-table=seconds%21descending"


@pytest.mark.full
def test_the_bar_of_phases_adds_up_to_the_traced_step(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result()))
    bars = traces(chromium, "phase-bar")
    assert [bar["name"] for bar in bars] == list(NAMES)
    assert sum(bar["x"][0] for bar in bars) == pytest.approx(0.11)
    assert chromium.js("return document.getElementById('phase-bar').layout.barmode") == "stack"
    note = chromium.texts("#phases .note")[0].replace("\u00a0", " ")
    assert note == "Means of 4 steps under the profiler, which take 110 ms: 1.10 times as long as steps without it."


@pytest.mark.full
def test_use_of_the_hardware_is_against_the_measured_ceilings(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result()))
    text = chromium.texts("#mfu")[0].replace("\u00a0", " ")
    assert text == "30 % of the ceiling: 5.00 TFLOP in 100 ms are 50.0 TFLOP/s."
    assert rows(chromium, "hardware-table") == [
        ["bfloat16", "4.00 TFLOP", "400 TFLOP/s", "10.0 ms", "10 %"],
        ["float32", "1.00 TFLOP", "50.0 TFLOP/s", "20.0 ms", "20 %"],
    ]


@pytest.mark.full
@pytest.mark.parametrize("stored", [True, False])
def test_memory_has_a_bar_for_each_phase_and_the_logits(chromium: Browser, tmp_path: Path, stored: bool) -> None:
    shown = result()
    shown["logits"] |= {"stored": stored, "share_of_peak": 0.276 if stored else None}
    chromium.open(written(tmp_path, shown))
    bars = traces(chromium, "memory-bars")
    name = "the logits" if stored else "the logits, if they were stored"
    assert [bar["name"] for bar in bars] == [*NAMES, name]
    assert [bar["x"] for bar in bars] == [[row["peak_bytes"]] for row in shown["phases"]] + [[524288000]]
    text = chromium.texts("#logits")[0].replace("\u00a0", " ")
    took = "take 524 MB, 28 % of the peak." if stored else "are not stored; they would take 524 MB."
    assert text.startswith(f"The logits (8192×32000 in bfloat16) {took}")
    peak = chromium.texts("#peak")[0].replace("\u00a0", " ")
    assert peak == "The peak of the memory of tensors on the GPU is 1.90 GB, first reached in the phase “other”."


@pytest.mark.full
def test_the_table_of_a_loss_has_no_speed_up_of_what_is_wrong(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result()))
    eager = ("eager: 1.0e-3", "eager: 2.0e-3")
    assert rows(chromium, "loss-0") == [
        ["eager | in the loop now", "20.0 ms", "40.0 ms", "1.00×", "300 MB", "1.0e-3", "2.0e-3"],
        ["native", "5.00 ms", "10.0 ms", "4.00×", "300 MB", f"3.0e-4 | {eager[0]}", f"4.0e-4 | {eager[1]}"],
        ["triton", "10.0 ms", "20.0 ms", "wrong", "300 MB", f"5.0e-1 | {eager[0]}", f"not a number | {eager[1]}"],
    ]
    assert chromium.texts("#reasons-0 li") == [
        "triton: error of the value 5.0e-01, more than 1.0e-02",
        "no reference: out of memory",
    ]
    shown = result()
    (loss,) = shown["losses"]
    loss["own"] = "native"  # the present one is ours, and eager is compared with
    chromium.open(written(tmp_path, shown))
    assert [row[3:5] for row in rows(chromium, "loss-0")] == [["0.250×", "1.00×"], ["1.00×", "4.00×"], ["wrong"] * 2]
    assert chromium.texts("#loss-0 td.slower") == ["0.250×"]
    loss["own"] = "triton"
    chromium.open(written(tmp_path, shown))
    assert [row[3] for row in rows(chromium, "loss-0")] == ["triton is wrong", "triton is wrong", "wrong"]


@pytest.mark.full
def test_a_head_and_its_loss_are_a_table_after_the_losses(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result()))
    theirs = [f"eager: {error}" for error in ("1.0e-3", "1.0e-3", "2.0e-3", "3.0e-3")]
    ours = [f"{own} | {other}" for own, other in zip(("2.0e-4", "2.0e-4", "4.0e-4", "6.0e-4"), theirs, strict=True)]
    eager, native, reference = rows(chromium, "loss-1")
    errors = ["1.0e-3", "1.0e-3", "2.0e-3", "3.0e-3"]
    assert eager == ["eager | in the loop now", "25.0 ms", "50.0 ms", "1.00×", "1.00×", "300 MB", *errors]
    assert native == ["native", "10.0 ms", "20.0 ms", "2.50×", "1.43×", "100 MB", *ours]
    assert reference[3:5] == ["wrong", "unknown"]
    answers = [text.replace("\u00a0", " ") for text in chromium.texts("#answer li")]
    assert (
        "Head and loss together take 50 ms of the step. linear_cross_entropy takes 20 ms and 0.20 GB less: the step "
        "would be 1.43x as fast (expected from these times, not measured in steps)."
    ) in answers
    assert any("loss = tlkernels.linear_cross_entropy(hidden, model.lm_head.weight" in text for text in answers)
    chromium.open(written(tmp_path, half_bare()))
    why = "linear_cross_entropy in place of the head and F.cross_entropy was not tried: the head is odd."
    assert chromium.texts("#losses .note")[-1] == why and why in chromium.texts("#answer li")
    assert chromium.texts("#loss-1") == []


@pytest.mark.full
def test_measured_steps_are_drawn_beside_amdahls_law_and_bound(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, result()))
    law, bound, own, native = traces(chromium, "amdahl")
    assert bound["y"] == pytest.approx([STEP / REST] * 2)
    assert bound["name"] == "a loss that costs nothing: 1.67× over the loss as it is"
    for kernel, step in zip(law["x"], law["y"], strict=True):
        assert step == pytest.approx(STEP / (REST + EAGER / kernel))
    assert (own["x"], own["y"]) == ([1], [1])
    assert (native["x"], native["y"]) == ([pytest.approx(4)], [1.39])
    assert native["error"]["array"] == [pytest.approx(0.02 * 1.39)]
    assert rows(chromium, "steps-table") == [
        ["the loss as it is", "100 ms | 98.0 ms – 102 ms", "1.00×", "compared with", "1.00×"],
        ["native", "72.0 ms | 70.6 ms – 73.4 ms", "4.00×", "1.39× | 1.36× – 1.42×", "1.43×"],
    ]
    chromium.open(written(tmp_path, {**result(), "step_speedups": {}, "baseline": "eager"}))  # the loop ended early
    names = [trace["name"] for trace in traces(chromium, "amdahl")]
    assert names == ["Amdahl’s law", "a loss that costs nothing: 1.67×"], "over the loss as it is"
    assert chromium.texts("#better .note") == ["No steps were run with another implementation of the loss."]


@pytest.mark.full
def test_changes_for_the_worse_come_first(chromium: Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, earlier(), result()))
    assert chromium.texts("#sum") == ["Of 3 figures in both profiles 1 became worse and 1 better."]
    found = rows(chromium, "changes")
    assert [(row[0], row[-1]) for row in found] == [
        ("speed-up of the step by native over as it is", "slower"),
        ("time of the step", "faster"),
        ("peak memory", "none"),
    ]
    assert found[1][1:4] == ["100 ms | 98.0 ms – 102 ms", "90.0 ms | 88.2 ms – 91.8 ms", "0.900"]
    assert ["data", "5.50 ms", "no such phase", "unknown"] in rows(chromium, "changes-phases")


@pytest.mark.full
@pytest.mark.parametrize("make", [bare, half_bare])
def test_what_is_missing_is_said_in_words(chromium: Browser, tmp_path: Path, make: Any) -> None:
    chromium.open(written(tmp_path, make(), make()))
    text = chromium.js("return document.body.innerText")
    assert re.findall(r"\b(?:null|nan|undefined|infinity|object)\b", text, re.IGNORECASE) == []
    assert "Amdahl’s bound is not known: no loss was measured alone in the way that the loop takes." in text
    if make is half_bare:
        found = ["5.00 ms", "10.0 ms", "not compared", "not measured", "not compared", "not compared"]
        assert rows(chromium, "loss-0") == [["native", *found]]
        assert chromium.texts("#reasons-0 li") == [
            "native: not compared: float64 needs 12.6 GB of free memory",
            "no eager: out of memory",
        ]
        text = chromium.texts("#mfu")[0].replace("\u00a0", " ")
        assert text == "An unknown share of the ceiling: 5.00 TFLOP in 100 ms are 50.0 TFLOP/s."
        assert rows(chromium, "hardware-table")[0] == ["bfloat16", "4.00 TFLOP", "not measured", "unknown", "unknown"]
        assert "an unknown share of the peak" in chromium.texts("#logits")[0]
        return
    assert [text.partition(":")[0] for text in chromium.texts("#figures dd")[1:]] == ["unknown"] * 3
    assert chromium.texts("#mfu") == ["Unknown: no operation of a matrix product was counted in the step."]
    assert chromium.texts("#peak") == ["Peak memory cannot be measured on this machine."]
    assert chromium.texts("#memory-bars, #logits") == []
    assert {row[3] for row in rows(chromium, "phase-table")} == {"not measured"}
    assert chromium.texts("#losses .note") == ["No loss was seen in the steps, so none was measured alone."]
    assert chromium.texts("#answer li") == ["No loss was seen, so this is unknown."]


@pytest.mark.full
def test_text_of_a_profile_never_runs_or_becomes_markup(chromium: Browser, tmp_path: Path) -> None:
    shown, hostile = result(), '<img src=x onerror="hit=1"><b>bold</b></script><script>hit=1</script>'
    (loss,), steps = shown["losses"], shown["step_speedups"]
    (said,) = shown["head_and_loss"]
    said |= {"loss": hostile, "swap": hostile, "head": hostile}
    said["unit"] |= {"name": hostile, "refused": {hostile: hostile}}
    shown["head_and_loss"].append({**said, "unit": None, "why_not": hostile})
    shown["machine"]["processor"] = shown["phases"][0]["name"] = shown["starvation"]["by"] = hostile
    shown["notes"], loss["name"], loss["dtype"], loss["refused"] = [hostile], hostile, hostile, {hostile: hostile}
    loss["ways"][hostile] = way(0.02, None, (1.0, 1.0), hostile)
    steps[hostile] = steps["native"]
    shown["logits"]["dtype"] = hostile
    shown["flops_by_dtype"], shown["ceiling"] = {hostile: 1}, {hostile: 1.0}
    chromium.open(written(tmp_path, shown, shown))
    assert chromium.js("return [typeof hit, document.querySelectorAll('img, section b b, li b').length]") == [
        "undefined",
        0,
    ]
    for place in (
        "#notes",
        "#reasons-0",
        "#phase-table",
        "#loss-0",
        "#steps-table",
        "#logits",
        "#hardware-table",
        "#reasons-1",
        "#answer",
    ):
        assert hostile in chromium.texts(place)[0], place
    for figure in ("amdahl", "memory-bars"):
        assert any("<b>bold</b>" in text for text in chromium.texts(f"#{figure} text")), figure


@pytest.mark.full
@pytest.mark.parametrize("make", [result, bare, half_bare])
@pytest.mark.parametrize("width", [480, 1200])
def test_no_page_of_a_profile_is_wider_than_its_window(
    chromium: Browser, tmp_path: Path, make: Any, width: int
) -> None:
    chromium.open(written(tmp_path, make(), earlier()), width=width, dark=True)
    assert chromium.js("return document.documentElement.scrollWidth") <= width
    for plot in chromium.driver.find_elements("css selector", ".plot"):
        assert plot.size["width"] <= width - 24
    assert chromium.js("return document.getElementById('phase-bar').layout.paper_bgcolor") == "#14171c"
