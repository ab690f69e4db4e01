"""`--compare-loss`: the same steps with tlkernels' loss and with PyTorch's, and what is said about them."""

import json
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from train_cases import (
    made_rows,
    metrics,
    plain_step,
    quick,
    same_bits,
    task_of,
    tiny_causal_model,
    tiny_config,
    tiny_lm_config,
    tiny_masked_model,
    tiny_model,
    weights,
    write_csv,
    write_texts,
)

from tlkernels import cli, timing
from tlkernels.train import RunError, UserError, compare, loop, pipeline
from tlkernels.train.batches import whole_batch
from tlkernels.train.compare import compare_losses, in_words
from tlkernels.train.task import GATHERED

pytestmark = pytest.mark.usefixtures(quick.__name__)

NAMES = {
    "finetune": ["tlkernels", "eager"],
    "finetune patchy": ["tlkernels", "eager", "eager on gathered rows"],
    "causal": ["tlkernels", "eager"],
    "masked": ["tlkernels", "eager", "eager on gathered rows"],
}


@pytest.fixture(autouse=True)
def _no_time_for_the_loss(monkeypatch):
    monkeypatch.setattr(compare, "interleaved", lambda ways, seconds, least: timing.interleaved(ways, 0.0, least))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from the kind of job, a folder and options of the run to its configuration."""
    folder = tmp_path_factory.mktemp("made")
    rows = made_rows(60)
    patchy = [row | {"label": "" if len(row["text"].split()) > 9 else row["label"]} for row in rows]
    texts = write_texts(folder / "texts.jsonl", 60)
    encoder = tiny_model(folder / "encoder")
    parts = {
        "finetune": (tiny_config, encoder, write_csv(folder / "rows.csv", rows)),
        "finetune patchy": (tiny_config, encoder, write_csv(folder / "patchy.csv", patchy)),
        "causal": (tiny_lm_config, tiny_causal_model(folder / "causal"), texts),
        "masked": (tiny_lm_config, tiny_masked_model(folder / "masked"), texts),
    }

    def config(kind, place, **run):
        make, model, data = parts[kind]
        return make(place, model, data, **run)

    return config


def plain_losses(task, count):
    """Return the losses of the first steps in float64: PyTorch's logits, loss, AdamW and clipping, whole batches.

    The learning rate rises over the first of six steps and then falls to 0.
    """
    network = task.start().double().train()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    losses = []
    for step in range(count):
        batch = whole_batch(step, 8, len(task.rows["train"]), task.config.run.seed)
        inputs, target, *_ = task.inputs("train", batch, step)
        logits = network.logits(**inputs) if hasattr(network, "logits") else network.model(**inputs).logits
        loss = functional.cross_entropy(logits.flatten(0, -2), target.flatten())
        plain_step(network, optimizer, loss, step)
        losses.append(loss.item())
    return losses


QUICK = ("masked",)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind not in QUICK)) for kind in NAMES])
def test_the_losses_are_those_of_a_plain_loop_and_the_training_is_that_without_a_comparison(
    kind, made, tmp_path, capsys
):
    pipeline.run(made(kind, tmp_path / "without"))
    capsys.readouterr()
    config = made(kind, tmp_path / "run", compare_loss=4)
    pipeline.run(config)
    printed = capsys.readouterr().out

    comparison = json.loads((tmp_path / "run/comparison.json").read_text())
    assert comparison["steps"] == 4
    assert list(comparison["losses"]) == NAMES[kind]
    expected = plain_losses(task_of(config), 4)
    assert len(set(expected)) == 4
    for row in comparison["losses"].values():
        assert row["values"] == pytest.approx(expected, rel=1e-5)
        assert row["values"] == pytest.approx(comparison["losses"]["tlkernels"]["values"], rel=1e-5)
        assert row["difference"] < 1e-5
        assert row["step_seconds"] > row["loss_seconds"] > 0
        assert row["loss_share"] == pytest.approx(row["loss_seconds"] / row["step_seconds"])
        assert row["bound"] == pytest.approx(1 / (1 - row["loss_share"]))
        assert row["speedup"][1] <= row["speedup"][0] <= row["speedup"][2]
    assert comparison["losses"]["tlkernels"]["speedup"] == [1.0, 1.0, 1.0]
    assert comparison["text"] == in_words(comparison["losses"])
    assert f"\n{comparison['text']}\n" in printed
    assert printed.index(comparison["text"]) < printed.index("are shares of a step")
    picture = (tmp_path / "run/compare_loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert not list((tmp_path / "run").glob("*.new*"))
    assert json.loads((tmp_path / "run/results.json").read_text())["comparison"] == comparison
    assert json.loads((tmp_path / "without/results.json").read_text())["comparison"] is None

    name = "finetuned" if "finetune" in kind else "trained"
    assert metrics(tmp_path / "run" / name) == metrics(tmp_path / "without" / name)
    trained = [line["loss"] for line in metrics(tmp_path / "run" / name) if "loss" in line]
    assert trained[:4] == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_the_comparison_changes_no_bit_of_a_training_with_dropout(made, tmp_path):
    """Dropout draws random numbers, and the comparison sets their seed."""
    for name, steps in (("without", None), ("with", 3)):
        config = made("finetune", tmp_path / name, compare_loss=steps)
        config.model.path = tiny_model(tmp_path / "dropout", dropout=0.1)
        pipeline.run(config)
    left, right = (tmp_path / name / "finetuned" for name in ("without", "with"))
    assert metrics(left) == metrics(right)
    assert same_bits(weights(left / "last"), weights(right / "last"))


@pytest.mark.full
def test_resuming_does_not_compare_again(made, tmp_path, monkeypatch, capsys):
    pipeline.run(made("finetune", tmp_path / "run", compare_loss=3), until=2)
    before = (tmp_path / "run/comparison.json").read_text()
    capsys.readouterr()
    monkeypatch.setattr(pipeline, "compare_losses", lambda *_: pytest.fail("compared again"))
    pipeline.resume(tmp_path / "run")
    assert (tmp_path / "run/comparison.json").read_text() == before
    assert json.loads((tmp_path / "run/results.json").read_text())["comparison"] == json.loads(before)


def test_several_processes_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "task_class", lambda _: lambda *_: SimpleNamespace(batch_size=8))
    with pytest.raises(UserError, match=r"^--run\.compare_loss takes one process, got 2$"):
        pipeline.prepare(made("finetune", tmp_path, compare_loss=3), SimpleNamespace(num_processes=2))


def test_a_loss_that_runs_out_of_memory_drops_out(made, tmp_path, capsys):
    task = task_of(made("masked", tmp_path, compare_loss=3))
    real, calls = task.losses["eager"], []

    def fails(*arguments):
        calls.append(1)
        if len(calls) > 4:  # in the second step
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        return real(*arguments)

    task.losses["eager"] = fails
    comparison = compare_losses(task, tmp_path, lambda: task.start())
    assert list(comparison["losses"]) == ["tlkernels", "eager on gathered rows"]
    assert comparison["text"].endswith("\neager ran out of memory.") and "eager ran" in capsys.readouterr().out
    task.losses["tlkernels"], calls[:] = fails, [1] * 4
    with pytest.raises(RunError, match=r"out of memory: give a smaller --run.micro_batch"):
        compare_losses(task, tmp_path, lambda: task.start())


def test_a_step_without_a_label_is_compared_too(made, tmp_path):
    config = made("finetune patchy", tmp_path, batch_size=1, micro_batch=None, compare_loss=6)
    comparison = compare_losses(task_of(config), tmp_path, lambda: task_of(config).start())
    assert 0.0 in comparison["losses"]["eager"]["values"]
    assert all(row["difference"] < 1e-5 for row in comparison["losses"].values())


def test_the_memory_is_that_of_parameters_states_gradients_and_activations(made, tmp_path):
    """Adam has two states of the size of the parameters; with few tokens there is almost nothing else."""
    config = made("finetune", tmp_path, compare_loss=3, batch_size=2, micro_batch=None)
    task = task_of(config)
    network = task.start()
    network.head = torch.nn.Sequential(
        torch.nn.Linear(32, 1 << 18, bias=False), torch.nn.Linear(1 << 18, 32, bias=False), torch.nn.Linear(32, 3)
    )
    bytes_of = sum(p.nbytes for p in network.parameters())
    comparison = compare_losses(task, tmp_path, lambda: network)
    peaks = [row["peak_bytes"] for row in comparison["losses"].values()]
    if peaks[0] is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert peaks == pytest.approx([4 * bytes_of] * 2, rel=0.1)


# ---- what is said about it ---------------------------------------------------------------------------------------


def figures(step=1.0, loss=0.25, speedup=(1.0, 1.0, 1.0), peak=10**9):
    return {
        "values": [1.0],
        "step_seconds": step,
        "speedup": list(speedup),
        "peak_bytes": peak,
        "loss_seconds": loss,
        "loss_share": loss / step,
        "bound": step / (step - loss),
        "difference": 2.5e-7,
    }


def sentence(**eager):
    return in_words({"tlkernels": figures(), "eager": figures(**eager)}).splitlines()[-1]


def test_the_table():
    lines = in_words({"tlkernels": figures(), "eager": figures(step=1.5, loss=0.75, peak=2 * 10**9)}).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["tlkernels", "1.000", "1.00", "GB", "25.00%", "at", "most", "1.333", "×"]
    assert lines[2].split() == ["eager", "1.500", "2.00", "GB", "50.00%", "at", "most", "2.000", "×"]
    assert "not measured" in in_words({"tlkernels": figures(peak=None), "eager": figures(peak=None)})


def test_what_is_said_of_a_gain():
    said = sentence(step=1.5, speedup=(1.5, 1.25, 1.75), peak=4 * 10**9)
    assert said == (
        "Against eager: the step is 1.50 times as fast (1.25 to 1.75), with 0.25 of the memory; "
        "the losses of the steps differ by at most 2.5e-07 of their value."
    )
    assert "memory" not in sentence(peak=None)


def test_where_no_loss_can_gain_that_is_said():
    said = sentence(loss=0.01, speedup=(1.0, 0.9, 1.1))
    assert said.endswith("No loss can gain speed here: one that costs nothing would make the step at most 1 % faster.")
    assert "No loss can gain" not in sentence(loss=0.02, speedup=(1.0, 0.9, 1.1))  # 1 / 0.98 > 1.02


def test_where_pytorchs_loss_is_faster_that_is_said():
    assert sentence(speedup=(0.8, 0.7, 0.9)).endswith(" Here PyTorch's loss is the faster one.")
    assert "PyTorch's" not in sentence(speedup=(0.98, 0.9, 1.01))


def test_a_difference_within_the_noise_or_of_less_than_two_percent_is_no_gain():
    for speedup in ((1.05, 0.99, 1.2), (0.98, 0.9, 1.01)):
        assert sentence(speedup=speedup).endswith(" The steps' times vary by more than that.")
    assert sentence(speedup=(1.01, 1.005, 1.015)).endswith(" That is hardly a gain in speed.")


@pytest.mark.parametrize(("gathered", "share"), [(1.2, "80%"), (1.0, "100%"), (0.9, "100%"), (1.5, None), (1.6, None)])
def test_how_much_of_the_gain_comes_from_gathered_rows(gathered, share):
    rows = {"tlkernels": figures(1.0), "eager": figures(2.0, speedup=(2, 2, 2)), GATHERED: figures(gathered)}
    said = in_words(rows).splitlines()[-1]
    if share is None:  # half of it or less
        assert said.startswith(f"Against {GATHERED}")
    else:
        assert said == (
            f"{share} of the time gained against eager comes from leaving out the rows that do not count, "
            f"which `{GATHERED}` does as well."
        )
    slower = in_words(rows | {"tlkernels": figures(2.5)}).splitlines()[-1]
    assert slower.startswith(f"Against {GATHERED}"), "there is no gain"


@pytest.mark.parametrize(("steps", "expected"), [(5, [2.0, 2.0, 2.25]), (3, [2.0, 2.0, 2.0])])
def test_the_figures_follow_from_the_times(steps, expected):
    """The first two steps are left out."""

    def run(seconds, losses):
        return SimpleNamespace(seconds=seconds[:steps], losses=losses, peak=100, state_bytes=lambda: 11)

    eager = run([9.0, 2.0, 4.0, 4.0, 5.0], [2.0, 4.0])
    ours = run([1.0, 2.0, 2.0, 2.0, 2.0], [2.0, 5.0])
    row = compare._measured(eager, ours, 1.0)
    assert row["speedup"] == expected  # eager's time divided by ours: above 1, ours is faster
    assert compare._measured(ours, ours, 1.0)["speedup"] == [1.0, 1.0, 1.0]
    step = 4.0
    assert row["step_seconds"] == step
    assert row["loss_share"] == 1 / step and row["bound"] == pytest.approx(step / (step - 1))
    assert row["difference"] == pytest.approx(0.25)  # of 5 and 4
    assert row["peak_bytes"] == 111


# ---- the command line --------------------------------------------------------------------------------------------


def arguments(config, command):
    options = [command, f"--model.path={config.model.path}", f"--data.path={config.data.path}", "--run.device=cpu"]
    return [*options, f"--run.folder={config.run.folder}", "--run.batch_size=4", "--run.steps=1"]


@pytest.mark.full
def test_the_short_form_of_the_option(made, tmp_path, capsys):
    code = cli.main([*arguments(made("finetune", tmp_path / "run"), "finetune"), "--compare-loss"])
    assert code == 0, capsys.readouterr().err
    comparison = json.loads((tmp_path / "run/comparison.json").read_text())
    assert comparison["steps"] == 10 and len(comparison["losses"]["eager"]["values"]) == 10
    assert json.loads((tmp_path / "run/config.json").read_text())["run"]["compare_loss"] == 10


@pytest.mark.parametrize("command", ["finetune", "lm"])
def test_zero_steps_are_refused(command, made, tmp_path, capsys):
    kind = {"finetune": "finetune", "lm": "causal"}[command]
    code = cli.main([*arguments(made(kind, tmp_path / "run"), command), "--run.compare_loss=0"])
    assert code == 2
    assert capsys.readouterr().err == "tlkernels: --run.compare_loss must be 3 or more, got 0\n"
    assert not (tmp_path / "run").exists()


# ---- the trainer itself ------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_trainer_takes_at_most_two_percent_more_than_a_bare_loop(tmp_path, monkeypatch):
    """The times of a step of the trainer and of two bare loops, A and B, which are done in turns.

    The overhead is the median over steps of trainer / A, less 1. Its noise: the 95 % interval of that median, from the
    quartiles of the ratios, and how far the median of B / A is from 1.
    """
    from transformers import BertConfig, BertModel

    rows = [
        {"text": " ".join(row["text"] for row in made_rows(9, seed)), "label": "ab"[seed % 2]} for seed in range(80)
    ]
    model = tiny_model(tmp_path / "model")
    config = BertConfig(
        vocab_size=2000, hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(model)
    steps = 60
    config = tiny_config(tmp_path / "run", model, write_csv(tmp_path / "rows.csv", rows), steps=steps, eval_every=None)
    config.run.batch_size, config.run.micro_batch = 16, None
    task = task_of(config)
    batches = [task.inputs("train", whole_batch(step, 16, len(task.rows["train"]), 0), step) for step in range(4)]
    assert batches[0][0]["input_ids"].shape == (16, 64)

    def bare():
        network, loss = task.start().train(), task.losses["tlkernels"]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

        def step(number):
            started = time.perf_counter()
            inputs, target = batches[number % len(batches)]
            (network(inputs, target, loss) / 16).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - started

        return step

    a, b = bare(), bare()
    times, real, started = {"trainer": [], "a": [], "b": []}, loop.whole_batch, None

    def whole_batch_after_bare_steps(step, *arguments):
        """Called at the start of each step of the trainer: the time since the last call is that of a step."""
        nonlocal started
        if started is not None:
            times["trainer"].append(time.perf_counter() - started)
        for name in ("ab", "ba")[step % 2]:
            times[name].append({"a": a, "b": b}[name](step))
        started = time.perf_counter()
        return real(step, *arguments)

    monkeypatch.setattr(loop, "whole_batch", whole_batch_after_bare_steps)
    loop.train(task, tmp_path / "run", lambda: task.start())

    # A step's time is that before the next one. The first steps warm up; those with an evaluation are left out.
    kept = [step for step in range(5, steps - 1) if (step + 1) % (steps // 4)]
    pairs = {name: [times[name][step] / times["a"][step] for step in kept] for name in ("trainer", "b")}
    middle = {name: statistics.median(ratios) for name, ratios in pairs.items()}
    low, _, high = statistics.quantiles(pairs["trainer"], n=4)
    noise = 1.96 * 1.253 * (high - low) / 1.349 / len(kept) ** 0.5 + abs(middle["b"] - 1)
    step = statistics.median(times["a"])
    print(f"a bare step {step * 1e3:.0f} ms; the trainer {middle['trainer'] - 1:+.2%}, noise {noise:.2%}")
    assert step > 0.1
    assert middle["trainer"] - 1 < 0.02 + noise
