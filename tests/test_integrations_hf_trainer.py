"""Patched models in the Trainer of transformers: accumulation, data parallelism, mixed precision, real weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import CACHED, CLASSES, MODELS, RESNET, SIZES, build
from torch import nn
from transformers import Trainer, TrainingArguments

from bench.hosts import hf as real
from tlkernels.integrations import hf

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, LENGTH = 16, 9
QUIET = {"dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}


class Strict(transformers.BertForSequenceClassification):
    """Its forward takes no other arguments, as that of some models."""

    def forward(self, input_ids, labels=None):
        return super().forward(input_ids, labels=labels)


KINDS = {
    "Llama": ("LlamaForCausalLM", CACHED | QUIET),
    "BERT": ("BertForMaskedLM", MODELS["BERT"][1] | QUIET),
    "BERT-labels": ("BertForSequenceClassification", SIZES | QUIET | {"num_labels": 5}),
    "Llama-labels": ("LlamaForSequenceClassification", CACHED | {"num_labels": 5}),
    "BERT-tokens": ("BertForTokenClassification", SIZES | QUIET | {"num_labels": 5}),
    "Strict-labels": (Strict, SIZES | QUIET | {"num_labels": 5}),
    "ResNet": ("ResNetForImageClassification", RESNET),
}


def rows(kind, dtype=torch.float64):
    """Sixteen rows, of which most labels are ignored in some and few in others."""
    torch.manual_seed(3)
    labels = torch.randint(5, (ROWS,))
    if kind == "ResNet":
        return [{"pixel_values": torch.randn(3, 32, 32, dtype=dtype), "labels": label} for label in labels]
    ids = torch.randint(3, CLASSES, (ROWS, LENGTH))
    if kind.endswith("labels"):
        return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    targets = torch.randint(5 if kind.endswith("tokens") else CLASSES, (ROWS, LENGTH))
    for k in range(ROWS):
        targets[k, 2 + k % 7 :] = -100
    return [{"input_ids": row, "labels": target} for row, target in zip(ids, targets, strict=True)]


def model_of(kind, dtype=torch.float64):
    torch.manual_seed(1)
    model = build(*KINDS[kind], dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = lambda mode=True, module=module: module
    return model


def arguments(folder, accumulation=1, **options):
    options = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "num_train_epochs": 1} | options
    options = {"per_device_train_batch_size": 8 // accumulation} | options
    return TrainingArguments(
        output_dir=str(folder), optim="sgd", learning_rate=0.3,
        gradient_accumulation_steps=accumulation, report_to="none", save_strategy="no", use_cpu=True, seed=5,
        disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip


def train(model, data, args, **options):
    trainer = Trainer(model=model, args=args, train_dataset=data, **options)
    order = torch.utils.data.SequentialSampler(data)
    trainer._get_train_sampler = lambda *_: order
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, losses, trainer


def two_steps(model, data):
    """Both steps in plain PyTorch: the mean over all labels of the batch that count."""
    model.train()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.3), []
    for batch in (data[:8], data[8:]):
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        target = batch.pop("labels")
        logits = model(**batch).logits
        if isinstance(model, transformers.LlamaForCausalLM):
            logits, target = logits[:, :-1], target[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_trains_on_the_mean_of_the_whole_batch(kind, accumulation, tmp_path):
    data = rows(kind)
    expected, losses = two_steps(model_of(kind), data)
    found, logged, _ = train(hf.patch(model_of(kind)), data, arguments(tmp_path, accumulation))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # the Trainer adds up losses in float32
    assert logged == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "BERT-labels", "ResNet"])
def test_compute_loss_func_trains_the_same(kind, tmp_path):
    data, model = rows(kind), model_of(kind)
    expected, losses = two_steps(model_of(kind), data)
    found, logged, _ = train(
        model, data, arguments(tmp_path, accumulation=4), compute_loss_func=hf.compute_loss_func(model)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert logged == pytest.approx(losses, rel=1e-4)


def test_label_smoothing_is_that_of_the_trainer(tmp_path):
    data = rows("Llama")
    args = arguments(tmp_path / "own", 4, label_smoothing_factor=0.2)
    expected, losses, _ = train(model_of("Llama"), data, args)
    kept, _, _ = train(hf.patch(model_of("Llama")), data, args)  # the Trainer takes the labels: logits are made
    found, logged, _ = train(hf.patch(model_of("Llama"), label_smoothing=0.2), data, arguments(tmp_path / "ours", 4))
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert logged == pytest.approx(losses, rel=1e-4)


def test_mixed_precision_makes_no_logits_and_evaluation_does(tmp_path, monkeypatch):
    data, seen = rows("Llama"), []
    expected, losses, _ = train(model_of("Llama", torch.float32), data, arguments(tmp_path, 2, bf16=True))
    monkeypatch.setattr(hf.LazyLogits, "tensor", lambda self: pytest.fail("the logits were made"))
    found, logged, trainer = train(
        hf.patch(model_of("Llama", torch.float32)), data, arguments(tmp_path, 2, bf16=True), eval_dataset=data,
        compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {},
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-3)
    assert logged == pytest.approx(losses, rel=1e-2)
    assert trainer.evaluate()["eval_loss"] > 0 and seen == [(ROWS, LENGTH, CLASSES)]
    hf.unpatch(trainer.model)
    assert "_tlkernels_plan" not in vars(type(trainer.model))


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
from test_integrations_hf_trainer import arguments, model_of, rows, train
from tlkernels.integrations import hf

torch.set_num_threads(1)
kind, folder = sys.argv[1], sys.argv[3]
args = arguments(folder, accumulation=2, per_device_train_batch_size=2)
found, losses, trainer = train(hf.patch(model_of(kind)), rows(kind), args)
if trainer.is_world_process_zero():
    torch.save(found, folder + "/weights.pt")
    json.dump(losses, open(folder + "/losses.json", "w"))
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["Llama", "BERT", "BERT-labels"])
def test_two_processes_train_on_the_mean_of_the_whole_batch(kind, tmp_path):
    expected, losses = two_steps(model_of(kind), rows(kind))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run([*command, kind, str(Path(__file__).parent), str(tmp_path)], check=True)
    found = torch.load(tmp_path / "weights.pt")
    torch.testing.assert_close(found, {k: v for k, v in expected.items() if k in found}, rtol=1e-6, atol=1e-9)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", list(real.MODELS))
def test_real_models_have_their_own_curve_of_losses(name, accumulation):
    """Against a training in float64: no further from it than twice the model's own loss in float32 is."""
    curves = {way: real.train(name, way, accumulation, 20, 4, 32)["losses"] for way in real.WAYS}
    own, patched = (real.distance(curves[way], curves["float64"]) for way in ("own", "patched"))
    assert sum(curves["float64"][-5:]) < sum(curves["float64"][:5])  # it learns
    if (name, accumulation) == ("minilm", 4):  # transformers adds the means of BERT's micro-batches up
        assert own > 1
        own = 1e-6
    assert patched <= 2 * own + torch.finfo(torch.float32).eps
