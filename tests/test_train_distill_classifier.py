"""`tlkernels distill-classifier`: the gradient of a step, texts and images, resuming, and what is refused."""

import gc
import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional
from train_cases import (
    divergence_of,
    made_rows,
    metrics,
    plain_step,
    quick,
    same_bits,
    shaken,
    sharpened,
    task_of,
    tiny_config,
    tiny_model,
    tiny_soft_config,
    untrained_classifier,
    weights,
    write_csv,
)

from tlkernels import timing
from tlkernels.train import UserError, checkpoint, compare, load, pipeline, report
from tlkernels.train.batches import whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.gradient import gradient

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return sharpened(tiny_model(tmp_path_factory.mktemp("encoder"), dropout=0.1))


@pytest.fixture(scope="module")
def patchy(tmp_path_factory):
    """Texts longer than 9 words have no label."""
    rows = [row | {"label": "" if len(row["text"].split()) > 9 else row["label"]} for row in made_rows(60)]
    return write_csv(tmp_path_factory.mktemp("patchy") / "rows.csv", rows)


@pytest.fixture(scope="module")
def teacher(encoder, patchy, tmp_path_factory):
    return untrained_classifier(tmp_path_factory.mktemp("teacher") / "run", encoder, patchy)


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(teacher):
    """Do not wait for the disk, draw no curves, and let gc.collect pass over what the imports made."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "to_disk", lambda path: None)
        patch.setattr(report, "_curves", lambda *_: None)
        patch.setattr(compare, "interleaved", lambda ways, seconds, least: timing.interleaved(ways, 0.0, least))
        yield
    gc.unfreeze()


def configured(folder, teacher, **parts):
    """Return a configuration without dropout; options are given as `part={option: value}`."""
    config = tiny_soft_config(folder, teacher, None)
    config.student.dropout = False
    for part, options in parts.items():
        for name, value in options.items():
            assert hasattr(getattr(config, part), name), name
            setattr(getattr(config, part), name, value)
    return config


def in_float64(task):
    """Return the network that the task starts with, with noise, and its teacher, both in float64."""
    network = task.start()
    shaken(network.student, seed=3)
    return network.double(), shaken(task.teacher.network, seed=4)


def expected_gradient(network, loss):
    parameters = dict(network.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def check_gradient(task, network, batch, step, loss):
    right = expected_gradient(network, loss)
    assert max(float(value.abs().max()) for value in right.values()) > 1e-3
    assert float(gradient(task, network.train(), batch, step, Progress())) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in network.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, right[name], rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize(("divergence", "hard_weight"), [
    ("forward_kl", 0.0), ("forward_kl", 0.5), ("forward_kl", 1.0), ("reverse_kl", 0.5), ("js", 0.5), ("tv", 0.5),
])  # fmt: skip
def test_the_gradient_of_a_step_with_rows_without_a_label(divergence, hard_weight, teacher, tmp_path):
    """All rows hear the teacher, and the labelled ones the labels; both sums are divided by the number of rows."""
    options = {"divergence": divergence, "hard_weight": hard_weight, "temperature": 1.0, "temperature_end": 5.0}
    task = task_of(configured(tmp_path, teacher, loss=options, run={"steps": 5}))
    network, taught = in_float64(task)
    batch = whole_batch(1, 8, len(task.rows["train"]), 0)
    inputs, target, lesson = task.inputs("train", batch, 1)
    labelled = target >= 0
    assert 0 < int(labelled.sum()) < 8 and lesson.temperature == 2.0
    guess = network.student.logits(**inputs)
    soft = divergence_of(divergence, guess, taught.logits(**inputs).detach(), 2.0)
    hard = functional.cross_entropy(guess[labelled], target[labelled], reduction="sum")
    check_gradient(task, network, batch, 1, ((1 - hard_weight) * soft.sum() + hard_weight * hard) / 8)
    assert all(p.grad is None and not p.requires_grad for p in taught.parameters())


def test_hints_count_all_tokens_but_padding(teacher, tmp_path):
    parts = {"hints": {"blocks": [(0, 1)], "weight": 0.7}, "loss": {"hard_weight": 0.0}}
    task = task_of(configured(tmp_path, teacher, **parts))
    network, taught = in_float64(task)
    batch = whole_batch(0, 8, len(task.rows["train"]), 0)
    inputs, *_ = task.inputs("train", batch, 0)
    counted = inputs["attention_mask"].bool()
    assert not counted.all()
    guess, right = (of.logits(**inputs) for of in (network.student, taught))
    own, told = (of.encoder(**inputs, output_hidden_states=True).hidden_states for of in (network.student, taught))
    loss = divergence_of("forward_kl", guess, right.detach(), 2.0).sum()
    errors = (network.maps[0](own[1]) - told[2].detach())[counted] ** 2
    check_gradient(task, network, batch, 0, (loss + 0.7 * errors.mean(-1).sum()) / 8)


def test_the_rows_are_those_of_the_teacher_unless_others_are_given(teacher, encoder, patchy, tmp_path):
    known = task_of(tiny_config(tmp_path, encoder, patchy)).rows
    ours = task_of(configured(tmp_path, teacher)).rows
    assert all(ours[side].fingerprint() == known[side].fingerprint() for side in known)
    other = write_csv(tmp_path / "other.csv", made_rows(30, seed=5))
    assert task_of(configured(tmp_path, teacher, data={"path": other})).rows["train"].fingerprint() != (
        known["train"].fingerprint()
    )


def test_what_cannot_be_distilled_is_refused_in_one_line(teacher, encoder, tmp_path):
    def refused(match, path=teacher, **parts):
        with pytest.raises(UserError, match=match) as caught:
            pipeline.run(configured(tmp_path / "run", path, **parts))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    two = write_csv(tmp_path / "two.csv", [row for row in made_rows(60) if row["label"] != "oven"])
    (tmp_path / "lm/trained/best").mkdir(parents=True)
    refused("--teacher.path must be the run folder of a finished `tlkernels finetune`$", path=None)
    refused("--teacher.path must be the run folder of a finished `tlkernels finetune`, got", path=encoder)
    refused("--teacher.path must be the run folder of a finished `tlkernels finetune`, got", path=str(tmp_path / "lm"))
    refused(
        r"the classes of the rows are \['chess', 'river'\], those of the teacher \['chess', 'oven'", data={"path": two}
    )
    refused("--student.layers must be from 1 to 2", student={"layers": 3})
    refused("--student.layers and --student.path exclude each other", student={"layers": 1, "path": encoder})
    refused("--hints.blocks: the teacher has the blocks 0 to 1, got 2", hints={"blocks": [(0, 2)]})
    refused("--loss.hard_weight must be 0 <= share <= 1, got 2", loss={"hard_weight": 2.0})


def test_the_table_and_the_student_of_labels_alone(teacher, tmp_path):
    """Its losses are those of a plain loop in float64."""
    config = configured(tmp_path / "run", teacher, run={"compare": True})
    pipeline.run(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [line["stage"] for line in results["results"]] == ["teacher", "labels", "distilled"]
    assert all(line["peak_bytes"] > 0 for line in results["results"][1:])
    verdict = results["verdict"].splitlines()
    assert len(verdict) == 2 and "the labels alone" in verdict[1].lower()
    config.run.folder = str(tmp_path / "again")
    task = task_of(config)
    network = task.start().student.double().train()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-3, foreach=False), []
    for step in range(6):
        inputs, target, _ = task.inputs("train", whole_batch(step, 8, len(task.rows["train"]), 0), step)
        loss = functional.cross_entropy(network.logits(**inputs), target)
        plain_step(network, optimizer, loss, step)
        losses.append(loss.item())
    found = [line["loss"] for line in metrics(tmp_path / "run/labels") if "loss" in line]
    assert found == pytest.approx(losses, rel=1e-5)


def test_the_scores_are_those_of_the_labels(teacher, tmp_path):
    task = task_of(configured(tmp_path, teacher))
    network = task.start()
    scores = task.scores(network, "eval")
    inputs, target, _ = task.inputs("eval", torch.arange(len(task.rows["eval"])), None)
    with torch.no_grad():
        logits = network.student.eval().logits(**inputs)
    loss = functional.cross_entropy(logits, target)
    accuracy = (logits.argmax(-1) == target)[target >= 0].double().mean()
    assert scores.count == int((target >= 0).sum()) < len(target)
    assert scores.values["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert scores.values["accuracy"] == pytest.approx(float(accuracy))


def test_a_stopped_and_resumed_run_is_the_unbroken_one(teacher, tmp_path):
    """With dropout and hints; the distilled network can be loaded, and answers."""
    from safetensors.torch import load_file

    for name in ("whole", "stopped"):
        config = configured(tmp_path / name, teacher, student={"dropout": True}, hints={"blocks": [(0, 1)]})
        pipeline.run(config, until=3 if name == "stopped" else None)
    assert not (tmp_path / "stopped/results.json").exists()
    pipeline.resume(tmp_path / "stopped")
    left, right = (tmp_path / name / "distilled" for name in ("whole", "stopped"))
    assert metrics(left) == metrics(right)
    for kept in ("best", "last"):
        assert same_bits(weights(left / kept), weights(right / kept))
        maps = [load_file(place / kept / "hints.safetensors") for place in (left, right)]
        assert same_bits(*maps) and maps[0]
    assert not any(".layer.1." in name for name in weights(left / "best")), "the teacher is saved too"
    answers = load(left / "best").predict(["fish in the stream", "the rook"])
    assert all(name in ("chess", "oven", "river") for name, _ in answers)


def test_the_losses_that_are_compared_agree(teacher, tmp_path):
    task = task_of(configured(tmp_path, teacher, run={"compare_loss": 3}))
    rows = compare.compare_losses(task, tmp_path, lambda: task.start())["losses"]
    assert list(rows) == ["tlkernels", "eager"]
    assert all(row["difference"] < 1e-5 for row in rows.values())


@pytest.mark.full
def test_an_image_classifier(tmp_path):
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**options, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for name, color in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (20 + number, 24), color).save(tmp_path / "pictures" / name / f"{number}.png")
    teacher = untrained_classifier(tmp_path / "teacher", str(tmp_path / "vit"), str(tmp_path / "pictures"))
    config = configured(tmp_path / "run", teacher, student={"layers": 1}, hints={"blocks": [(0, 1)]})
    config.optim.lr, config.loss.hard_weight, config.run.steps = 1e-2, 1.0, 12
    pipeline.run(config)
    line = json.loads((tmp_path / "run/distilled/result.json").read_text())
    assert line["accuracy"] == 1.0
    saved = json.loads(Path(tmp_path / "run/distilled/best/config.json").read_text())
    assert saved["num_hidden_layers"] == 1
    assert load(tmp_path / "run/distilled/best").predict([Image.new("RGB", (30, 30), (0, 0, 255))])[0][0] == "blue"
