"""The run on a lent GPU machine (scripts/gpu): its plan, its kit, its summary, and a dry run on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import battery as cases
import harness
import pytest
import torch
from cross_entropy_cases import COLUMN_STRATEGIES, ROW_STRATEGIES

from bench import gpu
from scripts.gpu import __main__ as run
from scripts.gpu import battery, commands, kit, summary, units
from scripts.gpu.session import Session
from scripts.gpu.units import Pool, Unit
from tlkernels._core import choice, native, triton

ROOT = Path(__file__).parents[1]
KIT_PYTHON = ROOT / "build" / "gpu-kit" / "venv" / "bin" / "python"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make a plan think that it is on a GPU machine."""
    monkeypatch.setattr(battery, "FAKE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.setattr(triton, "available", lambda: True)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda": "13.0 for sm_90a"})


@pytest.fixture
def plan(on_a_gpu):
    return battery.plan()


def test_every_loss_is_planned_by_every_implementation(plan):
    """A loss that uses another loss's kernels is planned too."""
    planned = {(unit.loss, unit.impl) for unit in plan}
    for kind in ("smoke", "battery"):
        assert {(unit.loss, unit.impl) for unit in plan if unit.kind == kind} == planned
    assert {loss for loss, impl in planned if impl == "triton"} == set(cases.LOSSES)
    with_cuda = harness.CUDA_LOSSES & set(cases.LOSSES)
    assert {loss for loss, impl in planned if impl == "native"} == with_cuda | {
        "nt_xent",
        "sup_con",
        "topk_distillation",
        "linear_topk_distillation",
    }


def test_units_have_every_case_once(plan):
    for loss in ("cross_entropy", "nt_xent"):
        for impl in ("native", "triton"):
            shards = [unit for unit in plan if (unit.kind, unit.loss, unit.impl) == ("battery", loss, impl)]
            names = [name for unit in shards for name, _ in battery.jobs(unit)]
            assert len(names) == len(set(names))
            assert {case.id for case in cases.LOSSES[loss].cases} <= set(names)
            assert any(name.startswith("graph: ") for name in names)
            assert ("2**31" in names) == (loss == "cross_entropy")
            assert any(name.startswith("cluster: ") for name in names) == ((loss, impl) == ("cross_entropy", "native"))


def test_a_smoke_run_of_all_comes_first(plan):
    kinds = [unit.kind for unit in plan]
    assert kinds == sorted(kinds, reverse=True)
    names = [name for name, _ in battery.jobs(plan[0])]
    assert len(names) == len({case.dtype for case in cases.LOSSES[plan[0].loss].cases}) + len(cases.CHECKS)


def test_the_lists_of_kernels_are_those_of_the_sources():
    table = (ROOT / "csrc" / "cross_entropy" / "cuda_table.h").read_text()
    names = re.findall(r'^    \{"([a-z ]+)", Place::', table, re.MULTILINE)
    assert {*ROW_STRATEGIES, *COLUMN_STRATEGIES} == {*names}
    ways = {name.partition(":")[2] for case in gpu.CASES for name in case.contestants if ":" in name}
    ways = {name.rstrip(" 0123456789") for name in ways}
    assert ways <= set(names)
    text = "\n".join(
        path.read_text() for pattern in ("csrc/**/*.cu*", "tlkernels/**/*.py") for path in ROOT.glob(pattern)
    )
    for name in run.NCU_KERNELS:
        word = name.lstrip("^")
        assert re.search(rf"(__global__[^;{{]*?\b\w*{word}\w*\(|^def {word}\()", text, re.MULTILINE), name


