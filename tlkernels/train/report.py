"""The results of a run: a table, a picture of the curves, and results.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from tlkernels.machine import machine
from tlkernels.timing import interleaved
from tlkernels.train import log
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.checkpoint import Progress, write_file
from tlkernels.train.gradcache import joined, leaves
from tlkernels.train.task import OURS, Loss, Scores, Task

LOSS_SECONDS = 0.5  # time to measure the loss of a training, ours and eager's in turns


# ---- one line of the table ---------------------------------------------------------------------------------------


def training_result(
    task: Task, stage: str, progress: Progress, scores: Scores, best: nn.Module, alone: dict[str, float] | None
) -> dict[str, Any]:
    """Return the table's line of a training. `alone` are the seconds of a step's loss, ours and eager's, if known.

    Otherwise they are measured on the trained network's features for the last step's batch, in its micro-batches.
    """
    run = task.config.run
    if alone is None:
        alone = loss_seconds(task, features(task, best, progress.step - 1, progress.micro_batch or run.micro_batch))
    step_seconds = progress.seconds / progress.step
    rest = progress.seconds - progress.compute_seconds - progress.data_seconds
    return {
        **result(stage, scores, task.batch_size * task.row_size / step_seconds, step_seconds),
        **loss_cost(alone, step_seconds),
        "data_share": progress.data_seconds / progress.seconds,
        "trainer_share": rest / progress.seconds,
        "steps": progress.step,
        "best_step": progress.best_step,
        "train_seconds": progress.seconds,
        **task.facts,
    }


def result(stage: str, scores: Scores, speed: float | None = None, step_seconds: float | None = None) -> dict[str, Any]:
    """Return what every line of the table has; `speed` in samples or tokens a second, if something was trained."""
    line = {"stage": stage, **scores.values, "count": scores.count}
    if scores.each:
        line["each"] = [round(value, 6) for value in scores.each]
    if speed is not None and step_seconds is not None:
        line |= {"speed": speed, "step_ms": step_seconds * 1e3}
    return line


@torch.no_grad()
def features(task: Task, network: nn.Module, step: int, micro_batch: int | None) -> list[tuple[Any, ...]]:
    """Return what the loss takes in each micro-batch of a step."""
    run, accelerator, rows = task.config.run, task.accelerator, task.rows["train"]
    batch = whole_batch(step, task.batch_size, len(rows), run.seed)
    pieces = micro_batches(batch, rows.lengths, micro_batch, accelerator.process_index, accelerator.num_processes)
    kept: list[tuple[Any, ...]] = []

    def keep(*arguments: Any) -> Tensor:
        kept.append(arguments)
        return torch.zeros(())

    for piece in pieces:
        if len(piece):
            network(*task.inputs("train", piece, step), keep)
    return [joined(kept)] if task.joint else kept


def way(task: Task, loss: Loss, batches: list[tuple[Any, ...]]) -> Callable[[], None]:
    """Return a function that computes a loss and its gradients for these arguments, from `features`."""
    calls = [(leaves(batch, task.features), batch[task.features :]) for batch in batches]

    def run() -> None:
        for features, rest in calls:
            with task.accelerator.autocast():
                value = loss(*features, *rest)
            value.backward()
            for leaf in features:
                if leaf is not None:
                    leaf.grad = None

    return run


def loss_seconds(task: Task, batches: list[tuple[Any, ...]]) -> dict[str, float]:
    """Return the seconds of a step's loss, forward and backward, for tlkernels and eager PyTorch."""
    eager = next(name for name in task.losses if name != OURS)
    ways = {name: way(task, task.losses[name], batches) for name in (OURS, eager)}
    seconds = interleaved(ways, LOSS_SECONDS, least=2)
    return {OURS: seconds[OURS], "eager": seconds[eager]}


def loss_cost(seconds: dict[str, float], step_seconds: float) -> dict[str, float]:
    """Return the cost of one step's loss in milliseconds and as a share of the step.

    The eager share refers to a step with the eager loss.
    """
    ours, eager = seconds[OURS], seconds["eager"]
    return {
        "loss_ms": ours * 1e3,
        "eager_loss_ms": eager * 1e3,
        "loss_share": ours / step_seconds,
        "eager_loss_share": eager / (step_seconds - ours + eager),
    }


# ---- the end of the run ------------------------------------------------------------------------------------------


