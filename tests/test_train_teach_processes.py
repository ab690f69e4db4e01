"""Distillation and contrastive training with 1, 2 and 4 processes: the gradient of a step, whole jobs, the commands."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from test_train_processes import Case, distance, fsdp2, saved, spawn, unsharded
from torch.nn import functional
from train_cases import (
    made_rows,
    metrics,
    quick,
    same_bits,
    task_of,
    tiny_causal_model,
    tiny_contrast_config,
    tiny_distill_config,
    tiny_model,
    tiny_soft_config,
    untrained_classifier,
    write_csv,
    write_pairs,
    write_texts,
)

from tlkernels import cli
from tlkernels.train import UserError, check, loop, pipeline, teacher_cache
from tlkernels.train.batches import micro_batches, step_seed, whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.gradient import gradient
from tlkernels.train.optim import make_optimizer
from tlkernels.train.tasks import CONFIGS

pytestmark = pytest.mark.usefixtures(quick.__name__)
SUMMED = ["live", "hints", "cached", "classifier"]
JOINT = ["info_nce", "nt_xent", "sup_con", "sigmoid"]
BLOCKS = {"classifier": "BertLayer", **dict.fromkeys(["live", "hints", "cached"], "LlamaDecoderLayer")}
STAGE = {"live": "distilled", "cached": "distilled", "classifier": "distilled", "info_nce": "trained"}
HARD, TEMPERATURE = 0.3, 1.5  # of the live losses


def cases(world, few=False):
    """Batches in 1 and 3 micro-batches, of uneven sizes where the loss is a sum, and one that leaves processes empty.

    With `few` only the 3 micro-batches of DDP.
    """
    summed = {
        1: [(27, 27, 1), (27, 10, 3)],
        2: [(27, 14, 1), (27, 5, 3), (9, 1, 5)],
        4: [(27, 7, 1), (27, 3, 3), (9, 1, 3)],
    }[world]
    joint = {1: [(24, 24, 1), (24, 8, 3)], 2: [(24, 12, 1), (24, 4, 3)], 4: [(24, 6, 1), (24, 2, 3)]}[world]
    every = [Case(kind, *step, sharded)
             for kinds, steps in ((SUMMED, summed), (JOINT, joint)) for kind in kinds for step in steps
             for sharded in ((False,) if world == 1 else (False, True))]  # fmt: skip
    return [case for case in every if not few or (case.pieces == 3 and not case.sharded)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models and data. The teachers and students have no dropout, the encoders do. Long texts have no label."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [row | {"label": "" if len(row["text"].split()) > 8 else row["label"]} for row in made_rows(60)]
    table = write_csv(folder / "rows.csv", rows)
    classifier = untrained_classifier(folder / "finetuned", tiny_model(folder / "encoder"), table)
    llama, texts = tiny_causal_model(folder / "causal"), write_texts(folder / "texts.jsonl", 120)
    encoder, plain_encoder = tiny_model(folder / "dropout", dropout=0.1), tiny_model(folder / "plain")
    hard, plain = write_pairs(folder / "hard.jsonl", 60, 2), write_pairs(folder / "pairs.jsonl", 60, 0)
    return {
        **dict.fromkeys(["live", "hints", "cached"], (llama, texts)), "classifier": (classifier, table),
        "info_nce": (encoder, hard), **dict.fromkeys(["nt_xent", "sup_con", "sigmoid"], (encoder, plain)),
        "encoder": plain_encoder,
    }  # fmt: skip


def config_of(kind, folder, places, **run):
    if kind in JOINT:
        config = tiny_contrast_config(folder, *places[kind], **run)
        config.loss.name = kind
        config.loss.temperature = 0.2
        if kind == "sigmoid":
            config.loss.bias = -2.0
        return config
    config = (tiny_soft_config if kind == "classifier" else tiny_distill_config)(folder, *places[kind], **run)
    config.student.dropout = False
    config.loss.hard_weight = HARD
    if kind == "cached":
        config.teacher.top_k = 8
    else:
        config.loss.temperature = TEMPERATURE
    if kind == "hints":
        config.hints.blocks, config.hints.weight = [(0, 0), (0, 1)], 0.7
    return config


def job_config(kind, folder, places, **run):
    config = config_of(kind, folder, places, **{"batch_size": 16, "micro_batch": 3, **run})
    if kind in STAGE and kind not in JOINT:
        config.run.compare = False
    config.optim.clip_norm = 0.5
    return config


# ---- one step ----------------------------------------------------------------------------------------------------


def prepared_task(case, places, cache):
    config = config_of(case.kind, "unused", places, batch_size=case.rows, micro_batch=case.limit)
    if case.kind == "cached":
        config.teacher.cache = str(cache)
    task = task_of(config)
    if case.kind == "cached":
        task.write_answers()
    elif case.kind in SUMMED:
        task.teacher.network.double()
    return task


def step_gradient(case, places, folder):
    """Return the gradient of the trainer's step in float64, each process's the same."""
    with fsdp2(BLOCKS.get(case.kind, "BertLayer")) if case.sharded else unsharded():
        task = prepared_task(case, places, folder / "cache")
        network = task.start().double()
        model, _ = task.accelerator.prepare(network, make_optimizer(network, task.config.optim))
        model.train()
        batch = whole_batch(0, case.rows, len(task.rows["train"]), 0)
        loss = gradient(task, model, batch, 0, Progress())
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        if case.sharded:
            grads = {name: grad.full_tensor() for name, grad in grads.items()}
        return grads | {"the loss": task.accelerator.reduce(loss.double(), "sum")}


def plain_gradient(case, places, world, folder):
    """Return, from plain PyTorch, the gradient of the batch's mean loss, and that loss."""
    task = prepared_task(case, places, folder / "cache")
    network = task.start().double().train()
    rows = task.rows["train"]
    batch = whole_batch(0, case.rows, len(rows), 0)
    shares = [micro_batches(batch, rows.lengths, case.limit, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {case.pieces}
    empty = sum(len(piece) == 0 for share in shares for piece in share)
    assert (empty > 0) == (case.rows == 9 and world > 1), "a process should have no row"
    loss = of_pairs(case, task, network, shares) if case.kind in JOINT else of_rows(case, task, network, batch)
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None} | {"the loss": loss.detach()}


def of_rows(case, task, network, batch):
    if case.kind == "classifier":
        rows = task.rows["train"]
        inputs, target = rows.inputs(batch, "cpu"), rows.labels[batch]
        assert 0 < int((target < 0).sum()) < len(batch)
        student = network.student.logits(**inputs)
        with torch.no_grad():
            teacher = task.teacher.network.logits(**inputs)
        count = len(batch)
    else:
        inputs, target, _, lesson = task.inputs("train", batch, 0)
        ours, its = {}, {}
        catch(network.student.model, ours)
        student = network.student.model(**inputs).logits[target >= 0]
        count = int((target >= 0).sum())
        if case.kind != "cached":
            catch(task.teacher.network.model, its)
            with torch.no_grad():
                teacher = task.teacher.network.model(**inputs).logits[target >= 0]
        counted, target = target >= 0, target[target >= 0]
    if case.kind == "cached":
        index, log_p = lesson.classes, lesson.log_probs.double()
        assert index.shape == (count, 8)
        log_q = student.log_softmax(-1).gather(1, index)
        rest_p, rest_q = (torch.log1p(-v.exp().sum(1)) for v in (log_p, log_q))
        soft = (log_p.exp() * (log_p - log_q)).sum() + (rest_p.exp() * (rest_p - rest_q)).sum()
    else:
        p, log_q = (teacher / TEMPERATURE).softmax(-1), (student / TEMPERATURE).log_softmax(-1)
        soft = TEMPERATURE**2 * (p * (p.log() - log_q)).sum()
    hard = functional.cross_entropy(student, target, ignore_index=-100, reduction="sum")
    loss = (1 - HARD) * soft + HARD * hard
    if case.kind == "hints":
        for number, (mine, its_block) in enumerate(((0, 0), (0, 1))):
            error = network.maps[number](ours[mine][counted]) - its[its_block][counted]
            loss = loss + 0.7 * error.square().mean(1).sum()
    return loss / count


def catch(model, kept):
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, __, out, number=number: kept.__setitem__(number, first_of(out)))


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def of_pairs(case, task, network, shares):
    """Return the loss of all rows at once; each micro-batch of each process has the dropout that it has there."""
    parts = []
    for rank, share in enumerate(shares):
        for number, piece in enumerate(share):
            torch.manual_seed(step_seed(0, 0, rank) * 4_099 + number)
            (rows,) = task.inputs("train", piece, 0)
            embedded = [None if rows[n] is None else network.embed(rows[n]) for n in ("query", "key", "negatives")]
            parts.append([*embedded, rows["ids"], rows["labels"]])
    q, k, negatives, ids, labels = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    scale, count = network.log_scale.exp(), len(q)
    own = torch.eye(count, dtype=torch.bool)
    if case.kind == "sigmoid":
        sign = 2 * own.double() - 1
        return -functional.logsigmoid(sign * (scale * q @ k.T + network.bias)).sum() / count
    if case.kind == "nt_xent":
        z = torch.cat([q, k])
        logits = (scale * z @ z.T).masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
        return functional.cross_entropy(logits, (torch.arange(2 * count) + count) % (2 * count))
    if case.kind == "sup_con":
        positive = (labels[:, None] == labels) & ~own
        log_p = (scale * q @ q.T).masked_fill(own, -torch.inf).log_softmax(1)
        return (-torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()
    same = (ids[:, None] == ids) & ~own
    assert same.any() and negatives.shape == (2 * count, q.shape[1])
    forward = (scale * q @ k.T).masked_fill(same, -torch.inf)
    forward = torch.cat([forward, scale * q @ negatives.T], 1)
    back = (scale * k @ q.T).masked_fill(same, -torch.inf)
    return sum(functional.cross_entropy(logits, torch.arange(count)) for logits in (forward, back)) / 2


def assert_right(case, got, places, world, folder):
    right = plain_gradient(case, places, world, folder)
    assert case.kind not in JOINT or float(right["log_scale"].abs()) > 1e-4
    assert float(got.pop("the loss")) == pytest.approx(float(right.pop("the loss")), rel=1e-6)  # added up in float32
    assert distance(got, right) < 1e-12


def steps(rank, folder, places, several):
    for case in several:
        grads = step_gradient(case, places, folder)
        if rank == 0:
            torch.save(grads, folder / f"{case.name}.pt")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.full if case.pieces == 1 else ()) for case in cases(1)],
    ids=lambda case: case.name,
)
def test_the_gradient_of_one_process_is_the_whole_batchs(case, places, tmp_path):
    assert_right(case, step_gradient(case, places, tmp_path), places, 1, tmp_path)


