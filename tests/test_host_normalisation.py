"""Gradients of hosts that depend on the number of micro-batches, as they are and with the remedy.

The figures of docs/hosts/normalisation.md. How they follow from the hosts' code is in test_normalisation.py.
"""

import gc
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_normalisation import TARGET, Net, collate, expected_mean_of_means, image_rows, inputs, text_rows

import tlkernels as tlk
from tlkernels.normalisation import check_normalisation

ROWS = 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch, one_thread):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # accelerate's, before each training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


# ---- transformers' Trainer ---------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 4}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1}
LLAMA = TEXT | {"num_key_value_heads": 1, "eos_token_id": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4, "layer_type": "basic"}
REGNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4, "groups_width": 8}
IMAGES = SIZES | {"image_size": 32, "patch_size": 16}
MODERN = TEXT | {"cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}

# The model, and whether the Trainer's gradient is right; where each micro-batch has as many labels it is a multiple.
MODELS = {
    "BertForSequenceClassification": (TEXT, False),
    "BertForTokenClassification": (TEXT, False),
    "BertForMaskedLM": (TEXT, False),
    "RobertaForSequenceClassification": (TEXT, False),
    "ModernBertForSequenceClassification": (MODERN, False),
    "LlamaForSequenceClassification": (LLAMA, False),
    "LlamaForTokenClassification": (LLAMA, False),
    "ResNetForImageClassification": (RESNET, False),
    "RegNetForImageClassification": (REGNET, False),
    "BeitForImageClassification": (IMAGES, False),
    "LlamaForCausalLM": (LLAMA, True),
    "ModernBertForMaskedLM": (MODERN, True),
    "ViTForImageClassification": (IMAGES, True),
}


def data_of(name):
    if "Image" in name:
        return image_rows("class")
    if "Token" not in name:
        return text_rows("class" if "Sequence" in name else "token")
    return [
        row | {"labels": [label % 4 if label >= 0 else label for label in row["labels"]]} for row in text_rows("token")
    ]


def trainer_of(name, folder, model, **options):
    import transformers

    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=ROWS, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", max_steps=1,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=data_of(name), data_collator=collate, **options)


def made(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MODELS[name][0]))


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_as_it_is_and_with_a_patched_model(name, tmp_path):
    from tlkernels.integrations import hf

    model = made(name)
    report = check_normalisation(trainer_of(name, tmp_path, model))
    assert report.ok == MODELS[name][1]
    if not report.ok:
        assert [line.factor for line in report.lines] == pytest.approx([1, 2, 4], rel=0.05)
        every = "Token" not in name and "Masked" not in name  # each row has one label
        assert ("the loss is not divided by the number of micro-batches" in str(report)) == every
    mended = check_normalisation(trainer_of(name, tmp_path, hf.patch(model)))
    assert mended.ok and mended.lines[2].difference < 1e-5


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM", "ResNetForImageClassification"])
def test_the_trainer_with_our_compute_loss_func(name, tmp_path):
    from tlkernels.integrations import hf

    model = made(name)
    report = check_normalisation(trainer_of(name, tmp_path, model, compute_loss_func=hf.compute_loss_func(model)))
    assert report.ok and report.lines[2].difference < 1e-5


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_host_normalisation, torch, transformers
from tlkernels.integrations import hf

torch.set_num_threads(1)
name, gradients = "BertForSequenceClassification", []
batch = test_host_normalisation.collate(test_host_normalisation.data_of(name))

class Record(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

def whole(model):
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def quiet():
    model = test_host_normalisation.made(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model

factors = {}
for kind, patch in (("plain", lambda model: model), ("patched", hf.patch)):
    for accumulation in (1, 2, 4):
        trainer = test_host_normalisation.trainer_of(name, sys.argv[2], patch(quiet()), callbacks=[Record()])
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 8 // accumulation
        trainer.args.gradient_accumulation_steps = accumulation
        trainer.create_accelerator_and_postprocess()
        trainer.args.max_grad_norm = 0.0
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(16))
        trainer.train()
        expected = whole(quiet())
        found = gradients.pop()
        factors[f"{kind} {accumulation}"] = [float(found @ expected / (expected @ expected)),
                                             float((found - expected).norm() / expected.norm())]
if trainer.is_world_process_zero():
    json.dump(factors, open(sys.argv[2] + "/factors.json", "w"))
"""


@pytest.mark.full
def test_the_trainer_in_two_processes_multiplies_by_their_number_too(tmp_path):
    pytest.importorskip("transformers")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run([*command, str(Path(__file__).parent), str(tmp_path)], check=True)
    found = json.loads((tmp_path / "factors.json").read_text())
    for accumulation in (1, 2, 4):
        wrong = 2 * accumulation
        assert found[f"plain {accumulation}"] == pytest.approx([wrong, wrong - 1], rel=1e-4)
        assert found[f"patched {accumulation}"] == pytest.approx([1, 0], abs=1e-5)


# ---- Lightning ---------------------------------------------------------------------------------------------------


class NoStep(torch.optim.Optimizer):
    """Runs the forward and backward passes of a step, and leaves the weights alone."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure):
        return closure()


def lightning_step(loss_of, callbacks):
    """Return the function step(pieces) of one epoch with one step of a Lightning Trainer, and the model."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().double()

        def training_step(self, batch, batch_idx):
            return loss_of(self, self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return NoStep(self.parameters())

    module = Module()

    def step(pieces):
        data = list(zip(inputs(torch.float64).chunk(pieces), TARGET.chunk(pieces), strict=True))
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=pieces, callbacks=callbacks(),
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))

    return step, module


@pytest.mark.parametrize("loss", [F.cross_entropy, tlk.cross_entropy])
def test_lightning_weights_rows_wrongly_with_a_mean_in_each_step(loss):
    step, module = lightning_step(lambda module, logits, target: loss(logits, target), list)
    report = check_normalisation(step, module)
    assert not report.ok
    for line in report.lines[1:]:
        factor, difference = expected_mean_of_means(module.net, line.pieces)
        assert difference > 0.05
        assert line.factor == pytest.approx(factor, rel=1e-9) and line.difference == pytest.approx(difference, rel=1e-9)


def test_lightning_is_right_with_whole_batch_mean():
    pytest.importorskip("lightning.pytorch")
    from tlkernels.integrations.lightning import WholeBatchMean, whole_batch_mean

    def loss_of(module, logits, target):
        return whole_batch_mean(module, tlk.cross_entropy(logits, target, reduction="sum"), (target != -100).sum())

    step, module = lightning_step(loss_of, lambda: [WholeBatchMean()])
    report = check_normalisation(step, module, (1, 2, 4, 16))
    assert report.ok and max(line.difference for line in report.lines) < 1e-12
    whole = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is None for gradient in whole), "check_normalisation restores them"
    step(4)
    found = [parameter.grad for parameter in module.parameters()]
    loss = F.cross_entropy(module.net(inputs(torch.float64)), TARGET)
    expected = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-14)


def test_what_is_compared_has_micro_batches_with_different_counts():
    assert [int((part != -100).sum()) for part in TARGET.chunk(4)] == [2, 1, 4, 3]
