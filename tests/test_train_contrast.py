"""`tlkernels contrast`: its losses and scores, resuming, two encoders, learning, and what is refused."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from train_cases import (
    contrast_formula,
    metrics,
    quick,
    ranks_by_hand,
    same_bits,
    task_of,
    tiny_contrast_config,
    tiny_model,
    write_translations,
)

from tlkernels import timing
from tlkernels.train import UserError, compare, loop, pipeline, report
from tlkernels.train import check as normalisation
from tlkernels.train.encoders import load_embedder
from tlkernels.train.pairs import load_pairs
from tlkernels.train.task import OURS

pytestmark = pytest.mark.usefixtures(quick.__name__)
COLOURS = dict(
    zip(
        ["water", "bread", "rook", "fish", "mate", "wet", "hot", "loaf"],
        itertools.product((30, 225), repeat=3),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with models and data."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model(folder / "bert", dropout=0.1)
    tiny_model(folder / "narrow")
    narrow = transformers.AutoConfig.from_pretrained(folder / "narrow")
    narrow.hidden_size = 16
    transformers.BertModel(narrow).save_pretrained(folder / "narrow")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    write_translations(folder / "pairs.jsonl", 100)
    write_translations(folder / "hard.jsonl", 60, negatives=2)
    labelled = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    labelled = [json.dumps(row | {"label": row["query"].split()[0]}) + "\n" for row in labelled]
    (folder / "labelled.jsonl").write_text("".join(labelled))
    (folder / "pictures").mkdir()
    draw, listed = np.random.default_rng(0), []
    for number, names in enumerate(itertools.product(COLOURS, repeat=2)):
        halves = [draw.integers(-30, 31, (20, 10, 3)) + np.array(COLOURS[name]) for name in names]
        image = Image.fromarray(np.concatenate(halves, 1).clip(0, 255).astype(np.uint8))
        image.save(folder / f"pictures/{number}.png")
        listed.append({"file_name": f"{number}.png", "query": f"{names[0]} then the {names[1]}"})
    (folder / "pictures/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder


@pytest.fixture
def no_picture(monkeypatch):
    """A picture takes as long as the training."""
    monkeypatch.setattr(report, "_curves", lambda *_: None)


def config_of(made, place, loss="info_nce", data="pairs.jsonl", model="bert", key=None, run=None, **others):
    """Return a configuration; `others` are options of the loss, the model and the data by their names."""
    config = tiny_contrast_config(place, str(made / model), str(made / data), **(run or {}))
    config.loss.name, config.model.dropout = loss, None
    config.model.key_path = key and str(made / key)
    for name, value in others.items():
        part = next(part for part in (config.loss, config.model, config.data, config.optim) if hasattr(part, name))
        setattr(part, name, value)
    return config


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {name}": value for file in files for name, value in load_file(file).items()}


# ---- the scores --------------------------------------------------------------------------------------------------


def hidden_means(folder, values):
    """The embeddings of texts or images, one at a time, by the transformers model in a folder."""
    model, vectors = transformers.AutoModel.from_pretrained(folder).eval(), []
    images = not isinstance(values[0], str)
    process = (transformers.AutoImageProcessor if images else transformers.AutoTokenizer).from_pretrained(folder)
    for value in values:
        inputs = process(images=[value], return_tensors="pt") if images else process(value, return_tensors="pt")
        with torch.no_grad():
            vectors.append(model(**inputs).last_hidden_state[0].mean(0))
    return torch.stack(vectors)


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def check_scores(scores, query, key, ids, loss, labels=None, bias=None):
    """Against a loop; the loss is that of batches of 8 rows."""
    place = ranks_by_hand(query, query if key is None else key, ids, ids, key is None)
    total = 0.0
    for rows in torch.arange(len(query)).split(8):
        parts = (
            query[rows],
            None if key is None else key[rows],
            None,
            ids[rows],
            None if labels is None else ids[rows],
        )
        total += len(rows) * float(contrast_formula(loss, *parts, torch.tensor(1 / loss.temperature), bias))
    each = [1 / rank if 1 <= rank <= 10 else 0 for rank in place]
    assert scores.each == pytest.approx(each) and scores.count == len(query)
    assert scores.values["mrr10"] == pytest.approx(sum(each) / len(each))
    assert scores.values["recall1"] == pytest.approx(sum(rank == 1 for rank in place) / len(place))
    assert scores.values["recall10"] == pytest.approx(sum(1 <= rank <= 10 for rank in place) / len(place))
    assert scores.values["loss"] == pytest.approx(total / len(query), rel=1e-4)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_scores_follow_from_transformers_hidden_states(loss, made, tmp_path):
    pairs = [json.loads(line) for line in (made / "hard.jsonl").read_text().splitlines()][:30]
    lines = [{name: row[name] for name in row if name != "negative" or loss == "info_nce"} for row in pairs]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    query, key = (unit(hidden_means(made / "bert", [row[name] for row in pairs])) for name in ("query", "key"))
    for limit in (1, 3, None):
        data = {"data": "hard.jsonl", "negative_column": "negative" if loss == "info_nce" else "none"}
        config = config_of(made, tmp_path, loss, run={"micro_batch": limit}, eval=str(tmp_path / "eval.jsonl"), **data)
        task = task_of(config)
        scores = task.scores(task.start(), "eval")
        ids = task.rows["eval"].ids
        assert len(ids.unique()) == 27
        check_scores(scores, query, key, ids, config.loss, bias=torch.tensor(-10.0))


def test_scores_of_labelled_rows_leave_each_row_out_of_its_own_search(made, tmp_path):
    config = config_of(made, tmp_path, "sup_con", "labelled.jsonl", eval=str(made / "labelled.jsonl"))
    task = task_of(config)
    texts = [json.loads(line)["query"] for line in (made / "labelled.jsonl").read_text().splitlines()]
    labels = task.rows["eval"].labels
    assert [task.rows["eval"].labels[0] == label for label in labels] == [
        text.split()[0] == texts[0].split()[0] for text in texts
    ]
    query = unit(hidden_means(made / "bert", texts))
    scores = task.scores(task.start(), "eval")
    place = ranks_by_hand(query, query, labels, labels, True)
    assert scores.each == pytest.approx([1 / rank if 1 <= rank <= 10 else 0 for rank in place])
    assert scores.values["loss"] > 0


def test_the_views_are_dropouts_of_a_text_and_augmentations_of_an_image(made, tmp_path):
    """In each evaluation they are the same."""
    for data, model in (("pairs.jsonl", "bert"), ("pictures", "vit")):
        task = task_of(
            config_of(made, tmp_path, "nt_xent", data, model, query_column="query" if data[-1] == "l" else "x")
        )
        network, kept = task.start(), []
        task.alone = lambda q, k, *_, kept=kept: kept.append((q, k)) or 0.0
        state = torch.get_rng_state()
        first = task.scores(network.eval(), "eval")
        assert torch.equal(state, torch.get_rng_state()) and not network.training
        torch.rand(1)
        assert task.scores(network, "eval") == first
        for (q, k), (again, _) in zip(kept[: len(kept) // 2], kept[len(kept) // 2 :], strict=True):
            assert torch.equal(q, again) and not torch.allclose(q, k, atol=1e-3)
            assert (q * k).sum(1).median() > 0.5


# ---- training ----------------------------------------------------------------------------------------------------

RUNS = {
    "info_nce": {"data": "hard.jsonl", "dropout": True},
    "two encoders": {"key": "narrow", "dimensions": 8},
    "nt_xent": {"loss": "nt_xent"},
    "images": {"loss": "nt_xent", "data": "pictures", "model": "vit", "query_column": "none"},
    "sup_con": {"loss": "sup_con", "data": "labelled.jsonl"},
    "sigmoid": {"loss": "sigmoid", "dropout": True},
}


@pytest.mark.full
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_and_resumed_run_is_the_unbroken_one(kind, made, tmp_path):
    for name, stop in (("whole", None), ("stopped", 3)):
        pipeline.run(config_of(made, tmp_path / name, **RUNS[kind]), until=stop)
    assert not (tmp_path / "stopped/results.json").exists()
    pipeline.resume(tmp_path / "stopped")
    whole, resumed = tmp_path / "whole/trained", tmp_path / "stopped/trained"
    assert metrics(whole) == metrics(resumed) and len(metrics(whole)) == 9
    for kept in ("best", "last"):
        left, right = weights(whole / kept), weights(resumed / kept)
        assert same_bits(left, right) and "contrast.safetensors log_scale" in left
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "stopped")]
    assert results[0]["results"][1]["each"] == results[1]["results"][1]["each"]
    assert results[0]["verdict"] == results[1]["verdict"] and "MRR@10" in results[0]["verdict"]


@pytest.mark.parametrize("learnable", [True, False], ids=["learned", "fixed"])
def test_the_temperature_is_learned_down_to_a_hundredth_or_stays(learnable, made, tmp_path):
    config = config_of(made, tmp_path, "sigmoid", temperature=0.0101, learnable=learnable)
    config.optim.lr, task, seen = 0.5, task_of(config), []

    def wants_a_larger_scale(q, k, negatives, ids, labels, scale, bias):
        seen.append(scale.item())
        return -scale + 0.0 * (q.sum() + k.sum() + bias)

    task.losses[OURS] = wants_a_larger_scale
    loop.train(task, tmp_path, task.start)
    assert seen[0] == pytest.approx(1 / 0.0101, rel=1e-5)
    assert seen[1:] == pytest.approx([100.0 if learnable else seen[0]] * 5, rel=1e-6)
    saved = load_file(tmp_path / "last/contrast.safetensors")
    assert saved["log_scale"].item() == pytest.approx(math.log(seen[-1]), rel=1e-6)
    again = task.load(tmp_path / "last")
    assert torch.equal(again.log_scale, saved["log_scale"]) and torch.equal(again.bias, saved["bias"])
    assert again.log_scale.requires_grad == learnable


# ---- two encoders ------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("keys", ["texts", pytest.param("images", marks=pytest.mark.full)])
def test_two_encoders_learn_and_the_folder_has_both(keys, made, tmp_path):
    data, key = ("pairs.jsonl", "narrow") if keys == "texts" else ("pictures", "vit")
    run = {"steps": 30, "batch_size": 16, "micro_batch": 6, "eval_every": 15}
    config = config_of(made, tmp_path / "run", data=data, key=key, dimensions=8, test_fraction=0.3, run=run)
    config.optim.lr, config.data.query_length = 1e-2, 6
    pipeline.run(config)
    before, after = json.loads((tmp_path / "run/results.json").read_text())["results"]
    assert after["mrr10"] > before["mrr10"] + 0.2
    best, embedder = tmp_path / "run/trained/best", load_embedder(tmp_path / "run")
    sides = load_pairs(config.data, 0, "pairs")["test"]
    queries = sides.queries
    values = sides.keys if keys == "texts" else [row["image"] for row in sides.keys]
    maps = load_file(best / "contrast.safetensors")
    cut = [" ".join(query.split()[:4]) for query in queries]  # and two special tokens
    assert cut != queries or keys == "images"
    query = unit(hidden_means(best, cut) @ maps["maps.0.weight"].T)
    key = unit(hidden_means(best / "key", values) @ maps["maps.1.weight"].T)
    assert query.shape == (len(queries), 8)
    assert torch.allclose(embedder.queries(queries, batch_size=3), query, atol=1e-5)
    assert torch.allclose(embedder.keys(values), key, atol=1e-5)
    ids = torch.tensor(sides.ids)
    expected = [1 / rank if 1 <= rank <= 10 else 0 for rank in ranks_by_hand(query, key, ids, ids, False)]
    assert after["each"] == pytest.approx(expected, abs=1e-6)


def test_one_encoder_embeds_both_sides(made, tmp_path):
    config, best = config_of(made, tmp_path), tmp_path / "trained/best"
    task = task_of(config)
    best.mkdir(parents=True)
    task.save(best, task.start())
    (tmp_path / "config.json").write_text(config.to_json())
    embedder = load_embedder(tmp_path)
    assert not (best / "key").exists()
    texts = ["the river", "bread bakes hot", "the " * 200]
    expected = unit(hidden_means(best, [*texts[:2], "the " * 38]))  # of 40 positions
    for found in (embedder.queries(texts), embedder.keys(texts)):
        assert torch.allclose(found, expected, atol=1e-5)


# ---- what is learned, and what is said ---------------------------------------------------------------------------


@pytest.mark.full
def test_training_finds_translations_unless_the_rate_is_tiny(made, tmp_path):
    gains, verdicts = [], []
    for lr, steps in ((1e-2, 30), (1e-9, 3)):
        run = {"steps": steps, "batch_size": 24, "micro_batch": 9, "eval_every": 15}
        config = config_of(made, tmp_path / str(lr), eval_fraction=0.15, test_fraction=0.25, run=run)
        config.optim.lr = lr
        pipeline.run(config)
        contents = json.loads((tmp_path / str(lr) / "results.json").read_text())
        before, after = contents["results"]
        gains.append(after["mrr10"] - before["mrr10"])
        verdicts.append(contents["verdict"])
    assert gains[0] > 0.2 and abs(gains[1]) < 1e-6
    assert verdicts[0].startswith("After training the encoders find more: MRR@10 ")
    assert verdicts[1].startswith("After and before training cannot be told apart: MRR@10 ")


def test_the_verdict(made, tmp_path):
    task = task_of(config_of(made, tmp_path))

    def said(before, after):
        lines = [{"each": each, "mrr10": sum(each) / len(each), "count": len(each)} for each in (before, after)]
        return task.verdict(lines)

    low, high = [0.0, 0.5] * 8, [0.5, 1.0] * 8
    figures = "MRR@10 {} on 16 hold-out queries, {} (95 %)."
    assert said(low, high) == "After training the encoders find more: " + figures.format(
        "0.750 against 0.250", "+0.500 ± 0.000"
    )
    assert said(high, low) == "After training the encoders find less: " + figures.format(
        "0.250 against 0.750", "-0.500 ± 0.000"
    )
    # The differences are 1 and -0.8 in turn: their mean is 0.1, their deviation 0.9 sqrt(16 / 15).
    mixed = "0.500 against 0.400", f"+0.100 ± {1.96 * 0.9 * math.sqrt(16 / 15) / 4:.3f}"
    assert said([0.0, 0.8] * 8, [1.0, 0.0] * 8) == (
        "After and before training cannot be told apart: " + figures.format(*mixed)
    )
    assert said(low, low).startswith("After and before training cannot be told apart")


@pytest.mark.parametrize("micro_batch", [None, pytest.param(3, marks=pytest.mark.full)])
def test_losses_are_compared(micro_batch, made, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "interleaved", lambda ways, seconds, least: timing.interleaved(ways, 0.0, least))
    config = config_of(made, tmp_path, data="hard.jsonl", dropout=True, run={"micro_batch": micro_batch})
    config.run.compare_loss = 3
    task = task_of(config)
    comparison = compare.compare_losses(task, tmp_path, task.start)
    assert list(comparison["losses"]) == [OURS, "eager", *(["eager in slices"] if micro_batch else [])]
    for row in comparison["losses"].values():
        assert row["values"] == pytest.approx(comparison["losses"][OURS]["values"], rel=1e-5)
        assert row["difference"] < 1e-5 and row["step_seconds"] > row["loss_seconds"] > 0 and "peak_bytes" in row
    assert len(set(comparison["losses"][OURS]["values"])) == 3
    assert "do not count" not in comparison["text"] and "gathered" not in comparison["text"]


@pytest.mark.parametrize("loss", ["info_nce", pytest.param("sup_con", marks=pytest.mark.full)])
def test_the_normalisation_is_checked(loss, made, tmp_path, monkeypatch, capsys):
    alone = lambda config, task, model, count: normalisation._gradient(task, model, count)  # noqa: E731
    monkeypatch.setattr(normalisation, "_over_processes", alone)
    data = "labelled.jsonl" if loss == "sup_con" else "hard.jsonl"
    config = config_of(made, tmp_path, loss, data, run={"batch_size": 12, "micro_batch": None})
    assert normalisation.check(config)
    tables = capsys.readouterr().out.split("\n\n")
    ours, _, means = tables[1:4]
    assert ours.startswith("tlkernels contrast") and ours.count(" ok") >= 4 and "NOT OK" not in ours
    assert means.startswith("a loop that averages the means") and means.count("NOT OK") == 3


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "a large batch": ({"run": {"batch_size": 96}}, r"--run.batch_size must be at most 79, the training rows"),
    "a batch of one": ({"run": {"batch_size": 1}}, r"--run.batch_size must be 2 or more, got 1"),
    "hard negatives": ({"loss": "sigmoid", "data": "hard.jsonl"}, r"--data.negative_column applies to info_nce"),
    "built-in negatives": ({"loss": "sigmoid", "negatives": 2}, r"--data.negatives applies to info_nce"),
    "two encoders": ({"loss": "nt_xent", "key": "narrow"}, r"--model.key_path applies to pairs"),
    "labels": ({"loss": "sup_con", "path": None}, r"built-in data"),
    "one encoder": ({"data": "pictures"}, r"need two encoders: --model.path and --model.key_path"),
    "widths": ({"key": "narrow"}, r"--model.dimensions must be given: the encoders' widths are 32 and 16"),
    "equal views": ({"loss": "nt_xent", "dropout": False}, r"--model.dropout must not be false"),
    "symmetric": ({"loss": "sigmoid", "symmetric": False}, r"--loss.symmetric applies to info_nce, not to sigmoid"),
    "smoothing": ({"loss": "sup_con", "label_smoothing": 0.1}, r"--loss.label_smoothing applies to info_nce"),
    "bias": ({"bias": 1.0}, r"--loss.bias applies to sigmoid, not to info_nce"),
    "temperature": ({"temperature": 0.0}, r"--loss.temperature must be above 0"),
    "a low temperature": ({"temperature": 0.005}, r"--loss.temperature must be 0.01 or more if it is learned"),
    "dimensions": ({"dimensions": 0}, r"--model.dimensions must be 1 or more, got 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, made, tmp_path):
    options, message = REFUSED[what]
    config = config_of(made, tmp_path / "run", **{name: value for name, value in options.items() if name != "path"})
    if "path" in options:
        config.data.path = None
    with pytest.raises(UserError, match=message) as error:
        pipeline.run(config)
    assert "\n" not in str(error.value)
