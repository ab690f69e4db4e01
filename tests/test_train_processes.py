"""The gradient of a step with 1, 2 and 4 processes, with DDP and FSDP2; jobs of two processes."""

import json
import os
import signal
import socket
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional
from train_cases import (
    made_rows,
    metrics,
    quick,
    same_bits,
    tiny_causal_model,
    tiny_config,
    tiny_lm_config,
    tiny_masked_model,
    tiny_model,
    write_csv,
    write_texts,
)

from tlkernels.train import loop, pipeline
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.loop import gradient
from tlkernels.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures(quick.__name__)
KINDS = ["finetune", "causal", "masked"]
BLOCKS = {"finetune": "BertLayer", "causal": "LlamaDecoderLayer", "masked": "BertLayer"}


@dataclass(frozen=True)
class Case:
    """One step: the rows of its batch, and the most in a micro-batch, so that a process has `pieces` of them."""

    kind: str
    rows: int
    limit: int
    pieces: int
    sharded: bool

    @property
    def name(self):
        return f"{self.kind}-{self.rows}-{self.pieces}-{'fsdp2' if self.sharded else 'ddp'}"


def cases(world, few=False):
    """Batches of 27 rows in 1, 3 and 4 micro-batches of uneven sizes, and one that leaves processes without a row.

    With `few` only the 3 micro-batches, and of one kind the processes without a row.
    """
    steps = {
        1: [(27, 27, 1), (27, 10, 3), (27, 7, 4)],
        2: [(27, 14, 1), (27, 5, 3), (27, 4, 4), (9, 1, 5)],
        4: [(27, 7, 1), (27, 3, 3), (27, 2, 4), (9, 1, 3)],
    }[world]
    ways = (False,) if world == 1 else (False, True)
    every = [Case(kind, *step, sharded) for kind in KINDS for step in steps for sharded in ways]
    return [case for case in every if not few or case.pieces == 3 or (case.kind == "causal" and case.rows == 9)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models without dropout, and data; of finetune's texts those with more than 8 words have no label."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [row | {"label": "" if len(row["text"].split()) > 8 else row["label"]} for row in made_rows(60)]
    texts = write_texts(folder / "texts.jsonl", 120)
    return {
        "finetune": (tiny_model(folder / "encoder"), write_csv(folder / "rows.csv", rows)),
        "causal": (tiny_causal_model(folder / "causal"), texts),
        "masked": (tiny_masked_model(folder / "masked"), texts),
    }


def config_of(kind, folder, places, **run):
    config = (tiny_config if kind == "finetune" else tiny_lm_config)(folder, *places[kind], **run)
    if kind == "masked":
        config.data.pack = False  # full rows would all have the same number of masked tokens
    return config


def task_of(case, places):
    config = config_of(case.kind, "unused", places, batch_size=case.rows, micro_batch=case.limit)
    config.check()
    return pipeline.prepare(config, pipeline.start(config))


# ---- one step ----------------------------------------------------------------------------------------------------


def step_gradient(case, places):
    """Return the gradient of the trainer's step in float64, each process's the same."""
    with fsdp2(BLOCKS[case.kind]) if case.sharded else unsharded():
        task = task_of(case, places)
        network = task.start().double()
        model, _ = task.accelerator.prepare(network, make_optimizer(network, task.config.optim))
        model.train()
        batch = whole_batch(0, case.rows, len(task.rows["train"]), 0)
        gradient(task, model, batch, 0, Progress())
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        if case.sharded:
            assert all(type(grad).__name__ == "DTensor" for grad in grads.values())
            grads = {name: grad.full_tensor() for name, grad in grads.items()}
        return grads


def plain_gradient(case, places, world=None):
    """Return, from plain PyTorch, the gradient of the batch's mean loss.

    With `world`, that of the mean of the processes' and micro-batches' means, which another way to normalise gives.
    """
    task = task_of(case, places)
    rows, network = task.rows["train"], task.start().double().train()
    batch = whole_batch(0, case.rows, len(rows), 0)
    pieces = [batch]
    if world:
        shares = [micro_batches(batch, rows.lengths, case.limit, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {case.pieces}
        pieces = [piece for share in shares for piece in share if len(piece)]
        assert (len(pieces) < world * case.pieces) == (case.rows == 9 and world > 1), "a process should have no row"
    counts = []
    for piece in pieces:
        if case.kind == "finetune":
            logits, target = network.logits(**rows.inputs(piece, "cpu")), rows.labels[piece]
        else:
            inputs, target, _ = task.inputs("train", piece, 0)
            logits, target = network.model(**inputs).logits.flatten(0, 1), target.flatten()
        counts.append(int((target >= 0).sum()))
        (functional.cross_entropy(logits, target).nan_to_num() / len(pieces)).backward()
    assert len(pieces) == 1 or len(set(counts)) > 1, "every micro-batch counts the same"
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def assert_right(case, got, places, world):
    right = plain_gradient(case, places)
    pieces = plain_gradient(case, places, world)
    assert world * case.pieces == 1 or distance(pieces, right) > 1e-5, "the rows do not tell the two ways apart"
    assert distance(got, right) < 1e-12


# ---- processes ---------------------------------------------------------------------------------------------------


@contextmanager
def unsharded():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield


@contextmanager
def fsdp2(block):
    """Let the trainer's Accelerator shard these blocks with FSDP2, which Accelerate itself does only on a GPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    real = pipeline.start

    def start(config):
        accelerator = real(config)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        return accelerator

    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    AcceleratorState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (options | {"FSDP_TRANSFORMER_CLS_TO_WRAP": block}).items():
            patch.setenv(name, value)
        patch.setattr(AcceleratorState, "is_fsdp2", property(lambda state: True))
        patch.setattr(pipeline, "start", start)
        yield
    AcceleratorState._reset_state()


def spawn(work, world, *arguments):
    """Call `work(rank, *arguments)` in each of `world` new processes, which gloo connects."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = torch.multiprocessing.start_processes
    processes(_process, (work, world, port, arguments), world, start_method="forkserver")


def _process(rank, work, world, port, arguments):
    import datasets

    from tlkernels.train import report

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    report.LOSS_SECONDS = 0.0
    datasets.config.HF_DATASETS_CACHE = arguments[0] / "cache"
    work(rank, *arguments)


def steps(rank, folder, places, several):
    for case in several:
        grads = step_gradient(case, places)
        if rank == 0:
            torch.save(grads, folder / f"{case.name}.pt")


@pytest.mark.parametrize("case", cases(1), ids=lambda case: case.name)
def test_the_gradient_of_one_process_is_the_whole_batchs(case, places):
    assert_right(case, step_gradient(case, places), places, 1)


# One test for all cases: the processes take seconds to start.
@pytest.mark.parametrize(("world", "few"), [
    pytest.param(2, True, id="2-few"),
    pytest.param(2, False, id="2", marks=pytest.mark.full),
    pytest.param(4, False, id="4", marks=pytest.mark.full),
])  # fmt: skip
def test_the_gradient_of_several_processes_is_the_whole_batchs(world, few, places, tmp_path):
    spawn(steps, world, tmp_path, places, cases(world, few))
    for case in cases(world, few):
        try:
            assert_right(case, torch.load(tmp_path / f"{case.name}.pt"), places, world)
        except AssertionError as error:
            raise AssertionError(f"{case.name}, {world} processes: {error}") from error


# ---- whole jobs --------------------------------------------------------------------------------------------------


def job(rank, folder, places, kind, sharded, name, until, optimizer="adamw"):
    """Run a job, or resume it if its folder is there."""
    with fsdp2(BLOCKS[kind]) if sharded else unsharded():
        if (folder / name / "config.json").exists():
            pipeline.resume(folder / name)
        else:
            pipeline.run(job_config(kind, folder / name, places, optimizer), until)


def job_config(kind, folder, places, optimizer="adamw"):
    config = config_of(kind, folder, places, batch_size=16, micro_batch=3)
    config.optim.name, config.optim.clip_norm = optimizer, 0.5
    return config


def saved(folder):
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.full
@pytest.mark.parametrize(("kind", "sharded", "optimizer"), [
    *((kind, False, optimizer) for kind in KINDS for optimizer in ("adamw", "momentum")),
    *((kind, True, optimizer) for kind in KINDS for optimizer in ("adamw", "momentum", "adagrad")),
])  # fmt: skip
def test_two_processes_learn_what_one_does(kind, sharded, optimizer, places, tmp_path):
    spawn(job, 2, tmp_path, places, kind, sharded, "two", None, optimizer)
    pipeline.run(job_config(kind, tmp_path / "one", places, optimizer))
    stage = "finetuned" if kind == "finetune" else "trained"
    one, two = (tmp_path / name / stage for name in ("one", "two"))
    for kept in ("best", "last"):
        assert distance(saved(one / kept), saved(two / kept)) < 1e-5
    assert any(line.get("grad_norm", 0) > 0.5 for line in metrics(one)), "no gradient was clipped"
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    first_, second = (json.loads((place / "result.json").read_text()) for place in (one, two))
    names = ["loss", "accuracy", "count", "steps", "best_step"]
    assert [first_[name] for name in names] == pytest.approx([second[name] for name in names], rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_that_was_stopped_and_resumed_is_the_unbroken_one(kind, places, tmp_path):
    spawn(job, 2, tmp_path, places, kind, True, "whole", None)
    for _ in range(2):
        spawn(job, 2, tmp_path, places, kind, True, "stopped", 3)
    stage = "finetuned" if kind == "finetune" else "trained"
    whole, resumed = (tmp_path / name / stage for name in ("whole", "stopped"))
    assert metrics(whole) == metrics(resumed)
    for kept in ("best", "last"):
        assert same_bits(saved(whole / kept), saved(resumed / kept))
    states = [torch.load(place / "last/optimizer.pt")["state"] for place in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(same_bits(states[0][name], states[1][name]) for name in states[0])

    # Its folder is that of an unsharded network.
    config = job_config(kind, tmp_path / "unused", places)
    task = pipeline.prepare(config, pipeline.start(config))
    loaded = task.load(whole / "last")
    copy = tmp_path / "copy"
    copy.mkdir()
    task.save(copy, loaded)
    assert same_bits(saved(copy), saved(whole / "last"))
    assert not same_bits(saved(whole / "last"), start_of(task, tmp_path))


def start_of(task, folder):
    """Return the tensors of the network before its first step."""
    (folder / "start").mkdir()
    task.save(folder / "start", task.start())
    return saved(folder / "start")


def terminated(rank, folder, places, kind, name):
    """Run a job in which the second process alone gets SIGTERM in the third step."""
    real = loop.whole_batch

    def whole_batch(step, *rest):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *rest)

    loop.whole_batch = whole_batch
    try:
        job(rank, folder, places, kind, False, name, None)
    finally:
        loop.whole_batch = real


@pytest.mark.full
def test_sigterm_in_one_process_stops_all_after_the_same_step(places, tmp_path):
    spawn(terminated, 2, tmp_path, places, "causal", "stopped")
    last = tmp_path / "stopped/trained/last"
    assert json.loads((last / "progress.json").read_text())["step"] == 3
    spawn(job, 2, tmp_path, places, "causal", False, "stopped", None)
    spawn(job, 2, tmp_path, places, "causal", False, "whole", None)
    assert same_bits(saved(last), saved(tmp_path / "whole/trained/last"))
    assert metrics(tmp_path / "stopped/trained") == metrics(tmp_path / "whole/trained")