def select(world, kinds, few=False):
    return [case for case in cases(world, few) if case.kind in kinds]


# One test for many cases: the processes take seconds to start.
@pytest.mark.parametrize(("world", "several"), [
    pytest.param(2, select(2, ["hints", "info_nce"], few=True), id="2-few", marks=pytest.mark.full),
    pytest.param(2, select(2, SUMMED), id="2-summed", marks=pytest.mark.full),
    pytest.param(4, select(4, SUMMED), id="4-summed", marks=pytest.mark.full),
    pytest.param(2, select(2, JOINT), id="2-joint", marks=pytest.mark.full),
    pytest.param(4, select(4, JOINT), id="4-joint", marks=pytest.mark.full),
])  # fmt: skip
def test_the_gradient_of_several_processes_is_the_whole_batchs(world, several, places, tmp_path):
    spawn(steps, world, tmp_path, places, several)
    wrong = []
    for case in several:
        try:
            assert_right(case, torch.load(tmp_path / f"{case.name}.pt"), places, world, tmp_path)
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_batch_of_contrast_must_be_a_multiple_of_the_processes(places, monkeypatch):
    from accelerate import Accelerator

    config = config_of("info_nce", "unused", places, batch_size=9)
    config.check()
    with unsharded():
        accelerator = pipeline.start(config)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    words = r"--run.batch_size must be a multiple of the number of processes, 2, since .*; got 9"
    with pytest.raises(UserError, match=words):
        pipeline.prepare(config, accelerator)


