"""`tlkernels doctor --host hf`: what would be served, by what, and what is refused."""

import pytest
import torch
from hf_models import CACHED, MODELS, SIZES, build

from tlkernels import cli
from tlkernels.integrations import hf


def doctor(model, folder, capsys):
    model.save_pretrained(folder)
    capsys.readouterr()
    assert cli.main(["doctor", "--host", "hf", "--model", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "BERT"])
def test_a_language_models_head_and_its_parts(name, tmp_path, capsys):
    lines = doctor(build(*MODELS[name][:2], dtype=torch.float32), tmp_path, capsys)
    head = next(line for line in lines if line.startswith("head"))
    wanted = {
        "Gemma2": ", no bias, tied to the input embeddings, temperature 1, softcap 3",
        "Granite": ", no bias, temperature 6, no softcap",
        "BERT": ", bias, tied to the input embeddings, temperature 1, no softcap",
    }
    assert head.endswith("Linear 32 -> 97" + wanted[name])
    shifted = ", shifted to the next token" if name != "BERT" else ""
    assert any(line.startswith("task") and line.endswith(f"with labels{shifted}") for line in lines)
    for part, loss in (("training, no logits", "linear_cross_entropy"), ("evaluation, on the", "cross_entropy")):
        k = next(k for k, line in enumerate(lines) if line.startswith(part))
        assert lines[k].endswith(f": {loss}") and lines[k + 1].startswith(f"  {loss}(impl='auto'): served by native")
    assert any("label_smoothing_factor" in line for line in lines if line.startswith("refused"))
    assert "one line  Trainer(model=hf.patch(model), ...)   # from tlkernels.integrations import hf" in lines


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({"num_labels": 5}, "training and evaluation: cross_entropy"),
        ({"num_labels": 1}, "training and evaluation: mse"),
        (
            {"num_labels": 5, "problem_type": "multi_label_classification"},
            "training and evaluation: binary_cross_entropy_with_logits of PyTorch; there is no kernel for it here",
        ),
    ],
)
def test_classifiers(options, served, tmp_path, capsys):
    model = build("BertForSequenceClassification", SIZES | options, dtype=torch.float32)
    assert served in doctor(model, tmp_path, capsys)


def test_what_is_refused_has_its_reason(tmp_path, capsys):
    lines = doctor(build("BertModel", SIZES, dtype=torch.float32), tmp_path / "encoder", capsys)
    assert lines[-1].startswith("refused   BertModel is no model of a task that is known here")
    model = build("EsmForMaskedLM", SIZES, dtype=torch.float32)  # adds a bias of its own to the logits
    lines = doctor(model, tmp_path / "esm", capsys)
    refused = next(k for k, line in enumerate(lines) if line.startswith("refused"))
    assert "EsmForMaskedLM's logits also depend on lm_head.bias" in lines[refused]
    assert lines[refused + 1] == "instead, compute_loss_func(model) on the logits: cross_entropy"
    with pytest.raises(hf.UnreadableHead):
        hf.patch(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "hf"], "--host and --model: expected both, and no other option"),
        (["--host", "hf", "--model", "smollm2", "--shape", "8,8"], "--host and --model: expected both"),
        (["--host", "timm", "--model", "x"], "argument --host: invalid choice: 'timm'"),
        (["--host", "hf", "--model", "/nowhere"], "no such model folder: /nowhere"),
    ],
)
def test_bad_usage_is_one_line_and_2(arguments, message, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_whose_configuration_names_no_class(tmp_path, capsys):
    model = build("LlamaForCausalLM", CACHED, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "Unknown"))
    assert cli.main(["doctor", "--host", "hf", "--model", str(tmp_path)]) == 2
    assert "config.json names no class of transformers in architectures, got 'Unknown'" in capsys.readouterr().err
