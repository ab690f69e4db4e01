"""Distillation and contrastive training with 1, 2 and 4 processes: the gradient of a step, whole jobs, the commands."""

from dataclasses import dataclass

import pytest
import torch
from test_train_processes import distance, fsdp2, spawn, unsharded
from torch.nn import functional
from train_cases import (
    made_rows,
    quick,
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

from tlkernels.train.batches import micro_batches, step_seed, whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.gradient import gradient
from tlkernels.train.optim import make_optimizer

pytestmark = pytest.mark.usefixtures(quick.__name__)
SUMMED = ["live", "hints", "cached", "classifier"]
JOINT = ["info_nce", "nt_xent", "sup_con", "sigmoid"]
BLOCKS = {"classifier": "BertLayer", **dict.fromkeys(["live", "hints", "cached"], "LlamaDecoderLayer")}
STAGE = {"live": "distilled", "cached": "distilled", "classifier": "distilled", "info_nce": "trained"}
HARD, TEMPERATURE = 0.3, 1.5  # of the live losses


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
    """Batches in 1 and 3 micro-batches, of uneven sizes where the loss is a sum, and one for fewer processes than rows.

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
    encoder = tiny_model(folder / "dropout", dropout=0.1)
    hard, plain = write_pairs(folder / "hard.jsonl", 60, 2), write_pairs(folder / "pairs.jsonl", 60, 0)
    return {
        **dict.fromkeys(["live", "hints", "cached"], (llama, texts)), "classifier": (classifier, table),
        "info_nce": (encoder, hard), **dict.fromkeys(["nt_xent", "sup_con", "sigmoid"], (encoder, plain)),
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


@pytest.mark.parametrize("case", cases(1), ids=lambda case: case.name)
def test_the_gradient_of_one_process_is_the_whole_batchs(case, places, tmp_path):
    assert_right(case, step_gradient(case, places, tmp_path), places, 1, tmp_path)


# One test for all cases: the processes take seconds to start.
@pytest.mark.parametrize(("world", "few"), [
    pytest.param(2, True, id="2-few"),
    pytest.param(2, False, id="2", marks=pytest.mark.full),
    pytest.param(4, False, id="4", marks=pytest.mark.full),
])  # fmt: skip
def test_the_gradient_of_several_processes_is_the_whole_batchs(world, few, places, tmp_path):
    spawn(steps, world, tmp_path, places, cases(world, few))
    wrong = []
    for case in cases(world, few):
        try:
            assert_right(case, torch.load(tmp_path / f"{case.name}.pt"), places, world, tmp_path)
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)
