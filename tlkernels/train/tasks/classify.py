"""`tlkernels finetune`: classification of texts or images by a pretrained encoder with a linear head."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train import report
from tlkernels.train.batches import micro_batches
from tlkernels.train.config import Config, DataConfig
from tlkernels.train.data import IGNORE, Table, load_data
from tlkernels.train.errors import UserError, listed
from tlkernels.train.metrics import Tally
from tlkernels.train.model import (
    empty_encoder,
    load_model,
    load_preprocessor,
    new_classifier,
    positions,
    save_model,
    source,
)
from tlkernels.train.paths import absolute
from tlkernels.train.probe import linear_probe
from tlkernels.train.rows import ImageRows, LabelledRows, TextRows
from tlkernels.train.task import GATHERED, OURS, Loss, Scores, Stage, Task


class Classify(Task):
    """Classification. The loss is cross entropy, summed over the rows that have a label.

    Attributes:
        label_losses: the losses of logits and labels, with which evaluations measure the loss.
    """

    command = "finetune"
    headings: ClassVar[dict[str, str]] = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
    curve = "accuracy"
    unit, row_size = "samples", 1.0
    rows: dict[str, LabelledRows]
    label_losses: dict[str, Loss]

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        """Read the data. Raises `UserError` if they, an option or the model folder are wrong."""
        self.config, self.accelerator = config, accelerator
        with accelerator.main_process_first():  # it may download files for the others
            self.name = source(config.model.path)
            self.adapted = config.model.adapted and _adapted(config.model.adapted)
            self.read(config.data, config.run.seed)
        absolute(config.model, "path", "adapted")
        some_ignored = bool((self.rows["train"].labels == IGNORE).any())
        self.losses = self.label_losses = losses(config.loss.label_smoothing, config.loss.impl, gathered=some_ignored)

    def read(self, options: DataConfig, seed: int) -> None:
        """Read the rows for the encoder of `name`. Raises `UserError` if they, or an option, are wrong."""
        self.batch_size = self.config.run.batch_size or 32
        data = load_data(options, seed)
        self.preprocessor = load_preprocessor(self.name, data.images)
        limit = None if data.images else positions(empty_encoder(self.name))
        absolute(options, "path", *(side for side in ("eval", "test") if getattr(options, side) not in data.splits))
        max_length = min(options.tokens, limit or options.tokens)
        self.about: dict[str, Any] = {"classes": data.classes, "images": data.images, "max_length": max_length}

        def rows(table: Table) -> LabelledRows:
            if data.images:
                return ImageRows(table, self.preprocessor, len(data.classes))
            return TextRows(table, self.preprocessor, max_length, len(data.classes))

        self.rows = {"train": rows(data.train), "eval": rows(data.eval)}
        self.rows["test"] = rows(data.test) if data.test is not None else self.rows["eval"]

    def stages(self) -> dict[str, Stage]:
        """Return the fine-tuning, and where they are asked for a probe, an adapted and a random start."""
        run, seed, classes = self.config.run, self.config.run.seed, len(self.about["classes"])

        def new(name: str, random_weights: bool = False) -> Any:
            return lambda: new_classifier(name, classes, random_weights, seed)

        stages = {"finetuned": Stage("fine-tuned from pretrained", new(self.name))}
        if self.adapted:
            stages["adapted"] = Stage("fine-tuned from adapted", new(self.adapted))
        if run.compare if run.compare is not None else self.config.data.path is None:
            probe = Stage("frozen features + linear probe", measure=self._probe)
            stages = {"frozen": probe, **stages, "random": Stage("same network, random weights", new(self.name, True))}
        return stages

    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return the number of labelled rows; 1 if there is none."""
        return max(1, int((self.rows["train"].labels[numbers] != IGNORE).sum()))

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the encoder's inputs and the classes."""
        rows = self.rows[side]
        return rows.inputs(numbers, self.device), rows.labels[numbers].to(self.device)

    @torch.no_grad()
    def scores(self, network: nn.Module, side: str) -> Scores:
        """Return loss, accuracy and macro-F1."""
        training, accelerator, rows = network.training, self.accelerator, self.rows[side]
        network.eval()
        tally, loss = Tally(rows.classes, self.device), self.label_losses[OURS]
        everything = torch.arange(len(rows))
        for piece in micro_batches(everything, rows.lengths, 64, accelerator.process_index, accelerator.num_processes):
            inputs = self.inputs(side, piece if len(piece) else everything[:1], None)
            logits, target = network(*inputs, lambda logits, _: logits), inputs[1]
            if len(piece):
                tally.add(logits, target, loss(logits, target))
        tally.counts = accelerator.reduce(tally.counts, "sum")
        tally.loss = accelerator.reduce(tally.loss, "sum")
        network.train(training)
        return tally.scores()

    def save(self, folder: Path, network: nn.Module) -> None:
        """Write the encoder, the head, the preprocessor and the classes."""
        save_model(folder, network, self.preprocessor, self.about)

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        return load_model(folder)[0]

    def describe(self) -> str:
        """Return the data, the model and the number of steps."""
        sizes = {side: len(rows) for side, rows in self.rows.items()}
        apart = self.rows["test"] is not self.rows["eval"]
        hold_out = self.hold_out(sizes["test"])
        classes = self.about["classes"]
        sides = ("train", "eval", *["test"] * apart)
        unlabelled = sum(int((self.rows[side].labels == IGNORE).sum()) for side in sides)
        line = (
            f"{len(classes)} classes ({listed(classes)}): {sizes['train']} training, {sizes['eval']} evaluation, "
            f"{hold_out}; {f'{unlabelled} rows have no label' if unlabelled else 'every row has a label'}; "
            f"model {self.config.model.path or 'all-MiniLM-L6-v2'}, {self.steps} steps"
        )
        if not self.about["images"] and self.about["max_length"] < self.config.data.tokens:
            line += f"; texts longer than the model's {self.about['max_length']} positions are cut to them"
        return line

    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return whether pretrained beats random, and adapted pretrained, with 95 % intervals."""
        rows = {row["stage"]: row for row in results}
        pairs = [("Pretrained", "finetuned", "random weights", "random")]
        pairs.append(("Adapted", "adapted", "pretrained", "finetuned"))
        return "\n".join(
            versus(name, rows[better], other, rows[worse])
            for name, better, other, worse in pairs
            if {better, worse} <= rows.keys()
        )

    def _probe(self) -> dict[str, Any]:
        """Return the table's line of a linear probe; nothing in the other processes, which wait for it."""
        if not self.accelerator.is_main_process:
            return {}
        network = new_classifier(self.name, len(self.about["classes"]), random_weights=False, seed=self.config.run.seed)
        probe = linear_probe(self, network)
        speed = len(self.rows["train"]) / probe.seconds
        cost = report.loss_cost(report.loss_seconds(self, [(probe.logits, probe.target)]), probe.pass_seconds)
        chosen = {"penalty": probe.penalty, "eval_accuracy": probe.eval_scores.values["accuracy"]}
        return report.result("frozen", probe.scores, speed, probe.pass_seconds) | cost | chosen