def write(folder: Path, task: Task, results: list[dict[str, Any]], comparison: Any, seconds: float) -> None:
    """Print the table, and write results.json and curves.png into `folder`. `seconds` is the wall time so far."""
    rows = "hold-out" if task.rows["test"] is not task.rows["eval"] else "evaluation rows"
    text, closing = table(task, results, rows), task.verdict(results)
    _curves(folder, task, results, rows)
    contents = {
        "results": results,
        "verdict": closing,
        "comparison": comparison,
        "description": task.describe(),
        "rows": {side: len(rows) for side, rows in task.rows.items()},
        "train_fingerprint": task.rows["train"].fingerprint(),
        "wall_seconds": round(seconds, 1),
        "machine": machine(),
        "config": asdict(task.config),
    }
    write_file(folder / "results.json", json.dumps(contents, indent=2) + "\n")
    print(f"\n{text}\n{closing}\n" if closing else f"\n{text}\n")
    trained = next(name for name, stage in task.stages().items() if stage.start and stage.task is None)
    print(f"{seconds:.0f} s; in {folder}: results.json, curves.png, the model in {trained}/best")


def table(task: Task, results: list[dict[str, Any]], rows: str) -> str:
    """Return the final table; `rows` names the rows that were scored."""
    titles = {name: stage.title for name, stage in task.stages().items()}
    columns = [column for column in _columns(task) if any(column.key in row for row in results)]
    cells = [[column.title for column in columns]]
    cells += [[column.show(row[column.key]) if column.key in row else "" for column in columns] for row in results]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    names = [f"on the {rows}", *(titles[row["stage"]] for row in results)]
    first = max(map(len, names))
    lines = [
        f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for name, line in zip(names, cells, strict=True)
    ]
    if any("loss_share" in row for row in results):
        lines.append("(loss, data and trainer are shares of a step; eager loss: the share with PyTorch's loss)")
    return "\n".join(line.rstrip() for line in lines)


class _Column(NamedTuple):
    key: str
    title: str
    show: Callable[[Any], str]


def _columns(task: Task) -> list[_Column]:
    """Return the columns, of which the table has those that occur."""
    return [
        *(_Column(key, heading, _figure) for key, heading in task.headings.items()),
        _Column("speed", f"{task.unit}/s", "{:.1f}".format),
        _Column("peak_bytes", "peak GB", lambda value: "" if value is None else f"{value / 1e9:.2f}"),
        _Column("cache_bytes", "bytes/token", "{:.0f}".format),
        _Column("loss_share", "loss", "{:.3%}".format),
        _Column("eager_loss_share", "eager loss", "{:.3%}".format),
        _Column("data_share", "data", "{:.2%}".format),
        _Column("trainer_share", "trainer", "{:.2%}".format),
    ]


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _curves(folder: Path, task: Task, results: list[dict[str, Any]], rows: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    score, loss = figure.subplots(1, 2)
    stages = task.stages()
    for number, row in enumerate(results):
        if task.curve not in row:
            continue
        name = f"{stages[row['stage']].title} ({rows} {_figure(row[task.curve])})"
        if stages[row["stage"]].start is None:
            score.axhline(row[task.curve], color="tab:gray", linestyle="--", label=name)
            continue
        lines = log.read(folder / row["stage"] / "metrics.jsonl")
        trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        scored = [line for line in lines if "eval_loss" in line]
        steps = [line["step"] for line in scored]
        score.plot(steps, [line[f"eval_{task.curve}"] for line in scored], "o-", color=f"C{number}", label=name)
        loss.plot(*zip(*trained, strict=True), color=f"C{number}", alpha=0.5, linewidth=1)
        loss.plot(steps, [line["eval_loss"] for line in scored], "o-", color=f"C{number}")
    score.set(xlabel="step", ylabel=f"{task.headings[task.curve]} on the evaluation rows", xlim=(0, None))
    if task.curve == "perplexity":
        score.set_yscale("log")
    else:
        score.set_ylim(0, 1)
    loss.set(xlabel="step", ylabel="loss, nats (thin: training, dots: evaluation)", xlim=(0, None), ylim=(0, None))
    score.legend(loc="best", fontsize="small")
    for axes in (score, loss):
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.new.png", dpi=120)
    (folder / "curves.new.png").replace(folder / "curves.png")
