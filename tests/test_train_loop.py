"""The training loop: the gradient of a step, in one and two processes; resuming; stopping; optimisers."""

import json
import math

import pytest
import torch
from torch.nn import functional
from train_cases import made_rows, metrics, quick, same_bits, task_of, tiny_config, tiny_model, weights, write_csv

from tlkernels.train import RunError, UserError, pipeline
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.config import OptimConfig, ScheduleConfig
from tlkernels.train.loading import load
from tlkernels.train.loop import train
from tlkernels.train.optim import learning_rate, make_optimizer
from tlkernels.train.task import OURS, Scores

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("plain"), dropout=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "rows.csv", made_rows(60))


@pytest.fixture(scope="module")
def patchy_data(tmp_path_factory):
    """Texts longer than 9 words have no label, so micro-batches of similar lengths differ in labelled rows."""
    rows = [row | {"label": "" if len(row["text"].split()) > 9 else row["label"]} for row in made_rows(60)]
    return write_csv(tmp_path_factory.mktemp("patchy") / "rows.csv", rows)


def one_step(config, folder):
    """Return the gradient of one step, from the change that plain SGD with rate 1 makes; in float64."""
    config.optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=None)
    config.schedule = ScheduleConfig(name="constant", warmup=0.0)
    config.run.steps = config.run.eval_every = 1
    task = task_of(config)
    networks = []

    def make():
        networks.append(task.start().double())
        return networks[0]

    before = {key: value.clone() for key, value in make().state_dict().items()}
    train(task, folder, lambda: networks[0])
    return {key: before[key] - value for key, value in networks[0].state_dict().items() if value.is_floating_point()}


def whole_gradient(config):
    """Return, from plain PyTorch, the gradient of the batch's mean, and of the mean of the micro-batches' means."""
    task = task_of(config)
    rows = task.rows["train"]
    batch = whole_batch(0, config.run.batch_size, len(rows), config.run.seed)

    def gradient(pieces):
        network = task.start().double()
        for piece in pieces:
            logits = network.logits(**rows.inputs(piece, "cpu"))
            (functional.cross_entropy(logits, rows.labels[piece]).nan_to_num() / len(pieces)).backward()
        return {key: 0 * value if value.grad is None else value.grad for key, value in network.named_parameters()}

    pieces = micro_batches(batch, rows.lengths, config.run.micro_batch)
    assert len({int((rows.labels[piece] >= 0).sum()) for piece in pieces}) > 1, "the micro-batches are not uneven"
    return gradient([batch]), gradient(pieces)


def distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def test_accumulated_gradient_is_the_whole_batchs(plain_model, patchy_data, tmp_path):
    config = tiny_config(tmp_path, plain_model, patchy_data, batch_size=16, micro_batch=3)
    right, wrong = whole_gradient(config)
    assert distance(right, wrong) > 1e-2, "the rows do not distinguish the two ways to normalise"
    assert distance(one_step(config, tmp_path / "run"), right) < 1e-12


def test_a_step_without_any_label_changes_nothing(plain_model, patchy_data, tmp_path, monkeypatch):
    real = pipeline.prepare

    def unlabelled(config, accelerator):
        task = real(config, accelerator)
        task.rows["train"].labels[:] = -100
        return task

    monkeypatch.setattr(pipeline, "prepare", unlabelled)
    change = one_step(tiny_config(tmp_path, plain_model, patchy_data), tmp_path / "run")
    assert max(float(value.abs().max()) for value in change.values()) == 0


# Step 3 is between two evaluations, step 4 at one.
@pytest.mark.parametrize(("stop", "optimizer"), [
    (3, "adamw"),
    pytest.param(4, "momentum", marks=pytest.mark.full),
    pytest.param(3, "momentum", marks=pytest.mark.full),
    pytest.param(4, "adamw", marks=pytest.mark.full),
])  # fmt: skip
def test_a_stopped_and_resumed_run_is_the_unbroken_one(model, data, tmp_path, optimizer, stop):
    for name in ("whole", "stopped"):
        config = tiny_config(tmp_path / name, model, data)
        config.optim.name = optimizer
        pipeline.run(config, until=stop if name == "stopped" else None)
    assert not (tmp_path / "stopped/results.json").exists()
    assert metrics(tmp_path / "stopped/finetuned")[-1]["step"] == stop
    pipeline.resume(tmp_path / "stopped")

    whole, resumed = tmp_path / "whole/finetuned", tmp_path / "stopped/finetuned"
    for kept in ("best", "last"):
        assert same_bits(weights(whole / kept), weights(resumed / kept))
    assert metrics(whole) == metrics(resumed)
    states = [torch.load(place / "last/optimizer.pt") for place in (whole, resumed)]
    flat = [[t for entry in state["state"].values() for t in entry.values()] for state in states]
    assert len(flat[0]) == len(flat[1]) > 0
    assert all(torch.equal(left, right) for left, right in zip(*flat, strict=True))


