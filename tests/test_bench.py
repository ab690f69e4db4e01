"""The benchmarks' own logic: who runs when, what a ratio is, which bar is met, and what lands in the README."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, compare, contestants, gpu, losses, measure, memory, report


def case(**changes: Any) -> dict[str, Any]:
    """A case as a result file holds it: ours takes 1 s, eager 4, a copy 0.8."""
    found = {
        "id": "2048x32000-float32",
        "group": "table",
        "shape": [2048, 32000],
        "dtype": "float32",
        "inplace": False,
        "bytes": 2 * 4 * 2048 * 32000,
        "gradient_bytes": 4 * 2048 * 32000,
        "ours": "auto",
        "seconds": {"auto": [0.9, 1.0, 1.1], "eager": [3.9, 4.0, 4.1], "copy": [0.8, 0.8, 0.8]},
        "speedup": {"eager": [3.9, 4.0, 4.1], "copy": [0.75, 0.8, 0.85]},
        "bars": {"eager": 4.0, "copy": 1 / 1.2},
        "memory": {"auto": 4 * 2048 * 32000},
        "memory_bar": 4 * 2048 * 32000 + cases.MEMORY_SLACK,
        "error": {"auto": {"value": 0.0, "gradient": 2e-8}, "eager": {"value": 0.0, "gradient": 3e-8}},
    }
    return found | changes


def result(*found: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789",
        "dirty": False,
        "machine": {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2, "isa": "avx2", "load": 0.1},
        "versions": {"torch": "2.13.0"},
        "cases": list(found),
    }


class Recorder(contestants.Step):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.repeatable = False

    def __call__(self) -> None:
        self.log.append(self.name)


def test_every_case_has_a_name_of_its_own_and_each_dtype_a_bar() -> None:
    names = [case.id for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.dtype for case in cases.CASES if case.group == "grid"} == {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }
    assert all("eager" in case.bars and set(case.bars) <= set(case.contestants) for case in cases.CASES)


def test_bytes_are_one_read_and_one_write() -> None:
    plain = cases.Case("table", (4, 3, 5), torch.float32)
    assert plain.rows == 20
    assert plain.bytes == 2 * 4 * 60 + 8 * 20 + 4 * 20
    soft = cases.Case("table", (4, 3, 5), torch.bfloat16, probabilities=True)
    assert soft.bytes == 3 * 2 * 60 + 2 * 20
    assert cases.Case("inplace", (4, 3, 5), torch.float32).memory_bar == 16 * 20 + cases.MEMORY_SLACK


@pytest.mark.parametrize("case", [*losses.CASES, *gpu.CASES], ids=lambda case: case.id)
def test_every_contestant_of_a_small_case_runs_and_agrees(case: losses.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FAR", 8)
    work = case.make(tuple(min(size, 16) for size in case.shape), lambda tensor: tensor.to(case.dtype))
    eager = losses.WorkStep(work.eager, work.inputs).results()
    ours = losses.WorkStep(work.ours, work.inputs).results()
    assert len(ours) == 1 + len(work.inputs)
    for one, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
    losses.build("floor", work)()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rounds_are_balanced(count: int) -> None:
    log: list[str] = []
    names = [str(number) for number in range(count)]
    rounds = 2 * count
    samples = measure.interleave({name: Recorder(name, log) for name in names}, 0.0, least=rounds)
    log = log[2 * count :]  # each was warmed up twice
    orders = [log[start : start + count] for start in range(0, len(log), count)]
    assert all(len(times) == rounds for times in samples.values())
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * names)


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine is three times slower in the second round: the ratio of the medians would not be 2.
    samples = {"auto": [1.0, 3.0, 1.0], "eager": [2.0, 6.0, 2.0]}
    assert measure.speedups(samples, "auto") == {"eager": [2.0, 2.0, 2.0]}


def test_a_loss_that_overwrites_its_input_finds_it_whole_each_time() -> None:
    def overwriting(x: Tensor) -> Tensor:
        value = x.square().sum()
        x.data.zero_()
        return value

    x = torch.randn(5)
    work = losses.Work((x,), overwriting, overwriting, lambda: None, {"peer": overwriting}, overwriting=("peer",))
    step = losses.build("peer", work)
    assert isinstance(step, losses.WorkStep) and not step.repeatable
    for _ in range(2):
        torch.testing.assert_close(step.results()[0], x.double().square().sum())
    assert x.all()


def test_errors_see_a_wrong_gradient() -> None:
    one = cases.Case("table", (16, 5), torch.float32)
    data = one.data()
    right = contestants.LossStep(contestants.loss_of("eager", one), data)
    wrong = contestants.LossStep(lambda x, t: 1.01 * contestants.loss_of("eager", one)(x, t), data)
    found = measure.errors(one, data, {"right": right, "wrong": wrong})
    bar = measure.error_bar(found["right"]["gradient"], one.dtype)
    assert found["right"]["gradient"] <= bar < found["wrong"]["gradient"]
    assert found["wrong"]["gradient"] == pytest.approx(0.01, rel=1e-3)
    assert data.logits.grad is None and not data.logits.requires_grad


def test_in_place_steps_leave_the_logits_alone() -> None:
    one = cases.Case("inplace", (16, 5), torch.float64)
    data = one.data()

    def overwriting(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = contestants.loss_of("eager", one)(logits, target)
        logits.data.zero_()
        return loss

    step = contestants.InplaceStep(overwriting, data)
    for _ in range(2):
        step.prepare()
        step()
        assert step.gradient is not None
        step.release()
    assert torch.equal(data.logits, one.data().logits)


class Allocate(contestants.Step):
    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.kept: list[torch.Tensor] = []

    def __call__(self) -> None:
        buffer = torch.ones(64 << 20, dtype=torch.uint8)
        if self.keep:
            self.kept.append(buffer)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory_counts_what_is_freed_within_a_call_and_what_is_kept_between_calls() -> None:
    assert 0.95 < memory.peak(Allocate(keep=False)) / (64 << 20) < 1.2
    assert 2.95 < memory.peak(Allocate(keep=True)) / (64 << 20) < 3.2


def test_memory_is_asked_in_another_process() -> None:
    (one,) = (case for case in cases.CASES if case.id == "8192x1000-float32")
    assert memory.peaks(cases.Case("table", (32, 10), torch.float32), ("eager",)) == {}
    found = memory.peaks(one, ("eager",))
    assert not found or 2.9 < found["eager"] / one.gradient_bytes < 3.2


def test_an_unknown_contestant_is_named() -> None:
    one = cases.Case("table", (2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"expected one of .*eager.*got 'fast'"):
        contestants.build("fast", one, one.data())


@pytest.mark.parametrize(
    ("ratio", "word"), [([3.9, 4.0, 4.1], "met"), ([3.7, 3.9, 4.1], "unclear"), ([3.7, 3.8, 3.9], "missed")]
)
def test_a_bar_within_the_spread_is_neither_met_nor_missed(ratio: list[float], word: str) -> None:
    assert report.verdict(ratio, 4.0) == word


def test_memory_has_a_bar_too() -> None:
    assert report.verdicts(case()) == {"eager": "met", "copy": "unclear", "memory": "met"}
    assert report.verdicts(case(memory={"auto": 3 * 4 * 2048 * 32000}))["memory"] == "missed"
    assert "memory" not in report.verdicts(case(memory={}))


def test_the_table_shows_ratio_spread_bar_and_origin() -> None:
    text = report.table(result(case()))
    assert "commit 0123456789, cpu: a CPU, 2 threads, kernels for avx2; torch 2.13.0" in text
    assert "| 4 (3.9–4.1) ≥ 4 ✓ |" in text
    assert "| 1.25 (1.18–1.33) ≤ 1.2 ? |" in text
    assert "80%" in text
    assert "1.00 gradients ✓" in text


def test_a_busy_machine_is_told() -> None:
    quiet = result(case())
    assert "busy" not in report.table(quiet)
    assert "busy (load 3.0)" in report.table(quiet | {"machine": quiet["machine"] | {"load": 3.0}})


def test_the_grid_names_what_is_slower() -> None:
    bars = {"eager": 1 / 1.05}
    slow = case(id="slow", group="grid", bars=bars, speedup={"eager": [0.7, 0.8, 0.85]})
    fast = case(id="fast", group="grid", bars=bars, speedup={"eager": [1.9, 2.0, 2.1]})
    text = report.table(result(slow, fast))
    assert "Slower than eager by more than 5 %: 1, and 0" in text
    assert "`slow`: 1.25" in text and "`fast`" not in text


def test_rewrite_replaces_what_stands_between_the_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.rewrite(text, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.rewrite(once, "new") == once
    with pytest.raises(ValueError, match="bench:begin"):
        report.rewrite("no markers", "new")


def test_compare_flags_only_what_is_beyond_the_spread() -> None:
    old = result(case(speedup={"eager": [3.9, 4.0, 4.1]}))
    words = {}
    for middle in (3.0, 3.8, 5.0):
        new = result(case(speedup={"eager": [middle - 0.15, middle, middle + 0.15]}))
        ((*_, words[middle]),) = compare.changes(old, new)
    assert words == {3.0: "slower", 3.8: "", 5.0: "faster"}
    other = result(case()) | {"versions": {"torch": "2.14.0"}}
    assert compare.differences(old, other) == ["versions.torch: 2.13.0 -> 2.14.0"]
