"""SIGKILL and SIGTERM at any moment of a run: resuming gives the bits of the run that nothing interrupted."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver

import pytest
import torch
from train_cases import (
    made_rows,
    metrics,
    quick,
    same_bits,
    tiny_causal_model,
    tiny_config,
    tiny_contrast_config,
    tiny_distill_config,
    tiny_lm_config,
    tiny_model,
    write_csv,
    write_pairs,
    write_texts,
)

from tlkernels import cli
from tlkernels.train import checkpoint, loop, pipeline, teacher_cache

pytestmark = pytest.mark.usefixtures(quick.__name__)
COMMANDS = ["finetune", "lm", "distill", "contrast"]
STAGE = {"finetune": "finetuned", "lm": "trained", "distill": "distilled", "contrast": "trained"}
STEPS = 20  # with an evaluation and a checkpoint after every second one
SHARD_ROWS = 4  # of the teacher's cache


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models with dropout, and data."""
    folder = tmp_path_factory.mktemp("parts")
    bert, llama = tiny_model(folder / "bert", dropout=0.1), tiny_causal_model(folder / "llama", dropout=0.1)
    texts = write_texts(folder / "texts.jsonl", 120)
    return {
        "finetune": (bert, write_csv(folder / "rows.csv", made_rows(60))),
        "lm": (llama, texts),
        "distill": (llama, texts),
        "contrast": (bert, write_pairs(folder / "pairs.jsonl", 60)),
    }


@pytest.fixture(scope="module", autouse=True)
def _small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_ROWS", SHARD_ROWS)
        yield


@pytest.fixture(scope="module")
def wholes(places, tmp_path_factory):
    """Runs that nothing interrupted, each made when it is needed."""

    class Wholes(dict):
        def __missing__(self, command):
            self[command] = tmp_path_factory.mktemp("whole") / command
            pipeline.run(config_of(command, self[command], places))
            return self[command]

    forkserver.ensure_running()  # its imports take seconds
    return Wholes()


def config_of(command, folder, places, **run):
    make = {
        "finetune": tiny_config,
        "lm": tiny_lm_config,
        "distill": tiny_distill_config,
        "contrast": tiny_contrast_config,
    }[command]
    config = make(folder, *places[command], **{"steps": STEPS, **run})
    if command == "distill":
        config.teacher.top_k = 8
    return config


def bits(folder):
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def scores(run):
    """Return what the final table says, without the times."""
    results = json.loads((run / "results.json").read_text())["results"]
    names = ["stage", "loss", "accuracy", "macro_f1", "perplexity", "entropy", "mrr10", "recall1", "recall10"]
    names += ["mass", "cache_bytes", "top_k", "each", "count", "steps", "best_step"]
    return [{name: row[name] for name in names if name in row} for row in results]


def assert_same(run, whole, command):
    left, right = (place / STAGE[command] for place in (run, whole))
    assert metrics(left) == metrics(right)
    for kept in ("best", "last"):
        assert same_bits(bits(left / kept), bits(right / kept)), kept
    assert scores(run) == scores(whole)
    state, expected = (torch.load(stage / "last/optimizer.pt")["state"] for stage in (left, right))
    assert state.keys() == expected.keys() and all(same_bits(state[key], expected[key]) for key in state)
    assert sorted(place.name for place in left.iterdir()) == sorted(place.name for place in right.iterdir())
    assert cached(run) == cached(whole)


def cached(run):
    """Return the files of the teacher's cache."""
    return {file.name: file.read_bytes() for file in (run / "teacher-cache").glob("*")}


# ---- SIGKILL -----------------------------------------------------------------------------------------------------


def _job(folder, places, command, work=None):
    """Run the job, or resume it, in a process of its own."""
    import datasets

    from tlkernels.train import report

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder.parent / "cache"
    report.LOSS_SECONDS = 0.0
    teacher_cache.SHARD_ROWS = SHARD_ROWS
    if work is not None:
        work()
    if (folder / "config.json").exists():
        pipeline.resume(folder)
    else:
        pipeline.run(config_of(command, folder, places))


def start_job(*arguments):
    process = multiprocessing.get_context("forkserver").Process(target=_job, args=arguments)
    process.start()
    return process


