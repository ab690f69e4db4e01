"""`tlkernels check-normalisation`: its tables, what they are compared with, its exit codes, and bad usage."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from train_cases import (
    made_rows,
    quick,
    tiny_causal_model,
    tiny_config,
    tiny_lm_config,
    tiny_masked_model,
    tiny_model,
    write_csv,
    write_texts,
)

from tlkernels import cli
from tlkernels.train import UserError, check, pipeline
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.task import OURS
from tlkernels.train.tasks import classify, lm

pytestmark = pytest.mark.usefixtures(quick.__name__)
KINDS = ["finetune", "causal", "masked"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Return model and data of each kind. Ragged: long texts have no label, and documents are not packed."""
    folder = tmp_path_factory.mktemp("made")
    rows = [row | {"label": "" if len(row["text"].split()) > 9 else row["label"]} for row in made_rows(60)]
    texts = write_texts(folder / "texts.jsonl", 60)
    return {
        "finetune": (tiny_model(folder / "encoder"), write_csv(folder / "rows.csv", rows)),
        "causal": (tiny_causal_model(folder / "causal"), texts),
        "masked": (tiny_masked_model(folder / "masked"), texts),
    }


@pytest.fixture
def one_process(monkeypatch):
    """Spawn none: what two processes would do, one does in two micro-batches."""
    alone = lambda config, task, model, count: check._gradient(task, model, count)  # noqa: E731
    monkeypatch.setattr(check, "_over_processes", alone)


def arguments(kind, paths, *more, batch_size=12):
    model, data = paths[kind]
    options = ["finetune"] if kind == "finetune" else ["lm", "--data.length=48", "--data.pack=false"]
    options += [f"--model.path={model}", f"--data.path={data}", "--run.device=cpu", f"--run.batch_size={batch_size}"]
    return ["check-normalisation", *options, *more]


def tables(printed):
    """Return the lines of each table by its title: the number, the factor, the difference and the verdict."""
    found = {}
    for part in printed.strip().split("\n\n")[1:]:  # the first describes the job
        title, _, *rest, _ = part.splitlines()
        lines = [re.fullmatch(r" *(\d+) +(\S+) +(\S+) +(\S+) +(ok|NOT OK)", line) for line in rest]
        found[title] = [(int(m[1]), float(m[2]), float(m[3]), m[5]) for m in lines]
    return found


def expected(kind, paths, tmp_path, batch_size=12):
    """Return factor and difference of the mean of means for 1 to 4 micro-batches, from plain PyTorch in float64."""
    make = tiny_config if kind == "finetune" else tiny_lm_config
    config = make(tmp_path, *paths[kind], batch_size=batch_size)
    if kind != "finetune":
        config.data.length, config.data.pack = 48, False
    task = pipeline.prepare(config, pipeline.start(config))
    rows = task.rows["train"]
    batch = whole_batch(0, batch_size, len(rows), 0)
    batch = batch[rows.lengths[batch].argsort(descending=True, stable=True)]
    network = task.start().double().eval()
    inputs, target, *_ = task.inputs("train", batch, 0)  # of the whole batch: masks do not depend on its pieces
    lines, whole = [], None
    for count in (1, 2, 3, 4):
        network.zero_grad()
        counted = []
        for piece in torch.arange(batch_size).tensor_split(count):
            part = {name: value[piece] for name, value in inputs.items()}
            logits = network.logits(**part) if kind == "finetune" else network.model(**part).logits
            mean = functional.cross_entropy(logits.flatten(0, -2), target[piece].flatten()).nan_to_num()
            (mean / count).backward()
            counted.append(int((target[piece] != -100).sum()))
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        whole = gradient if whole is None else whole
        lines.append((float(gradient @ whole / (whole @ whole)), float((gradient - whole).norm() / whole.norm())))
        assert count == 1 or len(set(counted)) > 1, "the micro-batches are not ragged"
    return lines


def test_the_trainers_gradient_is_ok_and_the_mean_of_means_is_off_by_the_factor_of_float64(
    paths, tmp_path, one_process, capsys
):
    for kind in KINDS:
        assert cli.main(arguments(kind, paths)) == 0
        printed = capsys.readouterr().out
        found = tables(printed)
        command = "finetune" if kind == "finetune" else "lm"
        titles = [f"tlkernels {command}", "the same, over processes"]
        titles += ["a loop that averages the means of its micro-batches, on the same rows"]
        assert list(found) == titles
        ours, processes, means = found.values()
        assert [line[0] for line in ours] == [line[0] for line in means] == [1, 2, 3, 4]
        assert [line[0] for line in processes] == [1, 2]
        for _, factor, difference, verdict in ours + processes:
            assert verdict == "ok" and factor == 1 and difference < 1e-5
        for (count, *figures, verdict), right in zip(means, expected(kind, paths, tmp_path), strict=True):
            assert verdict == ("ok" if count == 1 else "NOT OK")
            assert figures[0] == pytest.approx(right[0], abs=6e-4)
            assert figures[1] == pytest.approx(right[1], rel=6e-3, abs=1e-6)
        assert max(line[2] for line in means) > 0.01
        for text in ("number of micro-batches, up to a rounding", "number of processes, up to a rounding"):
            assert text in printed
        assert "The gradient depends on the number of micro-batches: with " in printed


@pytest.mark.full
def test_over_two_processes(paths, capfd):
    """Two processes that are started for it, with 6 rows each in two micro-batches."""
    assert cli.main(arguments("finetune", paths)) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    _, two = tables(printed.out)["the same, over processes"]
    assert two[0] == 2 and two[1] == 1.0 and two[3] == "ok"
    assert 0 < two[2] < 1e-5, "other sums round in another way"


