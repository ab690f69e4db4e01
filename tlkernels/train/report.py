"""The results of a run: a table, a picture of the curves, and results.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from tlkernels.train import log
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.checkpoint import Progress, write_file
from tlkernels.train.data import IGNORE
from tlkernels.train.errors import listed
from tlkernels.train.loop import Job
from tlkernels.train.machine import machine
from tlkernels.train.metrics import Scores
from tlkernels.train.model import Classifier
from tlkernels.train.probe import Probe
from tlkernels.train.timing import interleaved

LOSS_SECONDS = 0.5  # time to measure the loss of a training, ours and eager's in turns
NAMES = {
    "frozen": "frozen features + linear probe",
    "finetuned": "fine-tuned from pretrained",
    "random": "same network, random weights",
}


def describe(job: Job) -> str:
    """Return the first line of a run, which describes the data and the model."""
    sizes = {side: len(rows) for side, rows in job.rows.items()}
    apart = job.rows["test"] is not job.rows["eval"]
    hold_out = f"{sizes['test']} hold-out" if apart else "the evaluation rows are the hold-out"
    classes = job.about["classes"]
    unlabelled = sum(int((job.rows[side].labels == IGNORE).sum()) for side in ("train", "eval", *["test"] * apart))
    line = (
        f"{len(classes)} classes ({listed(classes)}): {sizes['train']} training, {sizes['eval']} evaluation, "
        f"{hold_out}; {f'{unlabelled} rows have no label' if unlabelled else 'every row has a label'}; "
        f"model {job.config.model.path or 'all-MiniLM-L6-v2'}, {job.steps} steps"
    )
    if not job.about["images"] and job.about["max_length"] < job.config.data.tokens:
        line += f"; texts longer than the model's {job.about['max_length']} positions are cut to them"
    return line


# ---- one line of the table ---------------------------------------------------------------------------------------


def probe_result(job: Job, probe: Probe) -> dict[str, Any]:
    """Return the table's line of a linear probe."""
    rows = len(job.rows["train"])
    cost = _loss_cost(job, [(probe.logits, probe.target)], probe.pass_seconds)
    chosen = {"penalty": probe.penalty, "eval_accuracy": probe.eval_scores.accuracy}
    return _result("frozen", probe.scores, rows / probe.seconds, probe.pass_seconds, cost) | chosen


@torch.no_grad()
def training_result(job: Job, stage: str, progress: Progress, scores: Scores, best: Classifier) -> dict[str, Any]:
    """Return the table's line of a training.

    The loss is timed on the trained network's logits for the last step's batch, in the step's micro-batches.
    """
    rows, run, device = job.rows["train"], job.config.run, job.accelerator.device
    batch = whole_batch(progress.step - 1, run.batch_size, len(rows), run.seed)
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    pieces = micro_batches(batch, rows.lengths, run.micro_batch, rank, world)
    logits = [(best(**rows.inputs(piece, device)), rows.labels[piece].to(device)) for piece in pieces]
    step_seconds = progress.seconds / progress.step
    cost = _loss_cost(job, logits, step_seconds)
    steps = {"steps": progress.step, "best_step": progress.best_step, "train_seconds": progress.seconds}
    return _result(stage, scores, run.batch_size / step_seconds, step_seconds, cost) | steps


def _result(stage: str, scores: Scores, speed: float, step_seconds: float, cost: dict[str, float]) -> dict[str, Any]:
    return {"stage": stage, **asdict(scores), "samples_per_s": speed, "step_ms": step_seconds * 1e3, **cost}


def _loss_cost(job: Job, batches: list[tuple[Tensor, Tensor]], step_seconds: float) -> dict[str, float]:
    """Return the cost of one step's loss, forward and backward, for tlkernels and eager PyTorch.

    In milliseconds and as a share of the step. The eager share refers to a step with the eager loss.
    """
    smoothing = job.config.loss.label_smoothing

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)

    def way(loss: Any) -> Any:
        leaves = [(logits.clone().requires_grad_(), target) for logits, target in batches]

        def run() -> None:
            for logits, target in leaves:
                torch.autograd.grad(loss(logits, target), logits)

        return run

    with torch.enable_grad():
        seconds = interleaved({"tlkernels": way(job.criterion), "eager": way(eager)}, LOSS_SECONDS)
    with_eager = step_seconds - seconds["tlkernels"] + seconds["eager"]
    return {
        "loss_ms": seconds["tlkernels"] * 1e3,
        "eager_loss_ms": seconds["eager"] * 1e3,
        "loss_share": seconds["tlkernels"] / step_seconds,
        "eager_loss_share": seconds["eager"] / with_eager,
    }