def lines(folder):
    """Return the number of whole lines in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def events(run, command):
    """Return the number of shards of the teacher's cache and of whole lines in metrics.jsonl."""
    return len(list((run / "teacher-cache").glob("*.safetensors"))) + lines(run / STAGE[command])


def last_step(text):
    return max([json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")], default=0)


def kill_at(folder, places, command, event, seconds):
    """Kill a job `seconds` after a shard or a line of its metrics; return the steps done since its checkpoint.

    None: the job ended first.
    """
    stage = folder / STAGE[command]
    process = start_job(folder, places, command)
    while events(folder, command) < event and process.is_alive():
        time.sleep(0.0005)
    time.sleep(seconds)
    process.kill()  # does nothing if it has ended
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the job failed"
    if process.exitcode == 0:
        return None
    done = last_step((stage / "metrics.jsonl").read_text()) if (stage / "metrics.jsonl").exists() else 0
    saved = stage / "last/progress.json"
    return done - (json.loads(saved.read_text())["step"] if saved.exists() else 0)


def kills(draw, count, whole, command):
    """Return when to kill: after a shard or a line, in the order of the run, and some milliseconds more."""
    total = events(whole, command)
    return [(line, draw.uniform(0, 0.03)) for line in sorted(draw.sample(range(1, total + 1), count))]


def interrupted(folder, places, command, moments):
    """Run a job that is killed at these moments, and then ends; return the steps that each kill lost."""
    lost = [kill_at(folder, places, command, *moment) for moment in moments]
    pipeline.resume(folder)
    return lost


@pytest.mark.parametrize(
    "command", ["lm", *(pytest.param(name, marks=pytest.mark.full) for name in ("finetune", "distill", "contrast"))]
)
def test_a_killed_run_is_the_unbroken_one(command, places, wholes, tmp_path):
    (lost,) = interrupted(tmp_path / "run", places, command, [(events(wholes[command], command) - 14, 0.0)])
    assert lost is not None
    assert_same(tmp_path / "run", wholes[command], command)


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_killed_again_and_again_is_the_unbroken_one(command, places, wholes, tmp_path):
    """Ten kills, spread over four runs."""
    draw, lost = random.Random(command), []
    for number, count in enumerate((1, 2, 3, 4)):
        lost += interrupted(tmp_path / str(number), places, command, kills(draw, count, wholes[command], command))
        assert_same(tmp_path / str(number), wholes[command], command)
    landed = [steps for steps in lost if steps is not None]
    assert len(landed) >= 8, "most jobs ended before their kill"
    assert len([steps for steps in landed if steps > 0]) >= 3, "few kills landed between two checkpoints"


def _cut_short():
    """Kill this process in the middle of its third checkpoint."""
    real, calls = checkpoint.torch.save, []

    def save(state, path):
        calls.append(path)
        real(state, path)
        if len(calls) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = save


@pytest.mark.full
@pytest.mark.parametrize("command", ["lm", "distill", "contrast"])
def test_a_kill_in_the_middle_of_a_checkpoint(command, places, wholes, tmp_path):
    process = start_job(tmp_path / "run", places, command, _cut_short)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    half = tmp_path / "run" / STAGE[command] / "last.new/optimizer.pt"
    with pytest.raises((RuntimeError, OSError)):
        torch.load(half)
    pipeline.resume(tmp_path / "run")
    assert_same(tmp_path / "run", wholes[command], command)


def _in_a_shard():
    """Kill this process in the middle of the file of its fourth shard."""
    real, calls = teacher_cache.to_disk, []

    def to_disk(file):
        if file.name.endswith(".safetensors.new"):
            calls.append(file)
            if len(calls) == 4:
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        real(file)

    teacher_cache.to_disk = to_disk


def _before(name):
    """Return the work that kills this process before it writes the file of this name, of the cache or of a stage."""
    return partial(_kill_before, name)


def _kill_before(name):
    for module in (teacher_cache, pipeline):
        module.write_file = partial(_write_unless, module.write_file, name)


def _write_unless(real, name, file, text):
    if str(file).endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, text)


@pytest.mark.full
@pytest.mark.parametrize(("work", "shards"), [
    (_before("identity.json"), 0),
    (_in_a_shard, 3),
    (_before("manifest.json"), None),
    (_before("teacher/result.json"), 0),
    (_before("cache/result.json"), None),
    (_before("distilled/result.json"), None),
], ids=["before the cache", "in a shard", "before the manifest", "before the teacher's line", "before the cache's line",
        "before the student's line"])  # fmt: skip
def test_a_kill_around_the_cache_and_between_stages(work, shards, places, wholes, tmp_path):
    process = start_job(tmp_path / "run", places, "distill", work)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [name for name in cached(tmp_path / "run") if name.endswith(".safetensors")]
    every = [name for name in cached(wholes["distill"]) if name.endswith(".safetensors")]
    assert len(every) > 5 and len(left) == (len(every) if shards is None else shards)
    pipeline.resume(tmp_path / "run")
    assert_same(tmp_path / "run", wholes["distill"], "distill")


# ---- SIGTERM -----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_ends_the_command_with_a_checkpoint(command, places, wholes, tmp_path):
    """The signal reaches the process after the third step's line in metrics.jsonl, so in the fourth step or later."""
    run = tmp_path / "run"
    stage = run / STAGE[command]
    config = config_of(command, run, places)
    (tmp_path / "options.json").write_text(config.to_json())
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    small = f"from tlkernels.train import teacher_cache; teacher_cache.SHARD_ROWS = {SHARD_ROWS}"
    code = f"import sys; from tlkernels import cli; {small}; sys.exit(cli.main())"
    arguments = [sys.executable, "-c", code, command, "--config", str(tmp_path / "options.json")]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while lines(stage) < 4 and process.poll() is None:  # steps 1 and 2, an evaluation, step 3
        time.sleep(0.0005)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = json.loads((stage / "last/progress.json").read_text())["step"]
    assert 3 <= step < STEPS
    assert f"stopped after step {step}\n" in output
    assert f"to continue: tlkernels {command} --resume {run}\n" in output
    assert metrics(stage)[-1]["step"] == step
    assert not (run / "results.json").exists()
    pipeline.resume(run)
    assert_same(run, wholes[command], command)


# Step 5 has no evaluation, and therefore would have no checkpoint; step 8 has both.
@pytest.mark.full
@pytest.mark.parametrize(
    ("command", "step"), [("lm", 5), ("finetune", 8), ("lm", 8), ("finetune", 5), ("distill", 5), ("contrast", 5)]
)
def test_sigterm_ends_the_run_after_the_step_that_it_reached(command, step, places, wholes, tmp_path, monkeypatch):
    real, run = loop.whole_batch, tmp_path / "run"

    def whole_batch(number, *rest):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(number, *rest)

    monkeypatch.setattr(loop, "whole_batch", whole_batch)
    pipeline.run(config_of(command, run, places))
    monkeypatch.undo()
    stage = run / STAGE[command]
    assert json.loads((stage / "last/progress.json").read_text())["step"] == step
    assert metrics(stage)[-1]["step"] == step
    pipeline.resume(run)
    assert_same(run, wholes[command], command)


@pytest.mark.full
def test_sigterm_while_the_cache_is_written_ends_the_command_after_the_shard(places, wholes, tmp_path, capsys):
    run, real, calls = tmp_path / "run", teacher_cache._write_shard, []

    def write_shard(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    (tmp_path / "options.json").write_text(config_of("distill", run, places).to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "_write_shard", write_shard)
        assert cli.main(["distill", "--config", str(tmp_path / "options.json")]) == 0
    assert len(calls) == 3
    assert sorted(cached(run)) == ["identity.json", *(f"shard-{number:05d}.safetensors" for number in range(3))]
    assert capsys.readouterr().out.endswith(f"\nto continue: tlkernels distill --resume {run}\n")
    assert not (run / "cache").exists() and not (run / "distilled").exists()
    assert cli.main(["distill", "--resume", str(run)]) == 0
    assert_same(run, wholes["distill"], "distill")


# ---- seeds -------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_the_seed_alone_decides_the_bits(command, places, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        pipeline.run(config_of(command, tmp_path / name, places, steps=2, seed=seed))
    stages = [tmp_path / name / STAGE[command] for name in ("one", "two", "other")]
    for kept in ("best", "last"):
        one, two, other = (bits(stage / kept) for stage in stages)
        assert same_bits(one, two)
        assert not same_bits(one, other)
    one, two, other = map(metrics, stages)
    assert one == two != other
    assert scores(tmp_path / "one") == scores(tmp_path / "two")