# ---- whole jobs --------------------------------------------------------------------------------------------------

RESULTS = ["loss", "perplexity", "accuracy", "entropy", "mrr10", "recall1", "recall10", "mass", "count", "best_step"]


def job(rank, folder, places, kind, sharded, name, signalled=None):
    """Run a job, or resume it if its folder is there; one process gets SIGTERM in the step or shard `signalled`."""
    teacher_cache.SHARD_ROWS = 16
    with fsdp2(BLOCKS.get(kind, "BertLayer")) if sharded else unsharded(), pytest.MonkeyPatch.context() as patch:
        if signalled is not None and rank == 1:
            module, function, number = sys.modules[signalled[0]], *signalled[1:]
            patch.setattr(module, function, counting(getattr(module, function), number))
        if (folder / name / "config.json").exists():
            pipeline.resume(folder / name)
        else:
            pipeline.run(job_config(kind, folder / name, places))


def counting(real, number):
    """Return a function that sends SIGTERM to its process in one of its calls."""
    calls = []

    def function(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    return function


def files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*")}


@pytest.mark.full
@pytest.mark.parametrize(("kind", "sharded"), [
    ("live", False), ("cached", False), ("classifier", False), ("info_nce", False), ("live", True), ("cached", True),
    ("classifier", True), ("info_nce", True),
])  # fmt: skip
def test_two_processes_learn_what_one_does(kind, sharded, places, tmp_path, monkeypatch):
    places = places | {"info_nce": (places["encoder"], places["info_nce"][1])}  # whose dropout would differ
    spawn(job, 2, tmp_path, places, kind, sharded, "two")
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 16)
    pipeline.run(job_config(kind, tmp_path / "one", places))
    one, two = (tmp_path / name / STAGE[kind] for name in ("one", "two"))
    for kept in ("best", "last"):
        assert distance(saved(one / kept), saved(two / kept)) < 2e-5
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
    tables = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two")]
    assert [row["stage"] for row in tables[0]] == [row["stage"] for row in tables[1]]
    for left, right in zip(*tables, strict=True):
        assert {name: left[name] for name in RESULTS if name in left} == pytest.approx(
            {name: right[name] for name in RESULTS if name in right}, rel=1e-3
        )
    caches = [files(tmp_path / name / "teacher-cache") for name in ("one", "two")]
    assert caches[0].keys() == caches[1].keys() and (kind != "cached" or len(caches[0]) > 4)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "where"), [
    ("cached", ("tlkernels.train.teacher_cache", "_write_shard", 2)),
    *((kind, ("tlkernels.train.loop", "whole_batch", 3)) for kind in ("cached", "live", "info_nce")),
], ids=["cache", "cached", "live", "contrast"])  # fmt: skip
def test_sigterm_in_one_process_stops_all_and_the_resumed_run_is_the_unbroken_one(kind, where, places, tmp_path):
    spawn(job, 2, tmp_path, places, kind, False, "whole")
    spawn(job, 2, tmp_path, places, kind, False, "stopped", where)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert not (stopped / "results.json").exists()
    if where[0] == teacher_cache.__name__:
        shards = [name for name in files(stopped / "teacher-cache") if name.endswith(".safetensors")]
        assert len(shards) == 4 and not (stopped / "distilled").exists()
    else:
        assert json.loads((stopped / STAGE[kind] / "last/progress.json").read_text())["step"] == 3
    spawn(job, 2, tmp_path, places, kind, False, "stopped")
    for kept in ("best", "last"):
        assert same_bits(saved(whole / STAGE[kind] / kept), saved(stopped / STAGE[kind] / kept))
    assert metrics(whole / STAGE[kind]) == metrics(stopped / STAGE[kind])
    assert files(whole / "teacher-cache") == files(stopped / "teacher-cache")