# ---- the end of the run ------------------------------------------------------------------------------------------


def write(folder: Path, job: Job, results: list[dict[str, Any]], seconds: float) -> None:
    """Print the table, and write results.json and curves.png into `folder`. `seconds` is the wall time so far."""
    rows = "hold-out" if job.rows["test"] is not job.rows["eval"] else "evaluation rows"
    text, closing = table(results, rows), verdict(results)
    _curves(folder, results, rows)
    contents = {
        "results": results,
        "verdict": closing,
        "description": describe(job),
        "classes": job.about["classes"],
        "rows": {side: len(rows) for side, rows in job.rows.items()},
        "train_fingerprint": job.rows["train"].fingerprint(),
        "wall_seconds": round(seconds, 1),
        "machine": machine(),
        "config": asdict(job.config),
    }
    write_file(folder / "results.json", json.dumps(contents, indent=2) + "\n")
    print(f"\n{text}\n{closing}\n" if closing else f"\n{text}\n")
    print(f"{seconds:.0f} s; in {folder}: results.json, curves.png, the model in finetuned/best")


def table(results: list[dict[str, Any]], rows: str) -> str:
    """Return the final table; `rows` names the rows that were scored."""
    lines = [
        f"{'on the ' + rows:<32} {'accuracy':>8} {'macro-F1':>8} {'samples/s':>9}   loss's share of a step",
        f"{'':<32} {'':>8} {'':>8} {'':>9}   tlkernels      eager",
    ]
    for row in results:
        lines.append(
            f"{NAMES[row['stage']]:<32} {row['accuracy']:>8.3f} {row['macro_f1']:>8.3f} {row['samples_per_s']:>9.1f}"
            f"   {row['loss_share']:>9.3%}  {row['eager_loss_share']:>9.3%}"
        )
    return "\n".join(lines)


def verdict(results: list[dict[str, Any]]) -> str:
    """Return whether pretrained beats random, with the 95 % interval of the difference; "" without both lines."""
    rows = {row["stage"]: row for row in results}
    if not {"finetuned", "random"} <= rows.keys():
        return ""
    ours, random = rows["finetuned"]["accuracy"], rows["random"]["accuracy"]
    n = rows["finetuned"]["rows"]
    # The interval of two independent shares of n rows. Both have the same rows, which makes it too wide; related rows
    # would make it too narrow.
    margin = 1.96 * math.sqrt((ours * (1 - ours) + random * (1 - random)) / n)
    difference = ours - random
    figures = (
        f"{ours:.3f} against {random:.3f} accuracy on {n} hold-out rows, "
        f"{difference * 100:+.1f} ± {margin * 100:.1f} points (95 %)"
    )
    if difference > margin:
        return f"Pretrained beats random weights: {figures}."
    if difference < -margin:
        return f"Random weights beat pretrained: {figures}."
    return f"Pretrained and random weights cannot be told apart: {figures}."


def _curves(folder: Path, results: list[dict[str, Any]], rows: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for row in results:
        name = f"{NAMES[row['stage']]} ({rows} {row['accuracy']:.3f})"
        if row["stage"] == "frozen":
            accuracy.axhline(row["eval_accuracy"], color="tab:gray", linestyle="--", label=name)
            continue
        color = "tab:blue" if row["stage"] == "finetuned" else "tab:orange"
        lines = log.read(folder / row["stage"] / "metrics.jsonl")
        trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        evaluated = [(line["step"], line["eval_accuracy"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        accuracy.plot(
            *zip(*[(step, value) for step, value, _ in evaluated], strict=True), "o-", color=color, label=name
        )
        loss.plot(*zip(*trained, strict=True), color=color, alpha=0.5, linewidth=1)
        loss.plot(*zip(*[(step, value) for step, _, value in evaluated], strict=True), "o-", color=color)
    accuracy.set(xlabel="step", ylabel="accuracy on the evaluation rows", xlim=(0, None), ylim=(0, 1))
    loss.set(xlabel="step", ylabel="loss, nats (thin: training, dots: evaluation)", xlim=(0, None), ylim=(0, None))
    accuracy.legend(loc="lower right", fontsize="small")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.new.png", dpi=120)
    (folder / "curves.new.png").replace(folder / "curves.png")
