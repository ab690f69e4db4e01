"""Running out of memory: the micro-batches are halved and the batch stays. And the memory that a step takes."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from train_cases import (
    made_rows,
    metrics,
    quick,
    same_bits,
    task_of,
    tiny_causal_model,
    tiny_config,
    tiny_contrast_config,
    tiny_distill_config,
    tiny_model,
    weights,
    write_csv,
    write_pairs,
    write_texts,
)

from tlkernels import cli
from tlkernels.train import RunError, memory, pipeline, teacher_cache
from tlkernels.train.batches import whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.encoders import Encoders
from tlkernels.train.loop import gradient
from tlkernels.train.memory import halved, out_of_memory, peak_bytes
from tlkernels.train.task import OURS
from tlkernels.train.tasks.classify import Classify
from tlkernels.train.tasks.distill import Distill

pytestmark = pytest.mark.usefixtures(quick.__name__)
ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts longer than 9 words have no label, so micro-batches of similar lengths differ in labelled rows."""
    rows = [row | {"label": "" if len(row["text"].split()) > 9 else row["label"]} for row in made_rows(60)]
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The teacher and its texts."""
    folder = tmp_path_factory.mktemp("texts")
    return tiny_causal_model(folder / "llama", dropout=0.1), write_texts(folder / "texts.jsonl", 60)


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    return model, write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 60)


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 MiB")


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        raise no_memory()


@pytest.fixture
def memory_for(monkeypatch):
    """Let the loss of a training fail for more than so many rows; return the list of the sizes that it gets."""

    def limit(most, error=no_memory, task=Classify):
        sizes, real = [], task.__init__

        def init(self, config, accelerator):
            real(self, config, accelerator)
            ours = self.losses[OURS]

            def loss(features, *rest):
                if features.grad_fn is not None:  # in a training
                    sizes.append(len(features))
                    if len(features) > most:
                        raise error()
                return ours(features, *rest)

            self.losses[OURS] = loss

        monkeypatch.setattr(task, "__init__", init)
        return sizes

    return limit


def first_gradient(task, micro_batch):
    """Return the loss and the gradients of the first step, and the size of the micro-batches after it."""
    network, progress = task.start().train(), Progress(micro_batch=micro_batch)
    batch = whole_batch(0, task.batch_size, len(task.rows["train"]), task.config.run.seed)
    loss = gradient(task, network, batch, 0, progress)
    return {"loss": loss} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, progress


# ---- a step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_the_gradient_is_that_of_a_step_with_the_smaller_micro_batches(
    command, where, call, model, data, texts, tmp_path, capsys
):
    """Call 3 is the last micro-batch: the gradients of two others are there when it fails."""
    task = task_of(
        tiny_config(tmp_path, model, data) if command == "finetune" else tiny_distill_config(tmp_path, *texts)
    )
    ours, calls = task.losses[OURS], 0
    right, _ = first_gradient(task, 2)
    other, _ = first_gradient(task, 3)
    assert not same_bits(right, other), "the gradients do not tell the sizes of micro-batches apart"

    def loss(features, *rest):
        nonlocal calls
        calls += 1
        if calls != call:
            return ours(features, *rest)
        if where == "forward":
            raise no_memory()
        return FailsInBackward.apply(features * ours(features, *rest)).sum()

    task.losses[OURS] = loss
    capsys.readouterr()
    found, progress = first_gradient(task, 3)
    assert same_bits(found, right)
    assert progress.micro_batch == 2
    assert calls == call + 4
    assert capsys.readouterr().out == "step 1: out of memory; going on with micro-batches of 2\n"


# The three micro-batches make calls 1 to 3 in the first pass of GradCache and 4 to 6 in the second.
@pytest.mark.parametrize(("where", "call"), [
    ("forward", 3), ("loss", 0), ("backward", 6),
    *(pytest.param(where, call, marks=pytest.mark.full)
      for where, call in (("forward", 1), ("forward", 4), ("forward", 6), ("backward", 4))),
])  # fmt: skip
def test_the_gradient_of_a_joint_loss_is_that_of_the_smaller_micro_batches(
    where, call, pairs, tmp_path, monkeypatch, capsys
):
    """In the second pass there are gradients of earlier micro-batches, which must not stay."""
    task = task_of(tiny_contrast_config(tmp_path, *pairs))
    right, _ = first_gradient(task, 2)
    other, _ = first_gradient(task, 3)
    assert not same_bits(right, other), "the gradients do not tell the sizes of micro-batches apart"
    real, calls, failures, ours = Encoders.forward, [], [], task.losses[OURS]

    def forward(self, rows, loss):
        calls.append(len(rows["ids"]))
        if len(calls) == call and where == "forward":
            raise no_memory()
        if len(calls) == call and where == "backward":
            return FailsInBackward.apply(real(self, rows, loss))
        return real(self, rows, loss)

    def loss(*arguments):
        if where == "loss" and not failures:
            failures.append("the loss")
            raise no_memory()
        return ours(*arguments)

    monkeypatch.setattr(Encoders, "forward", forward)
    task.losses[OURS] = loss
    capsys.readouterr()
    found, progress = first_gradient(task, 3)
    assert same_bits(found, right)
    assert progress.micro_batch == 2
    first = call or 3
    assert calls == [3, 3, 2, 3, 3, 2][:first] + 8 * [2]
    assert capsys.readouterr().out == "step 1: out of memory; going on with micro-batches of 2\n"


def test_other_errors_of_a_step_are_not_taken_for_it(model, data, tmp_path):
    task = task_of(tiny_config(tmp_path, model, data))
    task.losses[OURS] = lambda logits, target: torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        first_gradient(task, 3)


@pytest.mark.parametrize("where", [
    "forward",
    "backward",
])  # fmt: skip
def test_the_failed_attempt_is_freed_before_the_next(where, model, data, tmp_path):
    """Otherwise the smaller micro-batch would need its memory in addition to that of the larger one."""
    task = task_of(tiny_config(tmp_path, model, data))
    ours, alive = task.losses[OURS], []

    def loss(logits, target):
        if alive:
            alive.append(alive[0]() is not None)
            return ours(logits, target)
        hidden = logits * 2
        squared = hidden.square()  # keeps `hidden` for its backward
        alive.append(weakref.ref(hidden))
        if where == "forward":
            raise no_memory()
        return FailsInBackward.apply(squared).sum() + squared.sum()

    task.losses[OURS] = loss
    first_gradient(task, 3)
    assert len(alive) == 5 and not any(alive[1:])


# ---- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_run_goes_on_with_half_micro_batches_and_is_the_run_that_had_them(model, data, tmp_path, memory_for, capsys):
    pipeline.run(tiny_config(tmp_path / "right", model, data, micro_batch=2))
    pipeline.run(tiny_config(tmp_path / "large", model, data, micro_batch=None))
    capsys.readouterr()
    sizes = memory_for(2)
    pipeline.run(tiny_config(tmp_path / "halved", model, data, micro_batch=None))
    printed = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    right, large, found = (tmp_path / name / "finetuned" for name in ("right", "large", "halved"))
    assert printed == [f"step 1: out of memory; going on with micro-batches of {rows}" for rows in (4, 2)]
    assert sizes == [8, 4] + 6 * [2, 2, 2, 2]
    assert metrics(found) == metrics(right) != metrics(large)
    assert same_bits(weights(found / "last"), weights(right / "last"))
    assert same_bits(weights(found / "best"), weights(right / "best"))
    for before, after in zip(metrics(large), metrics(found), strict=True):  # the batch is the same: equal up to
        assert before["step"] == after["step"]  # rounding, and dropout, whose numbers depend on the micro-batches
        if "loss" in before:
            assert before["loss"] == pytest.approx(after["loss"], rel=0.3)


@pytest.mark.full
@pytest.mark.parametrize("command", ["distill", "contrast"])
def test_a_run_of_another_command_is_the_one_that_had_the_smaller_micro_batches(
    command, texts, pairs, tmp_path, memory_for, monkeypatch, capsys
):
    make, stage = (tiny_distill_config, "distilled") if command == "distill" else (tiny_contrast_config, "trained")
    parts = texts if command == "distill" else pairs
    pipeline.run(make(tmp_path / "right", *parts, micro_batch=2))
    real = Encoders.embed

    def embed(self, inputs, key=False):
        if self.training and len(inputs["input_ids"]) > 2:
            raise no_memory()
        return real(self, inputs, key)

    monkeypatch.setattr(Encoders, "embed", embed)
    memory_for(2, task=Distill) if command == "distill" else None
    capsys.readouterr()
    pipeline.run(make(tmp_path / "halved", *parts, micro_batch=None))
    printed = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert printed == [f"step 1: out of memory; going on with micro-batches of {rows}" for rows in (4, 2)]
    right, found = (tmp_path / name / stage for name in ("right", "halved"))
    assert metrics(found) == metrics(right)
    for kept in ("best", "last"):
        assert same_bits(tensors(found / kept), tensors(right / kept))


def tensors(folder):
    from safetensors.torch import load_file

    return {f"{file.name} {k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("most", [2, 0])
def test_the_teachers_answers_are_found_for_fewer_rows_at_a_time(most, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 7)
    tasks = []
    for name, rows in (("right", 2), ("halved", None)):
        config = tiny_distill_config(tmp_path / name, *texts, micro_batch=rows)
        config.teacher.top_k, config.teacher.cache = 8, str(tmp_path / name)
        tasks.append(task_of(config))
    right, halved_task = tasks
    right.write_answers()
    network, sizes = halved_task.teacher.network, []

    def check(_, arguments):
        sizes.append(len(arguments[1]))
        if sizes[-1] > most:
            raise no_memory()

    network.register_forward_pre_hook(check)
    capsys.readouterr()
    printed = [f"the teacher's answers: out of memory; going on with {n} rows at a time" for n in (4, 2, 1)]
    if most == 0:
        with pytest.raises(RunError, match="out of memory: one row is too much"):
            halved_task.write_answers()
        assert sizes == [7, 4, 2, 1] and capsys.readouterr().out.splitlines() == printed
        assert sorted(file.name for file in (tmp_path / "halved").iterdir()) == ["identity.json"]
        return
    line = halved_task.write_answers()
    assert line["top_k"] == 8
    assert sizes[:6] == [7, 4, 2, 2, 2, 1] and max(sizes[2:]) == 2
    assert capsys.readouterr().out.splitlines() == printed[:2]
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("right", "halved")]
    assert files[0] == files[1] and len(files[0]) > 4


@pytest.mark.full
def test_a_resumed_run_keeps_the_smaller_micro_batches(model, data, tmp_path, memory_for):
    pipeline.run(tiny_config(tmp_path / "right", model, data, micro_batch=2))
    sizes = memory_for(2)
    pipeline.run(tiny_config(tmp_path / "run", model, data, micro_batch=3), until=3)
    assert sizes[:5] == [3, 2, 2, 2, 2]
    saved = json.loads((tmp_path / "run/finetuned/last/progress.json").read_text())
    assert saved["micro_batch"] == 2 and saved["step"] == 3
    sizes.clear()
    pipeline.resume(tmp_path / "run")
    assert sizes == 12 * [2]
    assert metrics(tmp_path / "run/finetuned") == metrics(tmp_path / "right/finetuned")
    assert same_bits(weights(tmp_path / "run/finetuned/last"), weights(tmp_path / "right/finetuned/last"))


@pytest.mark.full
def test_memory_can_run_out_in_a_later_step(model, data, tmp_path, memory_for, capsys):
    sizes = memory_for(8)
    config = tiny_config(tmp_path / "run", model, data, micro_batch=None)
    pipeline.run(config, until=2)
    memory_for(4)
    pipeline.resume(tmp_path / "run")
    assert "step 3: out of memory; going on with micro-batches of 4\n" in capsys.readouterr().out
    assert sizes == [8, 8] + 4 * [4, 4]  # the second limit is outside the first
    last = json.loads((tmp_path / "run/finetuned/last/progress.json").read_text())
    assert (last["step"], last["micro_batch"]) == (6, 4)


def test_where_one_row_does_not_fit_the_command_ends_with_one_line(model, data, tmp_path, memory_for, capsys):
    sizes = memory_for(0)
    options = [f"--model.path={model}", f"--data.path={data}", f"--run.folder={tmp_path / 'run'}"]
    code = cli.main(["finetune", *options, "--run.steps=2", "--run.device=cpu", "--run.batch_size=8"])
    error = capsys.readouterr().err
    assert code == 1 and sizes == [8, 4, 2, 1]
    assert error == (
        "tlkernels: out of memory: one row is too much "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB)\n"
    )


def test_halved():
    assert [halved(rows, 1, no_memory()) for rows in (2, 3, 4, 5, 64)] == [1, 2, 2, 3, 32]
    with pytest.raises(RunError, match=r"^out of memory: one row is too much \(MemoryError: MemoryError\)$"):
        halved(1, 1, MemoryError())
    with pytest.raises(RunError, match=r"out of memory: .* processes a smaller --run.micro_batch \(OutOfMemoryError"):
        halved(8, 2, no_memory())


def test_which_errors_are_out_of_memory():
    assert out_of_memory(no_memory())
    assert out_of_memory(MemoryError())
    for text in ("expected a tensor of 3 dimensions", "the memory format is not channels_last", "no such index"):
        assert not out_of_memory(RuntimeError(text))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 62, dtype=torch.int8)  # more than the address space
    assert out_of_memory(failed.value)


# The loss of n rows takes n² · 16 MiB: 1 GiB for 8 rows, 256 MiB for 4. There are 640 MiB more than the start takes.
REAL = """
import re, resource, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from train_cases import task_of, tiny_config
from tlkernels.train import loop, pipeline
from tlkernels.train.task import OURS

