"""Metrics, the final table, its verdict, and the comparison with a probe and with random weights."""

import json
import math

import pytest
import torch
from train_cases import made_rows, quick, tiny_config, tiny_model, write_csv

from tlkernels.timing import interleaved
from tlkernels.train import pipeline
from tlkernels.train.metrics import Tally
from tlkernels.train.task import Scores
from tlkernels.train.tasks.classify import Classify

pytestmark = pytest.mark.usefixtures(quick.__name__)


def test_scores_are_scikit_learns():
    from sklearn import metrics as sklearn  # comes with the packaged model

    torch.manual_seed(0)
    logits, target = torch.randn(50, 7), torch.randint(0, 5, (50,))
    logits[:, 6] = -9  # class 6 neither occurs nor is predicted; class 5 is only predicted
    target[::7] = -100
    tally = Tally(7)
    for start in range(0, 50, 8):
        rows = slice(start, start + 8)
        loss = torch.nn.functional.cross_entropy(logits[rows], target[rows], reduction="sum")
        tally.add(logits[rows], target[rows], loss)
    scores = tally.scores()
    valid = target >= 0
    predicted = logits.argmax(1)[valid]
    assert scores.count == int(valid.sum())
    assert scores.values["accuracy"] == pytest.approx(sklearn.accuracy_score(target[valid], predicted))
    assert scores.values["macro_f1"] == pytest.approx(sklearn.f1_score(target[valid], predicted, average="macro"))
    assert scores.values["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-6)
    assert Tally(3).scores() == Scores({"loss": 0.0, "accuracy": 0.0, "macro_f1": 0.0}, (0.0, 0.0), 0)


def test_better_is_by_accuracy_then_by_loss():
    def scores(loss, right):
        """Of ten rows of one class."""
        tally = Tally(2)
        tally.counts[:, 1] = torch.tensor([right, 10, 10])
        tally.loss += 10 * loss
        return tally.scores()

    middle = scores(1.0, 5)
    assert middle.better_than(None)
    assert not middle.better_than(middle)
    assert scores(2.0, 6).better_than(middle)
    assert scores(0.9, 5).better_than(middle)
    assert not scores(0.9, 4).better_than(middle)


def lines(finetuned, random, rows=500):
    return [{"stage": "finetuned", "accuracy": finetuned, "count": rows}, {"stage": "random", "accuracy": random}]


def verdict(results):
    return Classify.verdict(None, results)


def test_the_verdict_follows_from_the_figures():
    assert verdict(lines(0.9, 0.5)).startswith("Pretrained beats random weights: 0.900 against 0.500")
    assert verdict(lines(0.5, 0.9)).startswith("Random weights beat pretrained: 0.500 against 0.900")
    assert verdict(lines(0.52, 0.5)).startswith("Pretrained and random weights cannot be told apart")
    assert verdict(lines(0.9, 0.5, rows=5)).startswith("Pretrained and random weights cannot be told apart")
    assert verdict(lines(0.9, 0.5)[:1]) == ""
    margin = 196 * math.sqrt((0.09 + 0.25) / 500)
    assert f"+40.0 ± {margin:.1f} points" in verdict(lines(0.9, 0.5))


def test_three_trainings_end_in_one_table(tmp_path, capsys):
    paths = tiny_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", made_rows(60))
    pipeline.run(tiny_config(tmp_path / "run", *paths, compare=True, log_every=2))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["stage"] for row in results["results"]] == ["frozen", "finetuned", "random"]
    for row in results["results"]:
        assert 0 <= row["macro_f1"] <= 1 and row["count"] == 9
        assert row["speed"] > 0 and row["step_ms"] > 0
        assert 0 < row["loss_share"] < 1 and 0 < row["eager_loss_share"] < 1
        assert row["loss_share"] == pytest.approx(row["loss_ms"] / row["step_ms"])
        assert f" {row['accuracy']:.3f} {row['macro_f1']:.3f} {row['speed']:.1f} " in " ".join(printed.split())
    assert results["verdict"] == verdict(results["results"]) and results["verdict"] in printed
    assert results["machine"]["packages"]["torch"] == torch.__version__
    assert results["config"]["run"]["seed"] == 0 and results["wall_seconds"] > 0
    picture = (tmp_path / "run/curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    steps = [json.loads(line) for line in (tmp_path / "run/random/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [2, 4, 6]

    losses = [
        json.loads(line)["loss"]
        for stage in ("finetuned", "random")
        for line in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" not in line
    ]
    assert len(set(losses)) == len(losses) == 6, "both trainings started from the same weights"

    # Resuming a finished run only prints the table again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/**/*") if path.is_file()}
    pipeline.resume(tmp_path / "run")
    assert len(before) > 20
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert results["verdict"] in capsys.readouterr().out


def test_the_probe_learns_what_the_features_tell(tmp_path):
    from accelerate import Accelerator

    from tlkernels.train.probe import linear_probe

    rows = made_rows(120)
    rows[5]["label"] = ""  # left out of the fit, not a class
    paths = tiny_model(tmp_path / "model"), write_csv(tmp_path / "rows.csv", rows)
    task = pipeline.prepare(tiny_config(tmp_path / "run", *paths), Accelerator(cpu=True))
    probe = linear_probe(task, task.stages()["finetuned"].start())
    labelled = int((task.rows["train"].labels >= 0).sum())
    assert probe.logits.shape == (labelled, 3) and probe.target.shape == (labelled,)
    assert (probe.logits.argmax(1) == probe.target).float().mean() > 0.9
    assert probe.scores.values["accuracy"] > 0.6  # a third by chance
    assert probe.pass_seconds < probe.seconds


def test_interleaved_measures_in_turns():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, least=3)
    assert order == ["a", "b"] * 4  # once each to warm up
    assert set(times) == {"a", "b"} and all(seconds > 0 for seconds in times.values())
