"""`tlkernels distill-classifier`: a small classifier learns to answer as a larger one does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train import report
from tlkernels.train.config import Config, DataConfig
from tlkernels.train.data import IGNORE
from tlkernels.train.distill_config import DistillClassifierConfig, SoftLossConfig
from tlkernels.train.errors import UserError, listed
from tlkernels.train.model import load_model, save_model
from tlkernels.train.paths import absolute
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.student import check_hints, new_classifier_student
from tlkernels.train.task import OURS, Loss, Stage
from tlkernels.train.tasks.classify import Classify, losses, versus
from tlkernels.train.teaching import Lesson, Taught, Teacher, load_maps, save_maps


class DistillClassifier(Classify):
    """Distillation of a classifier. The loss is summed over all rows; those without a label have only the teacher's.

    Attributes:
        soft: whether the student learns from the teacher; otherwise from the labels alone.
    """

    command = "distill-classifier"
    soft = True

    def __init__(self, config: DistillClassifierConfig, accelerator: Accelerator) -> None:
        """Read the teacher and the rows. Raises `UserError` if they or an option are wrong."""
        self.config, self.accelerator = config, accelerator
        run = Path(config.teacher.path or "").expanduser()
        best = (run / "finetuned" / "best").resolve()
        if not (best / "about.json").is_file():
            raise UserError(f"--teacher.path must be the run folder of a finished `tlkernels finetune`, got {run}")
        self.name = str(best)
        teacher, about = load_model(best)
        with accelerator.main_process_first():  # it may download files for the others
            known = Config.load(run / "config.json")  # with its seed, the hold-out is the teacher's
            own = config.data != DataConfig()
            self.read(config.data if own else known.data, config.run.seed if own else known.run.seed)
        for what in ("classes", "images"):
            if about[what] != self.about[what]:
                raise UserError(f"the {what} of the rows are {self.about[what]}, those of the teacher {about[what]}")
        absolute(config.teacher, "path")
        absolute(config.student, "path", "config")
        student = new_classifier_student(config, teacher, self.preprocessor)
        check_hints(config.hints, student.encoder, teacher.encoder)
        self.teacher = Teacher(lambda: for_evaluation(accelerator, load_model(best)[0].requires_grad_(False)))
        self.losses = soft_losses(config.loss)
        self.label_losses = losses(0.0, config.loss.impl, gathered=False)

    def stages(self) -> dict[str, Stage]:
        """Return the teacher, and the student trained with it, and for comparison on the labels alone."""
        stages = {"teacher": Stage("teacher", measure=self._measure_teacher)}
        if self.config.run.compare:
            alone = copy.copy(self)
            alone.soft, alone.losses = False, self.label_losses
            stages["labels"] = Stage("student trained on labels alone", alone.start, task=alone)
        return stages | {"distilled": Stage("student distilled", self.start)}

    def start(self) -> nn.Module:
        """Return the network with which a training starts."""
        student = new_classifier_student(self.config, load_model(Path(self.name))[0], self.preprocessor)
        torch.manual_seed(self.config.run.seed)  # of the maps
        return self._taught(student)

    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return the number of rows; without the teacher, of those that have a label, or 1."""
        return len(numbers) if self.soft else super().divisor(numbers, step)

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the encoder's inputs, the classes, and in training the lesson."""
        taught = side == "train" and step is not None and self.soft
        return *super().inputs(side, numbers, step), Lesson(*self.config.loss.at(step, self.steps)) if taught else None

    def save(self, folder: Path, network: Any) -> None:
        """Write the student, the preprocessor, the classes, and the maps of the hints."""
        save_model(folder, network.student, self.preprocessor, self.about)
        save_maps(folder, network)

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        network = self._taught(load_model(folder)[0])
        load_maps(folder, network)
        return network

    def describe(self) -> str:
        """Return the data, the networks and the number of steps."""
        sizes, classes = {side: len(rows) for side, rows in self.rows.items()}, self.about["classes"]
        hold_out = self.hold_out(sizes["test"])
        unlabelled = int((self.rows["train"].labels == IGNORE).sum())
        student = self.config.student.path or self.config.student.config or "of its blocks"
        return (
            f"distillation of a classifier with {len(classes)} classes ({listed(classes)}): {sizes['train']} training "
            f"rows, {unlabelled} of them without a label, {sizes['eval']} evaluation, {hold_out}; "
            f"teacher {self.config.teacher.path}, student {student}, {self.steps} steps"
        )

    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return whether the distilled student beats the one that was trained on labels alone, and what is lost."""
        rows = {row["stage"]: row for row in results}
        said = [versus("The teacher", rows["teacher"], "the student", rows["distilled"])]
        if "labels" in rows:
            said.append(versus("The distilled student", rows["distilled"], "the labels alone", rows["labels"]))
        return "\n".join(said)

    def _taught(self, student: nn.Module) -> Taught:
        return Taught(student, self.teacher, self.config.hints) if self.soft else Taught(student)

    def _measure_teacher(self) -> dict[str, Any]:
        network = for_evaluation(self.accelerator, Taught(self.teacher.network))
        return report.result("teacher", self.scores(network, "test"))


def soft_losses(config: SoftLossConfig) -> dict[str, Loss]:
    """Return tlkernels' loss of a classifier's rows, and the lines that PyTorch's users write; summed over the rows."""

    def ours(logits: Tensor, target: Tensor, teacher: tuple[Any, ...], lesson: Lesson) -> Tensor:
        temperature, share = lesson.temperature, lesson.hard_weight
        soft = tlk.distillation(
            logits, teacher[0], temperature=temperature, divergence=config.divergence, beta=config.beta,
            reduction="sum", impl=config.impl,
        )  # fmt: skip
        if not share:
            return soft
        hard = tlk.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum", impl=config.impl)
        return (1 - share) * soft + share * hard

    def eager(logits: Tensor, target: Tensor, teacher: tuple[Any, ...], lesson: Lesson) -> Tensor:
        temperature, share = lesson.temperature, lesson.hard_weight
        if config.divergence == "forward_kl":
            soft = temperature**2 * functional.kl_div(
                functional.log_softmax(logits / temperature, -1), functional.softmax(teacher[0] / temperature, -1),
                reduction="sum",
            )  # fmt: skip
        else:
            options: Any = {"divergence": config.divergence, "beta": config.beta, "impl": "reference"}
            soft = tlk.distillation(logits, teacher[0], temperature=temperature, reduction="sum", **options)
        hard = functional.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return (1 - share) * soft + share * hard

    return {OURS: ours, "eager": eager}