def test_a_job_that_fails_is_told_from_one_that_loses_the_gpu(monkeypatch):
    monkeypatch.setattr(battery, "FAKE", True)
    monkeypatch.setattr(battery, "DEVICE", "cpu")

    def failing(error):
        def job():
            raise error

        return battery.attempt(job)[0]

    assert failing(AssertionError("loss: error 2, allowed 1")) == units.FAILED
    assert failing(NotImplementedError("impl")) == units.REFUSED
    assert failing(RuntimeError("CUDA error: an illegal memory access was encountered")) == units.DIED
    assert failing(RuntimeError("CUDA error: out of memory")) == units.FAILED
    assert battery.attempt(lambda: None) == (units.PASSED, "")


# A battery of four jobs: the second one ends the process, and the third one reports that the GPU is lost.
SCRIPT = """
import json, os, sys
unit = json.loads(sys.argv[1])
with open(unit["lines"], "a", buffering=1) as file:
    for job in range(unit["skip"], 4):
        line = {**unit, "job": job, "case": f"case {job}", "error": ""}
        file.write(json.dumps({**line, "status": "begun"}) + "\\n")
        if job == 1:
            print("Fatal Python error: Segmentation fault", flush=True)
            os.abort()
        file.write(json.dumps({**line, "status": "died" if job == 2 else "passed"}) + "\\n")
        if job == 2:
            os._exit(77)
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    made = Session(tmp_path / "out", 60.0, fake=True)
    monkeypatch.setattr(made, "python", lambda *arguments: [sys.executable, str(script), arguments[-1]])
    yield made
    shutil.rmtree(made.parts)


def test_a_unit_goes_on_behind_a_case_that_ends_its_process(session):
    pool = Pool(session, [Unit("battery", "mse", "triton")], 1, 50.0)
    pool.wait()
    lines = {line["case"]: line for line in summary.outcomes(session.parts)}
    assert [lines[f"case {job}"]["status"] for job in range(4)] == ["passed", "died", "died", "passed"]
    assert "Segmentation fault" in lines["case 1"]["error"]
    text, right = summary.write(session.out, session.parts, [])
    assert not right
    assert "mse                   triton" in text
    assert "1 x mse triton died case 1: Fatal Python error: Segmentation fault" in text


def test_failures_that_differ_in_numbers_alone_are_told_together():
    messages = [f"Traceback\n  assert\nAssertionError: loss: error {n}.5, allowed 1" for n in range(3)] + [
        "RuntimeError: x"
    ]
    lines = [
        {"loss": "mse", "impl": "native", "status": "failed", "case": f"case {n}", "error": message}
        for n, message in enumerate(messages)
    ]
    assert summary.failure_lines(summary.failure_groups(lines)) == [
        "3 x mse native failed case 0: AssertionError: loss: error 0.5, allowed 1",
        "1 x mse native failed case 3: RuntimeError: x",
    ]


def test_a_process_that_does_not_start_is_told(session, monkeypatch):
    monkeypatch.setattr(session, "python", lambda *arguments: [sys.executable, "-c", "raise SystemExit('no torch')"])
    Pool(session, [Unit("smoke", "mse", "triton")], 1, 50.0).wait()
    (line,) = summary.outcomes(session.parts)
    assert (line["status"], line["case"]) == ("died", "(start)")
    assert "no torch" in line["error"]


def test_phases_share_the_budget():
    assert run.ends(555, list(run.PHASES)) == {"battery": 215, "commands": 420, "figures": 525, "ncu": 555}
    assert run.ends(310, ["commands", "figures"]) == {"commands": 205, "figures": 310}


def test_a_command_that_fails_fails_the_run(session, monkeypatch):
    words = {"doctor": [sys.executable, "-c", "raise SystemExit(3)"], "memory": [sys.executable, "-c", "print('fits')"]}
    monkeypatch.setattr(commands, "_words", lambda session: words)
    commands.run(session, 50.0)
    assert session.findings == 1
    assert [note[9:] for note in session.notes] == ["doctor: status 3; SEE commands.zip", "memory: status 0"]
    assert "fits" in zipfile.ZipFile(session.out / "commands.zip").read("commands.txt").decode()


def test_a_command_without_its_packages_is_not_run(session, monkeypatch):
    monkeypatch.setattr(commands, "_words", lambda session: {"bench": ["never"]})
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    commands.run(session, 50.0)
    assert session.notes[0].endswith("bench: NOT RUN, without plotly")


def test_nothing_is_begun_when_the_time_is_over(session):
    pool = Pool(session, [Unit("smoke", "mse", "triton")], 2, 1.0)
    pool.wait()
    assert len(pool.waiting) == 1
    assert not summary.write(session.out, session.parts, [])[1]
    assert "NOTHING WAS RUN" in (session.out / "summary.txt").read_text()


def figure(who, ms, shape=(32, 1000), **more):
    line = {"case": f"cross_entropy-{shape[0]}x{shape[1]}", "loss": "cross_entropy", "shape": shape, "who": who}
    line |= {"dtype": "bfloat16", "architecture": "sm_90", "ms": [ms, ms, ms], "host_us": 9.0, "bars": {"floor": 0.9}}
    return {**line, **more}


FIGURES = [
    {"date": "2026-01-02T00:00:00+00:00", "machine": {"device": "NVIDIA H200"}},
    figure("floor", 1.0), figure("native", 1.1, of_floor=0.91), figure("triton", 1.3, of_floor=0.77),
    figure("native", 3.0, (64, 1000)), figure("triton", 2.0, (64, 1000)),
    figure("native", 5.0, (8, 9000)), figure("triton", 9.0, (8, 9000)),
    {"case": "cross_entropy-8x9000", "who": "errors", "wrong": "native, gradient: relative error 1"},
    {"case": "cross_entropy-8x9000", "who": "liger", "failed": "OutOfMemoryError: CUDA out of memory"},
]  # fmt: skip


def test_figures_are_told():
    assert summary.figure_lines(FIGURES)[0] == (
        "cross_entropy-32x1000: floor 1 | native 1.1 (0.91, 9 us) | triton 1.3 (0.77, 9 us)"
    )
    (bar,) = summary.bar_lines(FIGURES)
    assert re.fullmatch(r"cross_entropy-32x1000 +native +floor +0.91, bar 0.90: met", bar)
    wrong, failed = summary.trouble_lines(FIGURES)
    assert "WRONG native" in wrong
    assert "liger: OutOfMemoryError" in failed


def test_a_wrong_figure_fails_the_run(tmp_path):
    parts, out = tmp_path / "parts", tmp_path / "out"
    for folder in (parts, out):
        folder.mkdir()
    passed = {"kind": "smoke", "loss": "mse", "impl": "triton", "shard": 0, "job": 0, "status": "passed", "error": ""}
    (parts / "smoke.jsonl").write_text(json.dumps(passed) + '\n{"cut off')
    for figures, right in ((FIGURES[:3], True), (FIGURES, False)):
        (out / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))
        assert summary.write(out, parts, ["a note"])[1] == right


def test_rows_for_choice_can_be_taken_over(monkeypatch, request):
    """The proposed rows are Python code, and decide as the measurements do."""
    text = "\n".join(summary.measured_rows(FIGURES))
    rows = eval(f"[{text}]", {"Row": choice.Row, "MEASURED": choice.MEASURED, "torch": torch})
    assert rows[0].figures == "2026-01-02, NVIDIA H200: 32 x 1000 takes 1.1 ms, Triton 1.3 ms"
    monkeypatch.setattr(choice, "TABLE", tuple(rows))
    monkeypatch.setattr(triton, "architecture", lambda device: "sm_90")
    choice._rows_at.cache_clear()
    request.addfinalizer(choice._rows_at.cache_clear)
    for shape, faster in (
        ((32, 500), "native"),
        ((33, 1000), "triton"),
        ((10**6, 90), "triton"),
        ((9, 10**5), "native"),
    ):
        assert choice.faster("cross_entropy", torch.empty(shape, dtype=torch.bfloat16, device="meta"))[0] == faster


@pytest.fixture
def tree(tmp_path):
    """A checkout with sources and an extension built for this Python."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "tlkernels").mkdir()
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    built = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.write_bytes(b"code" * 1000)
    kit.pack(built, tmp_path / kit.KIT, preset=0, root=tmp_path)
    return tmp_path