@pytest.mark.full
def test_a_run_that_loads_its_teacher_in_the_first_step_is_the_one_that_had_it_before(places, tmp_path):
    """Reading a classifier seeds the random numbers, from which the hints' maps and dropout are drawn."""
    table = places["classifier"][1]
    teacher = untrained_classifier(tmp_path / "teacher", tiny_model(tmp_path / "model", dropout=0.1), table)
    for name in ("whole", "killed"):
        config = job_config("classifier", tmp_path / name, {"classifier": (teacher, table)}, steps=4)
        config.student.dropout, config.hints.blocks, config.run.seed = True, [(0, 1)], 5
        pipeline.run(config, until=1 if name == "killed" else None)
    assert (tmp_path / "killed/teacher/result.json").exists()
    shutil.rmtree(tmp_path / "killed/distilled")
    pipeline.resume(tmp_path / "killed")
    whole, killed = (tmp_path / name / "distilled" for name in ("whole", "killed"))
    assert metrics(whole) == metrics(killed)
    assert same_bits(saved(whole / "last"), saved(killed / "last")) and (whole / "last/hints.safetensors").exists()


# ---- the parts of a step's time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["live", "info_nce"])
def test_the_seconds_of_a_step_are_those_of_its_data_and_computation_and_little_else(kind, places, tmp_path):
    """The data take 30 ms a micro-batch more than they would, the network 20 ms a pass."""
    task = task_of(config_of(kind, tmp_path, places, batch_size=8, micro_batch=4, steps=3, eval_every=3))
    inputs, passes = task.inputs, []

    def slow(*arguments):
        if arguments[2] is not None:
            time.sleep(0.03)
        return inputs(*arguments)

    def slower(module, _):
        if module.training:
            passes.append(module)
            time.sleep(0.02)

    task.inputs = slow
    network = task.start()
    network.register_forward_pre_hook(slower)
    progress = loop.train(task, tmp_path / "run", lambda: network)
    assert len(passes) == 3 * 2 * (2 if kind == "info_nce" else 1)  # GradCache has two passes
    assert progress.data_seconds >= 3 * 2 * 0.03
    assert progress.compute_seconds >= 0.02 * len(passes)
    rest = progress.seconds - progress.data_seconds - progress.compute_seconds
    assert 0 <= rest < 0.5 * progress.seconds