@pytest.mark.full
def test_dropout_is_on_while_training(model, plain_model, data, tmp_path):
    """Otherwise the test above would not see whether a resumed run draws the same numbers."""
    for name, path in (("dropout", model), ("plain", plain_model)):
        pipeline.run(tiny_config(tmp_path / name, path, data))
    first = [metrics(tmp_path / name / "finetuned")[0]["loss"] for name in ("dropout", "plain")]
    assert first[0] != first[1]


def test_resuming_with_other_rows_is_refused(model, data, tmp_path):
    rows = write_csv(tmp_path / "rows.csv", made_rows(60))
    pipeline.run(tiny_config(tmp_path / "run", model, rows), until=2)
    write_csv(rows, made_rows(60, seed=9))
    with pytest.raises(UserError, match="are not those"):
        pipeline.resume(tmp_path / "run")


@pytest.mark.full
def test_lines_that_a_kill_left_behind_are_dropped(model, data, tmp_path):
    pipeline.run(tiny_config(tmp_path / "whole", model, data))
    pipeline.run(tiny_config(tmp_path / "killed", model, data), until=4)
    file = tmp_path / "killed/finetuned/metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "loss": 7}\n{"step": 6, "lo')
    pipeline.resume(tmp_path / "killed")
    assert metrics(tmp_path / "killed/finetuned") == metrics(tmp_path / "whole/finetuned")


def test_it_learns(model, tmp_path):
    data = write_csv(tmp_path / "rows.csv", made_rows(150))
    config = tiny_config(tmp_path / "run", model, data, steps=60, eval_every=20, tensorboard=True)
    config.optim.lr = 5e-3
    pipeline.run(config)
    result = json.loads((tmp_path / "run/finetuned/result.json").read_text())
    assert result["accuracy"] >= 0.9
    assert list((tmp_path / "run/finetuned/tensorboard").iterdir())
    answers = load(tmp_path / "run").predict(["fish in the stream", "flour and yeast", "the rook is in check"])
    assert [name for name, _ in answers] == ["river", "oven", "chess"]
    assert all(1 / 3 < probability <= 1 for _, probability in answers)


def test_the_best_model_is_kept_and_patience_ends_the_run(model, data, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.6, 0.55, 0.6, 0.7])
    config = tiny_config(tmp_path, model, data, steps=10, eval_every=1, patience=2)
    task = task_of(config)

    def scores(*_):
        accuracy = next(accuracies)
        return Scores({"loss": 1.0, "accuracy": accuracy}, (accuracy, -1.0), 10)

    monkeypatch.setattr(task, "scores", scores)
    make = lambda: task.start()  # noqa: E731
    progress = train(task, tmp_path / "run", make)
    assert (progress.step, progress.best_step, progress.best.values["accuracy"]) == (4, 2, 0.6)
    assert not same_bits(weights(tmp_path / "run/best"), weights(tmp_path / "run/last"))
    assert train(task, tmp_path / "run", make).step == 4  # a resumed run stops too


def test_a_gradient_that_is_no_number_ends_the_run_before_it_reaches_the_weights(model, data, tmp_path):
    config = tiny_config(tmp_path / "run", model, data, eval_every=1)
    task = task_of(config)
    real = task.losses[OURS]

    class Breaks(torch.nn.Module):
        calls = 0

        def forward(self, logits, target):
            self.calls += 1
            return real(logits, target) * (math.nan if self.calls > 12 and logits.requires_grad else 1)

    with pytest.raises(RunError, match="gradient of step"):
        task.losses[OURS] = Breaks()
        train(task, tmp_path / "run", lambda: task.start())
    assert all(value.isfinite().all() for value in weights(tmp_path / "run/last").values())


