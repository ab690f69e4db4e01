"""The benchmarks' own logic: cases, rounds, ratios, bars, errors, memory, busy machines and the tables."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, gpu, report
from bench import compare as compare_command
from tlkernels.bench import busy, compare, losses, measure, memory, tables, work
from tlkernels.bench.clock import Clock

WARM = Clock(torch.device("cpu"), cold=False)
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def case(**changes: Any) -> dict[str, Any]:
    """A case as in a result file: ours takes 1 s, eager 4, the floor 0.8."""
    found = {
        "id": "cross_entropy-2048x32000-float32",
        "group": "table",
        "loss": "cross_entropy",
        "shape": [2048, 32000],
        "dtype": "float32",
        "options": {},
        "ours": "auto",
        "absent": {},
        "seconds": {"auto": [0.9, 1.0, 1.1], "eager": [3.9, 4.0, 4.1], "floor": [0.8, 0.8, 0.8]},
        "speedup": {"eager": [3.9, 4.0, 4.1], "floor": [0.75, 0.8, 0.85]},
        "bars": {"eager": 4.0, "floor": 1 / 1.2, "memory": 300e6},
        "memory": {"auto": 200_000_000, "eager": 800_000_000},
        "error": {"auto": {"value": 0.0, "gradient": 2e-8}, "eager": {"value": 0.0, "gradient": 3e-8}},
        "wall": 2.0,
        "busy": 0.01,
    }
    return found | changes


def result(*found: dict[str, Any], **machine: Any) -> dict[str, Any]:
    described = {"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2, "isa": "avx2", "busy": 0.01}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789",
        "dirty": False,
        "whole": True,
        "machine": described | machine,
        "versions": {"torch": "2.13.0"},
        "cases": list(found),
    }


def plain(loss: work.Loss, *inputs: Tensor, **more: Any) -> work.Work:
    return work.Work(inputs, loss, loss, lambda: None, **more)


def compared(ours: work.Loss, eager: work.Loss, dtype: torch.dtype = torch.float32) -> work.Case:
    """A small case of two functions of logits and classes."""

    def make(shape: work.Shape, cast: work.Cast) -> work.Work:
        x, y = cast(work.normal(*shape)), work.classes_of(shape[1], shape[0])
        return plain(lambda x: eager(x, y), x)._replace(ours=lambda x, impl: ours(x, y))

    return work.Case("cross_entropy", (16, 5), dtype, make)


def named(case_id: str) -> work.Case:
    (found,) = (case for case in cases.CASES if case.id == case_id)
    return found


class Recorder(work.Step):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.repeatable = False

    def __call__(self) -> None:
        self.log.append(self.name)


def test_every_case_has_its_own_id_and_the_grid_has_every_dtype() -> None:
    names = [case.id for case in cases.CASES]
    assert len(set(names)) == len(names)
    grid = [case for case in cases.CASES if case.group == "grid"]
    assert {case.dtype for case in grid} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert all(case.bars.keys() == {"eager"} for case in grid)


@pytest.mark.parametrize("case", [*cases.CASES, *gpu.CASES], ids=lambda case: case.id)
def test_every_contestant_of_a_small_case_runs_and_agrees(case: work.Case) -> None:
    one = replace(case, shape=tuple(min(size, 16) for size in case.shape), peers=False, device="cpu").work()
    before = [tensor.clone() for tensor in one.inputs]
    ours, eager = (work.build(name, one) for name in ("auto", "eager"))
    assert isinstance(ours, work.LossStep) and isinstance(eager, work.LossStep)
    found = ours.results()
    assert len(found) == 1 + len(one.inputs)
    for mine, theirs in zip(found, eager.results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02)
    work.build("floor", one)()
    assert all(map(torch.equal, one.inputs, before))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # of this case alone


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rounds_are_balanced(count: int) -> None:
    log: list[str] = []
    names = [str(number) for number in range(count)]
    rounds = 2 * count
    samples = measure.interleave({name: Recorder(name, log) for name in names}, WARM, 0.0, least=rounds)
    log = log[2 * count :]  # each was called twice before
    orders = [log[start : start + count] for start in range(0, len(log), count)]
    assert all(len(times) == rounds for times in samples.values())
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * names)


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine is three times slower in the second round: the ratio of the medians would not be 2.
    samples = {"auto": [1.0, 3.0, 1.0], "eager": [2.0, 6.0, 2.0]}
    assert measure.speedups(samples, "auto") == {"eager": [2.0, 2.0, 2.0]}


def test_a_case_has_one_line_of_results() -> None:
    def make(shape: work.Shape, cast: work.Cast) -> work.Work:
        def refuse(x: Tensor) -> Tensor:
            raise NotImplementedError("peer: only on Sundays\nand so on")

        return losses.cross_entropy(shape, cast)._replace(peers={"peer": refuse})

    case = work.Case("cross_entropy", (16, 5), torch.float32, make, cold=False)
    info, times = measure.measure(case, "reference", ["native"], quick=True)
    assert info["seconds"].keys() == {"reference", "native", "eager", "floor"}
    assert info["speedup"].keys() == {"native", "eager", "floor"}
    assert info["absent"] == {"peer": "peer: only on Sundays"}
    assert info["error"].keys() == {"reference", "native", "eager"}
    assert info["first"].keys() == info["seconds"].keys() and info["served"] == "reference" and info["wrong"] == {}
    assert len(times) == info["rounds"] >= measure.LEAST_ROUNDS
    assert json.loads(json.dumps(info))["shape"] == [16, 5]


def test_a_loss_that_overwrites_its_input_gets_a_copy_each_time() -> None:
    def overwriting(x: Tensor) -> Tensor:
        value = x.square().sum()
        x.data.zero_()
        return value

    x = torch.randn(5)
    step = work.build("peer", plain(torch.sum, x, peers={"peer": overwriting}, fresh=("peer",)))
    assert isinstance(step, work.LossStep) and not step.repeatable
    for _ in range(2):
        torch.testing.assert_close(step.results()[0], x.double().square().sum())
    assert x.all()


def test_errors_see_a_wrong_gradient() -> None:
    case = compared(lambda x, y: 1.01 * F.cross_entropy(x, y), F.cross_entropy)
    found = measure.errors(case, ("auto", "eager"), draws=1)
    assert found["auto"]["gradient"] == pytest.approx(0.01, rel=1e-3)
    assert found["eager"]["gradient"] < 1e-6
    assert "gradient: relative error 1.00e-02" in measure.excess(case, found)["auto"]
    assert not measure.excess(case, {"auto": found["eager"], "eager": found["eager"]})


def test_ten_draws_decide_where_the_first_is_over() -> None:
    """Eager is exact in draw 0, which no other implementation can match."""

    def make(shape: work.Shape, cast: work.Cast) -> work.Work:
        x, y = cast(work.normal(*shape)), work.classes_of(shape[1], shape[0])
        exact = work._draw == 0 or x.dtype is torch.float64

        def noisy(x: Tensor, impl: str = "auto") -> Tensor:
            return F.cross_entropy(x, y) * (1 + 1e-5)

        return plain(noisy, x)._replace(eager=(lambda x: F.cross_entropy(x.double(), y)) if exact else noisy)

    case, names = work.Case("cross_entropy", (16, 5), torch.float32, make), ("auto", "eager")
    assert measure.excess(case, measure.errors(case, names, draws=1))
    assert not measure.excess(case, measure.checked_errors(case, names))


def test_the_error_has_a_bar_where_eager_lacks_the_dtype() -> None:
    case = compared(F.cross_entropy, F.cross_entropy, torch.float16)
    assert not measure.excess(case, {"auto": {"value": 4e-4, "gradient": 4e-4}})
    assert measure.excess(case, {"auto": {"value": 6e-4, "gradient": 4e-4}})


class Allocate(work.Step):
    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.kept: list[torch.Tensor] = []

    def __call__(self) -> None:
        buffer = torch.ones(64 << 20, dtype=torch.uint8)
        if self.keep:
            self.kept.append(buffer)


@LINUX
def test_peak_memory_counts_what_is_freed_within_a_call_and_what_is_kept_between_calls() -> None:
    assert 0.95 < memory.peak(Allocate(keep=False)) / (64 << 20) < 1.2
    assert 1.95 < memory.peak(Allocate(keep=True)) / (64 << 20) < 2.2


def test_memory_of_a_small_case_is_not_measured() -> None:
    assert memory.peaks(named("cross_entropy-32x10-float32"), ("eager",)) == {}


@LINUX
@pytest.mark.parametrize(
    ("case_id", "gradients"), [("cross_entropy-8192x1000-float32", 3), ("mse-4096x4096-float32", 1)]
)
def test_memory_is_measured_in_another_process(case_id: str, gradients: int) -> None:
    case = named(case_id)
    gradient = case.dtype.itemsize * case.shape[0] * case.shape[1]
    assert memory.peaks(case, ("eager",))["eager"] / gradient == pytest.approx(gradients, abs=0.2)


def test_an_unknown_contestant_is_named() -> None:
    with pytest.raises(ValueError, match=r"contestant: expected one of .*eager.*; got 'fast'"):
        work.build("fast", plain(F.mse_loss))


def _write_idle(seconds: float) -> None:
    half = int(seconds * os.sysconf("SC_CLK_TCK")) // 2
    busy.STAT.write_text(f"cpu  999 999 999 {half} {half} 0 999 999 0 0\ncpu0 1 2 3\n")


def test_a_watch_takes_off_our_own_work_and_our_childrens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "STAT", tmp_path / "stat")
    _write_idle(100.0)
    spin = "import time\nwhile time.process_time() < 1.0: pass"
    with busy.Watch() as watch:
        subprocess.run([sys.executable, "-c", spin], check=True)
        _write_idle(100.2)
    cores = os.cpu_count() or 1
    assert watch.share is not None
    assert watch.share * watch.wall * cores == pytest.approx(watch.wall * cores - 1.2, abs=0.15)


def test_without_proc_stat_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "STAT", tmp_path / "stat")
    with busy.Watch() as watch:
        pass
    assert watch.share is None
    assert busy.of_run([case(), case(busy=None)]) is None


def test_the_share_of_a_run_weighs_cases_by_their_time() -> None:
    assert busy.of_run([case(busy=0.1, wall=1.0), case(busy=0.0, wall=3.0)]) == 0.025
    assert busy.of_run([case(busy=-0.01)]) == 0.0


def test_a_case_is_measured_again_while_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.5, 0.2, 0.01, 0.0]

    class Watch(busy.Watch):
        def __exit__(self, *_: object) -> None:
            self.share = shares.pop(0)

    monkeypatch.setattr(busy, "Watch", Watch)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    _, watch = measure.watched({"auto": Recorder("auto", [])}, WARM, 0.0, 2)
    assert watch.share == 0.01 and shares == [0.0]


@pytest.mark.parametrize(
    ("ratio", "word"), [([3.9, 4.0, 4.1], "met"), ([3.7, 3.9, 4.1], "unclear"), ([3.7, 3.8, 3.9], "missed")]
)
def test_a_bar_within_the_spread_is_neither_met_nor_missed(ratio: list[float], word: str) -> None:
    assert tables.verdict(ratio, 4.0) == word


def test_memory_has_a_bar_too() -> None:
    assert tables.verdicts(case()) == {"eager": "met", "floor": "unclear", "memory": "met"}
    assert tables.verdicts(case(memory={"auto": 400_000_000, "eager": 800_000_000}))["memory"] == "missed"
    assert "memory" not in tables.verdicts(case(memory={}))


REFUSED = {
    "busy": (result(case(), busy=0.06), r"machine.busy: expected at most 5% .* got 6.0%"),
    "unknown": (result(case(), busy=None), r"machine.busy: expected .* got nothing"),
    "one busy case": (
        result(case(busy=0.3)),
        r"cross_entropy-2048x32000-float32: busy: expected at most 10%, got 30.0%",
    ),
    "dirty": (result(case()) | {"dirty": True}, r"dirty: expected the files of a commit, got local changes"),
    "part": (result(case()) | {"whole": False}, r"whole: expected every case, got a part"),
}


@pytest.mark.parametrize(("made_up", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_file_from_a_busy_machine_or_a_part_is_refused(made_up: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "made-up-cpu.json"
    path.write_text(json.dumps(made_up))
    with pytest.raises(ValueError, match=f"made-up-cpu.json: .*{message}"):
        report.read(path)


def test_a_whole_file_from_a_quiet_machine_is_read(tmp_path: Path) -> None:
    path = tmp_path / "made-up-cpu.json"
    path.write_text(json.dumps(result(case())))
    assert report.read(path)["commit"] == "0123456789"


def test_the_tables_show_speed_up_quartiles_bar_memory_and_origin() -> None:
    text = tables.tables(result(case()))
    assert "at commit 0123456789 on cpu: a CPU, 2 threads, kernels for avx2; torch 2.13.0" in text
    assert "Other processes used 1.0% of the cores" in text
    assert "| 4 (3.9–4.1) ≥ 4 ✓ |" in text
    assert "| 0.8 (0.75–0.85) ≥ 0.833 ? |" in text
    assert "| 0.25, 200 MB ✓ |" in text


def test_the_tables_show_the_roof_what_is_wrong_and_who_did_not_run_once() -> None:
    near = case(roof=0.5, limit="memory", absent={"peer": "needs a GPU", "other": "raises"})
    wrong = case(wrong={"auto": "gradient: too far"}, absent={"peer": "needs a GPU"})
    ceilings = {"copy": 3e10, "matmul": {"float32": 1.5e11}, "call": 2e-5}
    text = tables.tables(result(near, wrong) | {"ceilings": ceilings})
    assert "a copy 30 GB/s (read and written), matrix products 150 GFLOP/s in float32, an empty call 20 µs." in text
    assert "| 50% (memory) |" in text
    assert "- `cross_entropy-2048x32000-float32`, auto: gradient: too far" in text
    assert "- peer, 2 cases: needs a GPU\n- other, `cross_entropy-2048x32000-float32`: raises" in text


def test_the_tables_show_growth_with_its_interval_and_bound() -> None:
    scale = {"loss": "info_nce", "contestant": "auto", "quantity": "memory", "dim": "N", "expected": 1.0}
    scale |= {"points": [[64, 1.0], [128, 2.0], [256, 4.0]], "exponent": [0.9, 1.0, 1.104]}
    text = tables.tables(result(case()) | {"scales": [scale]})
    assert "| `info_nce` | auto | memory | N from 64 to 256 | 1.00 (0.90 to 1.10) | 1 |" in text


def test_the_first_list_is_where_we_lose_the_worst_first() -> None:
    slow = case(id="slow", bars={}, speedup={"eager": [0.7, 0.8, 0.9]})
    slower = case(id="slower", bars={}, speedup={"compile": [0.4, 0.5, 0.6], "eager": [2.0, 2.0, 2.0]})
    missed = case(id="missed", bars={"eager": 5.0})
    text = tables.tables(result(case(), missed, slow, slower))
    text = text[text.index("Where we lose") : text.index("Every loss")]
    lines = [line for line in text.splitlines() if line.startswith("-")]
    assert [line.partition(":")[0] for line in lines] == [
        "- `slower`",
        "- `slow`",
        "- `cross_entropy-2048x32000-float32`",
        "- `missed`",
    ]
    assert lines[0].endswith("0.5 (0.4–0.6) over torch.compile") and lines[3].endswith("4 (3.9–4.1) ≥ 5 ✗ over eager")


def test_the_grid_counts_what_is_slower() -> None:
    bars = {"eager": 1 / 1.05}
    slow = case(id="slow", group="grid", bars=bars, speedup={"eager": [0.7, 0.8, 0.85]})
    fast = case(id="fast", group="grid", bars=bars, speedup={"eager": [1.9, 2.0, 2.1]})
    text = tables.tables(result(slow, fast))
    assert "1 are slower than eager by more than 5 %, and 0 may be" in text
    assert "the median speed-up is 1.4, the least 0.8." in text


def test_compare_flags_only_what_is_beyond_the_spread() -> None:
    old = result(case(speedup={"eager": [3.9, 4.0, 4.1]}))
    words = {}
    for middle in (3.0, 3.8, 5.0):
        new = result(case(speedup={"eager": [middle - 0.15, middle, middle + 0.15]}))
        (_, _, _, _, words[middle]), (*_, memory_word) = compare.changes(old, new)
        assert memory_word == ""
    assert words == {3.0: "slower", 3.8: "", 5.0: "faster"}
    other = result(case(), busy=0.02) | {"versions": {"torch": "2.14.0"}}
    assert compare.differences(old, other) == ["versions.torch: 2.13.0 -> 2.14.0"]


@pytest.mark.parametrize(
    ("changed", "code", "word"),
    [
        ({"speedup": {"eager": [2.9, 3.0, 3.1]}}, 1, "slower"),
        ({"speedup": {"eager": [3.85, 3.9, 3.95]}}, 0, ""),  # within the quartiles
        ({"speedup": {"eager": [4.11, 4.15, 4.2]}}, 0, ""),  # beyond the quartiles, by less than 5 %
        ({"memory": {"auto": 250_000_000, "eager": 800_000_000}}, 1, "more memory"),
        ({"memory": {"auto": 100_000_000, "eager": 800_000_000}}, 0, "less memory"),
    ],
)
def test_compare_exits_with_1_where_something_became_worse(
    changed: dict[str, Any],
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, one in zip(files, (case(speedup={"eager": [3.9, 4.0, 4.1]}), case(**changed)), strict=True):
        file.write_text(json.dumps(result(one)))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, files)])
    assert compare_command.main() == code
    words = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("cross")]
    assert [found for found in words if found in ("slower", "more memory", "less memory")] == ([word] if word else [])


def test_the_parts_are_told_on_one_screen() -> None:
    run = subprocess.run([sys.executable, "-m", "bench"], capture_output=True, text=True, check=True)
    assert all(part in run.stdout for part in ("make bench", "report", "make readme", "compare", "_resources", "gpu"))
    assert len(run.stdout.splitlines()) < 24