model, data, folder = sys.argv[1:]
config = tiny_config(folder, model, data, micro_batch=None, steps=2)
config.check()
task = pipeline.prepare(config, pipeline.start(config))
ours = task.losses[OURS]

def loss(logits, target):
    if logits.grad_fn is not None:
        torch.empty(len(logits) ** 2, 16 << 18)
    return ours(logits, target)

task.losses[OURS] = loss
used = int(re.search(r"VmSize:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (640 << 20), resource.RLIM_INFINITY))
progress = loop.train(task, Path(folder), task.stages()["finetuned"].start)
print("done", progress.step, progress.micro_batch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is Linux's")
@pytest.mark.full  # 7 to 15 s, to start a process
def test_a_real_failed_allocation(model, data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REAL, model, data, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["step 1: out of memory; going on with micro-batches of 4", "done 2 4"]


# ---- the memory of a step ----------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    if peak_bytes(lambda: None) is None:
        pytest.skip("this system does not tell the peak of a process's memory")


@pytest.mark.parametrize("mib", [16, 64])
@pytest.mark.parametrize("freed", [False, True], ids=["", "freed before"])
def test_peak_bytes_measures_a_known_allocation(mib, freed, measured):
    if freed:  # one that glibc keeps for the next allocation: something above it stays
        buffer = torch.empty(mib * MIB // 4).fill_(1)
        above = torch.empty(100_000).fill_(1)
        del buffer
        assert above[0] == 1
    kept = []
    assert peak_bytes(lambda: kept.append(torch.empty(mib * MIB // 4).fill_(1))) == pytest.approx(mib * MIB, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the memory of the device is measured")
def test_the_peak_is_the_most_since_it_was_reset():
    """Of the whole process; what was freed before the reset does not count."""
    torch.ones(100 << 20)  # 400 MiB, freed at once
    memory.reset_peak()
    before = memory.resident("VmRSS")
    torch.ones(50 << 20)
    assert 190 << 20 < memory.peak() - before < 230 << 20


def test_peak_bytes_is_the_most_at_one_time(measured):
    """In a process of its own: a hole in the heap, left by earlier tests, would keep a freed buffer's pages."""
    code = (
        "import torch\n"
        "from tlkernels.train.memory import peak_bytes\n"
        "def step():\n"
        "    for mib in (16, 48, 8):\n"
        "        torch.empty(mib << 18).fill_(1)\n"
        "print(peak_bytes(step), peak_bytes(lambda: None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    most, none = map(int, done.stdout.split())
    assert most == pytest.approx(48 * MIB, rel=0.1)
    assert none < MIB