def test_clipping(plain_model, data, tmp_path):
    lengths = {}
    for norm in (None, 0.01):
        config = tiny_config(tmp_path, plain_model, data, steps=1, eval_every=1, micro_batch=None)
        config.optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=norm)
        config.schedule.warmup = 0.0
        task = task_of(config)
        network = task.start()
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        train(task, tmp_path / str(norm), lambda network=network: network)
        lengths[norm] = float((torch.cat([p.detach().flatten() for p in network.parameters()]) - before).norm())
    assert lengths[0.01] == pytest.approx(0.01, rel=1e-3)
    assert lengths[None] > 0.1


def test_bf16_autocast_reaches_the_layers_and_keeps_float32_weights(plain_model, data, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    seen = set()
    real = functional.linear

    def spy(input, weight, bias=None):
        out = real(input, weight, bias)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(functional, "linear", spy)
    pipeline.run(tiny_config(tmp_path / "run", plain_model, data, precision="bf16"))
    AcceleratorState._reset_state(True)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in weights(tmp_path / "run/finetuned/last").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum", "adagrad"])
def test_every_optimiser_makes_torchs_step(name):
    """Against the plain class with default settings; matrices decay, biases do not."""
    plain = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False),
        "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=False),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, foreach=False),
        "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, foreach=False),
        "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, foreach=False),
    }[name]
    torch.manual_seed(3)
    ours, theirs = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": [theirs.weight], "weight_decay": 0.3}, {"params": [theirs.bias], "weight_decay": 0.0}]
    inputs = torch.randn(7, 5)
    optimizers = make_optimizer(ours, OptimConfig(name=name, lr=0.1, weight_decay=0.3, momentum=0.8)), plain(groups)
    for _ in range(3):
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(inputs).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_the_schedule_reaches_the_optimiser(plain_model, data, tmp_path):
    """The first of two warm-up steps is half as long as one without a warm-up."""
    change = {}
    for warmup in (0.0, 0.5):
        config = tiny_config(tmp_path, plain_model, data, steps=4, eval_every=4)
        config.optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=None)
        config.schedule = ScheduleConfig(name="constant", warmup=warmup)
        task = task_of(config)
        network = task.start().double()
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        train(task, tmp_path / str(warmup), lambda network=network: network, until=1)
        change[warmup] = torch.cat([p.detach().flatten() for p in network.parameters()]) - before
    assert torch.allclose(change[0.5], change[0.0] / 2, rtol=1e-9, atol=1e-12)
    assert change[0.0].abs().max() > 1e-3


def test_schedules():
    def rates(name, warmup=0.2):
        return [learning_rate(step, 10, 1.0, ScheduleConfig(name=name, warmup=warmup)) for step in range(10)]

    assert rates("linear") == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])
    assert rates("cosine") == pytest.approx([0.5, 1.0, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))])
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)
    assert rates("constant", warmup=0.0) == [1.0] * 10
    assert all(rate > 0 for rate in rates("linear") + rates("cosine"))


def test_batches_are_epochs_in_a_new_order_each_time():
    rows = torch.cat([whole_batch(step, 8, 20, seed=4) for step in range(5)])
    first, second = rows[:20], rows[20:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    assert torch.equal(whole_batch(3, 8, 20, seed=4), rows[24:32])
    assert not torch.equal(whole_batch(3, 8, 20, seed=5), rows[24:32])
    assert whole_batch(0, 50, 20, seed=0).bincount().tolist().count(3) == 10  # a batch larger than the data


def test_micro_batches_share_a_batch_out_completely():
    lengths = torch.randint(3, 60, (100,))
    batch = torch.randperm(100)[:33]
    shares = [micro_batches(batch, lengths, 4, rank, 3) for rank in range(3)]
    assert sorted(torch.cat([piece for share in shares for piece in share]).tolist()) == sorted(batch.tolist())
    assert all(len(piece) <= 4 for share in shares for piece in share)
    padded = sum(int(lengths[piece].max()) * len(piece) for share in shares for piece in share)
    assert padded < 1.25 * int(lengths[batch].sum())
    assert len(micro_batches(batch, lengths, None)) == 1
    assert micro_batches(batch[:0], lengths, 4) == []