def test_the_kit_comes_out_as_it_went_in(tree):
    kit.unpack(root=tree)
    (placed,) = (tree / "tlkernels").iterdir()
    assert placed.read_bytes() == b"code" * 1000


def test_the_kit_of_other_sources_is_not_taken(tree):
    (tree / "csrc" / "a.cu").write_text("another kernel")
    with pytest.raises(kit.KitError, match=r"built from other C\+\+ sources"):
        kit.unpack(root=tree)
    assert not list((tree / "tlkernels").iterdir())


def test_the_kit_for_another_machine_is_not_taken(tree):
    with pytest.raises(kit.KitError, match="built for sm_90a, the card is sm_80"):
        kit.unpack("sm_80", root=tree)
    information = tree / kit.KIT / kit.INFO
    information.write_text(information.read_text().replace("_C.", "_C.other-"))
    with pytest.raises(kit.KitError, match="expected an extension for this Python"):
        kit.unpack(root=tree)
    information.unlink()
    with pytest.raises(kit.KitError, match=r"kit.json: not found; `make gpu-kit` makes it"):
        kit.unpack(root=tree)


def travelling(folder):
    """Copy the files that go to a lent machine: tracked ones, untracked ones that git does not ignore, and the kit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    carried = [path.relative_to(ROOT) for name in (kit.KIT, kit.WHEELS) for path in (ROOT / name).glob("*")]
    for name in [*names, *carried]:
        if (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dry_run(python, checkout, out):
    """Run the script in a copy of the checkout, with a case that ends its process; return its output."""
    variables = {"GPU_BUDGET": "1200", "GPU_FAKE": "1", "GPU_FAKE_CRASH": "nt_xent-native-0"}
    variables["GPU_COMMIT"] = "0123456789"  # a copy has no repository
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [str(python), "-m", "scripts.gpu", str(out)]
    process = subprocess.run(
        command, cwd=checkout, env={**kept, **variables}, capture_output=True, text=True, timeout=1300
    )
    assert process.returncode == 1, process.stdout + process.stderr  # something died
    return process.stdout


@pytest.mark.full
@pytest.mark.parametrize("which", ["this Python", "the kit's"])
def test_dry_run(which, tmp_path):
    """The whole run on a CPU: in a copy of the files that go to a lent machine, from a packed extension."""
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    python = sys.executable
    assert travelling(checkout) < 64 << 20
    if which == "this Python":
        if not native.available():
            pytest.skip(native.why_not())
        kit.pack(Path(native.file()), checkout / kit.KIT, preset=0, root=checkout)
    else:
        python = KIT_PYTHON
        if not python.exists():
            pytest.skip("no kit: `make gpu-kit` makes one")
        if json.loads((ROOT / kit.KIT / kit.INFO).read_text())["sources"] != kit.sources():
            pytest.skip("the kit is of other C++ sources: `make gpu-kit` makes it anew")
    printed = dry_run(python, checkout, out)

    assert {path.name for path in out.iterdir()} == {
        "summary.txt", "env.txt", "commands.zip", "battery.jsonl", "failures.txt", "sanitizer.txt",
        "figures.jsonl", "ncu.txt",
    }  # fmt: skip
    assert printed.endswith((out / "summary.txt").read_text()[-1000:] + "\n")
    assert "extension: the kit's" in printed
    files = zipfile.ZipFile(out / "commands.zip").namelist()
    assert {"commands.txt", "bench/result.json", "bench/report.html", "profile/report.html"} <= set(files)
    for name in ("doctor", "memory", "profile", "bench"):
        assert f"{name}: status 0" in printed

    lines = units.read_lines(out / "battery.jsonl")
    ran = {(line["loss"], line["impl"]) for line in lines}
    assert ran == {(loss, impl) for loss in cases.LOSSES for impl in ("native", "reference")}
    at_crash = [line for line in lines if (line["kind"], line["loss"], line["impl"]) == ("smoke", "nt_xent", "native")]
    statuses = [line["status"] for line in sorted(at_crash, key=lambda line: line["job"])]
    assert statuses[:2] == ["died", "passed"]  # the crash is reported, and the next job runs
    assert {line["status"] for line in lines} <= {"passed", "died", "begun"}

    head, *figures = units.read_lines(out / "figures.jsonl")
    assert head["dry"]
    assert head["commit"] == "0123456789"
    assert head["versions"]["torch"]
    measured = summary.timed(figures)
    assert {"floor", "native", "reference", "eager"} <= set(next(iter(measured.values())))
    assert not [line for line in figures if "wrong" in line]


@pytest.mark.full
def test_the_packed_extension_loads():
    """It loads in the lent machine's Python and registers the CUDA ops."""
    if not KIT_PYTHON.exists() or not list((ROOT / kit.KIT).glob("_C*.so.xz")):
        pytest.skip("no kit: `make gpu-kit` makes one")
    code = (
        "import lzma, pathlib, sys, tempfile, torch, importlib.util\n"
        "packed, = pathlib.Path(sys.argv[1]).glob('_C*.so.xz')\n"
        "path = pathlib.Path(tempfile.mkdtemp(), packed.name[:-3])\n"
        "path.write_bytes(lzma.decompress(packed.read_bytes()))\n"
        "spec = importlib.util.spec_from_file_location('tlkernels._C', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.build_info()['cuda'])\n"
        "print(sum('CUDA' in torch._C._dispatch_dump(name) for name in torch._C._dispatch_get_all_op_names()\n"
        "          if name.startswith('tlkernels::')))\n"
    )
    command = [str(KIT_PYTHON), "-c", code, str(ROOT / kit.KIT)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    cuda, ops = process.stdout.split("\n")[:2]
    assert cuda.endswith("for sm_90a")
    assert int(ops) >= 20


def test_figures_go_on_behind_what_has_ended_their_process(tmp_path):
    """Neither a contestant with a line nor the one that was running is measured again."""
    path = tmp_path / "figures.jsonl"
    case = gpu._tiny(next(case for case in gpu.CASES if case.loss == "mse"))
    path.write_text(json.dumps({"case": case.id, "who": "floor", "ms": [1.0, 2.0, 3.0]}) + "\n")
    path.with_suffix(".running").write_text(json.dumps({"case": case.id, "who": "reference"}))
    bench = gpu.Bench(path, 60.0, dry=True, first=False)
    bench.measure(case)
    bench.close()
    lines = {line["who"]: line for line in units.read_lines(path)}
    assert lines["floor"]["ms"] == [1.0, 2.0, 3.0]
    assert lines["reference"]["failed"] == "ended the process"
    assert lines["eager"]["of_floor"] == pytest.approx(2.0 / lines["eager"]["ms"][1])
    assert {path.name for path in tmp_path.iterdir()} == {"figures.jsonl"}


def test_what_loses_the_gpu_ends_the_process(tmp_path, monkeypatch):
    def leave(status):
        raise SystemExit(status)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(os, "_exit", leave)
    path = tmp_path / "figures.jsonl"
    bench = gpu.Bench(path, 60.0, dry=True, first=False)
    with pytest.raises(SystemExit, match="77"):
        bench.attempt(gpu.CASES[0], "native", lost)
    (line,) = units.read_lines(path)
    assert line["who"] == "native"
    assert "illegal memory access" in line["failed"]
    assert not bench.running.exists()