def test_dropout_does_not_disturb_it(paths, tmp_path, one_process, capsys):
    model = tiny_model(tmp_path / "model", dropout=0.5)
    assert cli.main(arguments("finetune", {"finetune": (model, paths["finetune"][1])})) == 0
    assert [line[3] for line in tables(capsys.readouterr().out)["tlkernels finetune"]] == ["ok"] * 4


# ---- tasks that are broken on purpose ----------------------------------------------------------------------------


def wrong_gradient(divisor_of):
    """Return a `loop.gradient` that divides each micro-batch by `divisor_of(task, piece, pieces)`."""

    def gradient(task, model, batch, step, progress):
        pieces = micro_batches(batch, task.rows["train"].lengths, progress.micro_batch)
        for piece in pieces:
            loss = model(*task.inputs("train", piece, step), task.losses[OURS])
            (loss / divisor_of(task, piece, pieces)).backward()

    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_counts_the_rows_of_each_piece_is_found(kind, paths, tmp_path, one_process, monkeypatch, capsys):
    monkeypatch.setattr(check, "gradient", wrong_gradient(lambda task, piece, pieces: task.divisor(piece, 0)))
    assert cli.main(arguments(kind, paths)) == 1
    found = tables(capsys.readouterr().out)
    ours = found[f"tlkernels {'finetune' if kind == 'finetune' else 'lm'}"]
    right = expected(kind, paths, tmp_path)  # means, not divided by their number
    for (count, factor, *_), (mean_factor, _) in zip(ours, right, strict=True):
        assert factor == pytest.approx(count * mean_factor, abs=4 * 6e-4)
    assert ours[0][3] == "ok" and ours[2][3] == ours[3][3] == "NOT OK"  # a half without labels changes nothing


def test_a_loss_that_is_a_mean_is_found(paths, one_process, monkeypatch, capsys):
    monkeypatch.setattr(classify.tlk, "CrossEntropyLoss", lambda **_: nn.CrossEntropyLoss())
    assert cli.main(arguments("finetune", paths)) == 1
    assert "NOT OK" in {line[3] for line in tables(capsys.readouterr().out)["tlkernels finetune"]}


def test_a_loss_of_tokens_that_is_a_mean_is_found(paths, one_process, monkeypatch, capsys):
    real = lm.tlk.linear_cross_entropy

    def mean(*arguments, num_valid, **options):
        return real(*arguments, num_valid=num_valid, **options) / num_valid

    monkeypatch.setattr(lm.tlk, "linear_cross_entropy", mean)
    assert cli.main(arguments("causal", paths)) == 1
    assert "NOT OK" in {line[3] for line in tables(capsys.readouterr().out)["tlkernels lm"]}


def test_a_step_that_is_wrong_in_two_processes_alone_is_found(paths, monkeypatch, capsys):
    def doubled(config, task, model, count):
        check._gradient(task, model, 1)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= count

    monkeypatch.setattr(check, "_over_processes", doubled)
    assert cli.main(arguments("finetune", paths)) == 1
    found = tables(capsys.readouterr().out)
    assert {line[3] for line in found["tlkernels finetune"]} == {"ok"}
    assert found["the same, over processes"][1] == (2, 2.0, 1.0, "NOT OK")


# ---- usage -------------------------------------------------------------------------------------------------------


def fails(arguments, text, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tlkernels: ") and printed.err.count("\n") == 1, printed.err
    assert text in printed.err


def test_bad_usage_is_one_line_and_2(paths, capsys):
    usage = "check-normalisation takes the name of a command (finetune, lm"
    fails(["check-normalisation"], usage, capsys)
    fails(["check-normalisation", "dance"], usage, capsys)
    fails(["check-normalisation", "--run.batch_size=8"], usage, capsys)
    fails(arguments("finetune", paths, "--run.batch_sizes=8"), "--run.batch_sizes", capsys)
    fails(arguments("finetune", paths, "--resume=run"), "--resume", capsys)
    fails(arguments("finetune", paths, "--run.steps=0"), "--run.steps must be 1 or more, got 0", capsys)
    too_few = "--run.batch_size must be at least 4 for this check, got 3"
    fails(arguments("finetune", paths, batch_size=3), too_few, capsys)
    fails(arguments("causal", paths, batch_size=3), too_few, capsys)


def test_it_does_not_run_in_several_processes(paths, tmp_path, monkeypatch):
    task = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2), batch_size=8)
    monkeypatch.setattr(pipeline, "prepare", lambda *_: task)
    with pytest.raises(UserError, match="starts its own processes; run it without torchrun or accelerate launch"):
        check.check(tiny_config(tmp_path, *paths["finetune"]))


def test_it_writes_nothing(paths, tmp_path, one_process, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments("finetune", paths, "--run.folder=run")) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [
    8,
    12,
    6,
])  # fmt: skip
def test_the_lines_are_those_of_the_micro_batches_that_were_made(batch_size, paths, one_process, monkeypatch, capsys):
    counts = []

    def counting(batch, lengths, limit):
        pieces = micro_batches(batch, lengths, limit)
        counts.append(len(pieces))
        return pieces

    monkeypatch.setattr(check, "micro_batches", counting)
    assert cli.main(arguments("finetune", paths, batch_size=batch_size)) == 0
    means = list(tables(capsys.readouterr().out).values())[2]
    assert [line[0] for line in means][1:] == counts[-len(means) + 1 :]