# ---- check-normalisation -----------------------------------------------------------------------------------------


def check_options(kind, places, tmp_path):
    config = config_of(kind, tmp_path / "run", places, batch_size=12, micro_batch=None)
    (tmp_path / "options.json").write_text(config.to_json())
    return ["check-normalisation", config.command, "--config", str(tmp_path / "options.json")]


@pytest.mark.parametrize(
    "kind",
    [
        "hints",
        "info_nce",
        pytest.param("cached", marks=pytest.mark.full),
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("classifier", *JOINT[1:])),
    ],
)
def test_the_gradient_does_not_depend_on_the_micro_batches(kind, places, tmp_path, monkeypatch, capsys):
    alone = lambda config, task, model, count: check._gradient(task, model, count)  # noqa: E731
    monkeypatch.setattr(check, "_over_processes", alone)
    assert cli.main(check_options(kind, places, tmp_path)) == 0
    _, ours, processes, means = capsys.readouterr().out.strip().split("\n\n")
    assert ours.splitlines()[0] == f"tlkernels {config_of(kind, 'unused', places).command}"
    assert ours.count(" ok\n") == 4 and processes.count(" ok\n") == 2 and "NOT OK" not in ours + processes
    assert means.count("NOT OK") >= 2


@pytest.mark.full
@pytest.mark.parametrize("kind", ["live", "cached", "info_nce", "sup_con"])
def test_the_gradient_does_not_depend_on_the_processes(kind, places, tmp_path, capfd):
    assert cli.main(check_options(kind, places, tmp_path)) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out.split("\n\n")[2].count(" ok\n") == 2


# ---- the commands ------------------------------------------------------------------------------------------------

COMMANDS = ["distill", "distill-classifier", "contrast"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = " ".join(capsys.readouterr().out.split())
    for part, values in vars(CONFIGS[command]()).items():
        for name in vars(values):
            assert f"--{part}.{name} " in lines, f"--{part}.{name} is missing"
            after = lines.split(f"--{part}.{name} ")[-1]
            assert not after.lstrip("A-Z{,}_[]. ").startswith("(type"), f"--{part}.{name} has no help"


@pytest.mark.parametrize(("command", "options", "expected"), [
    ("distill", ["--cache-teacher", "16", "--hints.blocks=[[0,2],[9,29]]"], ["top_k: 16", "- - 0", "- 29"]),
    ("distill-classifier", ["--teacher.path=runs/a", "--student.layers=[0,3]"], ["path: runs/a", "- 3"]),
    ("contrast", ["--loss.name=sup_con", "--data.path=x.csv"], ["name: sup_con", "path: x.csv"]),
])  # fmt: skip
def test_print_config_is_read_again(command, options, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, *options, "--print_config"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli.main([command, "--config", str(tmp_path / "c.yaml"), "--print_config"])
    again = capsys.readouterr().out
    assert again == printed
    for part in expected:
        assert part in printed


@pytest.mark.parametrize("command", [
    "distill", "distill-classifier",
    "contrast",
])  # fmt: skip
def test_a_run_folder_of_another_command_is_refused(command, tmp_path, capsys):
    (tmp_path / "command").write_text("lm\n")
    (tmp_path / "config.json").write_text("{}")
    assert cli.main([command, "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"tlkernels: {tmp_path} is a run of tlkernels lm, not of tlkernels {command}\n"


@pytest.mark.full
def test_a_resumed_distillation_keeps_its_cache_in_the_folder_that_is_resumed(places, tmp_path, monkeypatch):
    """From another working directory, after the folder has moved."""
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    pipeline.run(job_config("cached", "run", places, steps=2, eval_every=2), until=1)
    (tmp_path / "before/run").rename(tmp_path / "after/moved")
    written = files(tmp_path / "after/moved/teacher-cache")
    monkeypatch.chdir(tmp_path)
    pipeline.resume("after/moved")
    assert files(tmp_path / "after/moved/teacher-cache") == written
    assert sorted(file.name for file in tmp_path.iterdir()) == ["after", "before"]
    assert list((tmp_path / "before").iterdir()) == []