def losses(label_smoothing: float, impl: str, gathered: bool) -> dict[str, Loss]:
    """Return tlkernels' and eager PyTorch's cross entropy, summed over the labelled rows; `gathered` adds a third."""
    options: Any = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": label_smoothing}

    def on_gathered(logits: Tensor, target: Tensor) -> Tensor:
        valid = target != IGNORE
        return functional.cross_entropy(logits[valid], target[valid], **options)

    ways: dict[str, Loss] = {
        OURS: tlk.CrossEntropyLoss(**options, impl=impl),
        "eager": partial(functional.cross_entropy, **options),
    }
    return ways | ({GATHERED: on_gathered} if gathered else {})


def versus(name: str, first: dict[str, Any], other: str, second: dict[str, Any]) -> str:
    """Return which of two lines of the table has the higher accuracy, if they can be told apart."""
    ours, theirs, n = first["accuracy"], second["accuracy"], first["count"]
    # The interval of two independent shares of n rows. Both have the same rows, which makes it too wide; related rows
    # would make it too narrow.
    margin = 1.96 * math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / n)
    difference = ours - theirs
    figures = (
        f"{ours:.3f} against {theirs:.3f} accuracy on {n} hold-out rows, "
        f"{difference * 100:+.1f} ± {margin * 100:.1f} points (95 %)"
    )
    if difference > margin:
        return f"{name} beats {other}: {figures}."
    if difference < -margin:
        verb = "beat" if other.endswith("s") else "beats"
        return f"{other.capitalize()} {verb} {name.lower()}: {figures}."
    return f"{name} and {other} cannot be told apart: {figures}."


def _adapted(path: str) -> str:
    """Return the folder of the network that a run of `tlkernels lm` adapted."""
    folder = Path(path).expanduser() / "trained" / "best"
    if not (folder / "config.json").is_file():
        raise UserError(f"--model.adapted must be the run folder of a finished `tlkernels lm`, got {path}")
    return str(folder.resolve())
