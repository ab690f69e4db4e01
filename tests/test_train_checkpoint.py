"""A full disk or a kill during a checkpoint gives one line, and the previous checkpoint can be resumed."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import made_rows, metrics, quick, same_bits, tiny_config, tiny_model, weights, write_csv

from tlkernels.train import RunError, UserError, checkpoint, pipeline
from tlkernels.train.checkpoint import settle, write_file, write_folder
from tlkernels.train.loading import load
from tlkernels.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return tiny_model(folder / "model", dropout=0.1), write_csv(folder / "rows.csv", made_rows(60))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipeline.run(tiny_config(folder, *paths))
    return folder / "finetuned"


def assert_resumes(run, whole):
    pipeline.resume(run)
    assert same_bits(weights(run / "finetuned/last"), weights(whole / "last"))
    assert metrics(run / "finetuned") == metrics(whole)
    names = ["best", "last", "metrics.jsonl", "result.json"]
    assert sorted(place.name for place in (run / "finetuned").iterdir()) == names


def test_a_full_disk_half_way_through_a_checkpoint(paths, whole, tmp_path, monkeypatch):
    real, calls = checkpoint.torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    match = r"cannot write .*last \(OSError: .*No space left on device.*previous one is complete"
    with pytest.raises(RunError, match=match):
        pipeline.run(tiny_config(tmp_path / "run", *paths))
    monkeypatch.undo()
    assert not list((tmp_path / "run/finetuned").glob("*.new")), "a full disk is not left full"
    assert_resumes(tmp_path / "run", whole)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "optimizer.pt"])
def test_a_write_that_the_operating_system_cuts_short(file, tmp_path, paths):
    """safetensors, tokenizers and torch each raise their own error; all become a RunError."""
    from accelerate import Accelerator

    config = tiny_config(tmp_path / "run", *paths)
    task = pipeline.prepare(config, Accelerator(cpu=True))
    network = task.stages()["finetuned"].start()
    optimizer = make_optimizer(network, config.optim)
    for parameter in network.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    arguments = (task, network, optimizer.state_dict(), checkpoint.Progress(step=1))
    checkpoint.save_checkpoint(tmp_path / "last", *arguments)
    before = {file.name: file.read_bytes() for file in (tmp_path / "last").iterdir()}
    if file == "tokenizer.json":  # larger than the weights that are written before it
        task.preprocessor.add_tokens([f"word{number}" for number in range(3000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = len(before[file]) - 1 if file != "tokenizer.json" else len(before["model.safetensors"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal: a write raises instead
    try:
        with pytest.raises(RunError, match=r"cannot write .*last .*previous one is complete"):
            checkpoint.save_checkpoint(tmp_path / "last", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in (tmp_path / "last").iterdir()} == before
    assert [place.name for place in tmp_path.iterdir()] == ["last"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from train_cases import tiny_config
from tlkernels.train import checkpoint, pipeline

{kill}
import torch
torch.set_num_threads(1)
pipeline.run(tiny_config({folder!r}, {model!r}, {data!r}))
"""
IN_A_FILE = """
real, calls = checkpoint.torch.save, []
def save(state, path):
    calls.append(path)
    real(state, path)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = save
"""
BETWEEN_THE_RENAMES = """
real = checkpoint.Path.rename
def rename(self, target):
    real(self, target)
    if str(target).endswith("last.old"):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Path.rename = rename
"""


@pytest.mark.parametrize("kill", [
    pytest.param(IN_A_FILE, id="in-a-file"),
    pytest.param(BETWEEN_THE_RENAMES, id="between-the-renames", marks=pytest.mark.full),
])  # fmt: skip
def test_a_kill_in_the_middle_of_a_checkpoint(kill, paths, whole, tmp_path):
    script = KILLED.format(
        tests=str(Path(__file__).parent), kill=kill, folder=str(tmp_path / "run"), model=paths[0], data=paths[1]
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {"last.new"} <= {place.name for place in (tmp_path / "run/finetuned").iterdir()}
    assert_resumes(tmp_path / "run", whole)


def test_leftovers_are_settled(tmp_path):
    final = tmp_path / "last"

    def fill(text):
        return lambda place: (place / "file").write_text(text)

    write_folder(final, fill("one"))
    write_folder(final, fill("two"))
    assert (final / "file").read_text() == "two"
    final.rename(tmp_path / "last.old")
    settle(final)
    assert (final / "file").read_text() == "two"
    (tmp_path / "last.new").mkdir()
    settle(final)
    assert [place.name for place in tmp_path.iterdir()] == ["last"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_file(tmp_path / "results.json", "one")
    monkeypatch.setattr(
        checkpoint.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RunError, match="No space left"):
        write_file(tmp_path / "results.json", "two")
    assert (tmp_path / "results.json").read_text() == "one"


def test_what_is_written_reaches_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    real = checkpoint.Path.rename
    monkeypatch.setattr(checkpoint, "to_disk", lambda path: order.append(f"fsync {path.name}"))
    monkeypatch.setattr(
        checkpoint.Path, "rename", lambda self, to: (order.append(f"rename {self.name}"), real(self, to))
    )
    write_folder(tmp_path / "last", lambda place: (place / "file").write_text("x"))
    assert order == ["fsync file", "fsync last.new", "rename last.new", f"fsync {tmp_path.name}"]


def test_a_checkpoint_that_is_not_whole_is_said_so(paths, whole, tmp_path):
    run = tmp_path / "run"
    pipeline.run(tiny_config(run, *paths), until=2)
    file = run / "finetuned/last/optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="has no complete checkpoint"):
        pipeline.resume(run)
    (run / "finetuned/best/model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot load AutoModel|has no model"):
        load(run)
