"""The options of `tlkernels distill`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tlkernels.train.config import DataConfig, OptimConfig, Options, RunConfig, ScheduleConfig, check_data, require
from tlkernels.train.documents_config import CorpusConfig, check_corpus
from tlkernels.train.errors import UserError
from tlkernels.train.lm_config import MaskConfig


@dataclass
class TeacherConfig:
    """The network that teaches, and where its answers are kept.

    Args:
        path: A local folder (config.json, *.safetensors, a tokenizer), a .gguf file, a hub name, "smollm2", or the run
            folder of a finished `tlkernels lm`. None: SmolLM2-135M-Instruct.
        objective: causal: it predicts the next token; masked: masked tokens. auto: as its configuration says.
        top_k: Write the classes that the teacher finds most probable, this many of each token, to disk, and train from
            them without the teacher; causal models only. None: train with the teacher, unless there is a `cache`.
        cache: The folder of what `top_k` writes. One that is complete is read, and may be shared by runs. None: a
            folder of the run.
    """

    path: str | None = None
    objective: Literal["auto", "causal", "masked"] = "auto"
    top_k: int | None = None
    cache: str | None = None


@dataclass
class DistillOptimConfig(OptimConfig):
    """The optimiser, from torch."""

    lr: float = 5e-4


@dataclass
class StudentConfig:
    """The network that is trained: blocks of the teacher, or another model with the same vocabulary.

    Args:
        layers: How many of the teacher's blocks it begins with, spread evenly from the first to the last, or their
            numbers, counted from 0. None: half of them, and 10 of the 30 of SmolLM2.
        path: A pretrained student instead: a local folder, a .gguf file, a hub name, or a run folder.
        config: A new student instead: a config.json of transformers, which gets random weights.
        dropout: Whether the student's dropout is on.
    """

    layers: int | list[int] | None = None
    path: str | None = None
    config: str | None = None
    dropout: bool = False


@dataclass
class SoftLossConfig:
    """The loss between the teacher's and the student's logits, tlkernels.distillation.

    Args:
        divergence: forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); js: the Jensen-Shannon
            divergence; tv: the total variation.
        beta: The teacher's share in the mixture of `js`, above 0 and below 1.
        temperature: Divides the logits of both, above 0. The loss is multiplied by its square.
        temperature_end: The temperature of the last step, reached linearly. None: that of the first.
        hard_weight: Share of the cross entropy with the labels, 0 <= share <= 1.
        hard_weight_end: The share in the last step, reached linearly. None: that of the first.
        impl: The implementation that computes it. `tlkernels doctor` lists the available ones.
    """

    divergence: Literal["forward_kl", "reverse_kl", "js", "tv"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    temperature_end: float | None = None
    hard_weight: float = 0.0
    hard_weight_end: float | None = None
    impl: Literal["auto", "reference", "native", "triton"] = "auto"

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Return the temperature and the hard weight of a step."""
        share = step / max(1, steps - 1)

        def between(first: float, last: float | None) -> float:
            return first if last is None else first + (last - first) * share

        return between(self.temperature, self.temperature_end), between(self.hard_weight, self.hard_weight_end)


@dataclass
class DistillLossConfig(SoftLossConfig):
    """The loss, tlkernels.linear_distillation, or tlkernels.linear_topk_distillation from a cache.

    Args:
        tokens: Masked models only. all: every token of the text is distilled, and is its own label. masked: only
            masked tokens.
        tail: From a cache only: what becomes of the classes that it does not have. bucket: they are one more class;
            renormalize: they have no probability; ignore: they are left out.
    """

    tokens: Literal["all", "masked"] = "all"
    tail: Literal["bucket", "renormalize", "ignore"] = "bucket"


@dataclass
class HintConfig:
    """Hints (Romero et al. 2015, https://arxiv.org/abs/1412.6550): hidden states of the teacher for the student's.

    Args:
        blocks: Pairs of a block of the student and one of the teacher, counted from 0, such as [[0,2],[9,29]]. The mean
            squared error between their outputs is added to the loss, after a learned linear map of the student's.
        weight: Factor of the errors' sum over the pairs, above 0.
    """

    blocks: list[tuple[int, int]] = field(default_factory=list)
    weight: float = 1.0


@dataclass
class DistillRunConfig(RunConfig):
    """The run itself, and what the distilled student is compared with.

    Args:
        compare: Also train the student on the text alone, and, for a causal teacher, both with the teacher and from a
            cache. None: only on the built-in data.
    """

    compare: bool | None = None


@dataclass
class DistillConfig(Options):
    """All options of `tlkernels distill`."""

    command = "distill"
    summary = "Train a small language model to predict what a larger one predicts."

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: DistillLossConfig = field(default_factory=DistillLossConfig)
    hints: HintConfig = field(default_factory=HintConfig)
    optim: DistillOptimConfig = field(default_factory=DistillOptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: DistillRunConfig = field(default_factory=DistillRunConfig)

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        super().check()
        check_corpus(self.data)
        check_distillation(self.loss)
        teacher, student, hints = self.teacher, self.student, self.hints
        require(teacher.top_k is None or teacher.top_k >= 1, "teacher.top_k", "1 or more", teacher.top_k)
        require(0 < self.mask.probability < 1, "mask.probability", "above 0 and below 1", self.mask.probability)
        require(hints.weight > 0, "hints.weight", "above 0", hints.weight)
        check_student_options(student)
        cached = teacher.top_k is not None or teacher.cache is not None
        if cached and hints.blocks:
            raise UserError("--hints.blocks needs the teacher, and a cache (--teacher.top_k) has only its answers")
        if self.loss.tail != "bucket" and not cached and self.run.compare is not True:
            raise UserError("--loss.tail applies to a cache (--teacher.top_k)")


def check_distillation(loss: SoftLossConfig) -> None:
    """Raise `UserError` with the name of the first option of the loss whose value is out of range."""
    require(0 < loss.beta < 1, "loss.beta", "above 0 and below 1", loss.beta)
    for name in ("temperature", "temperature_end"):
        value = getattr(loss, name)
        require(value is None or value > 0, f"loss.{name}", "above 0", value)
    for name in ("hard_weight", "hard_weight_end"):
        value = getattr(loss, name)
        require(value is None or 0 <= value <= 1, f"loss.{name}", "0 <= share <= 1", value)


def check_student_options(student: StudentConfig) -> None:
    """Raise `UserError` if there is more than one student."""
    given = [name for name in ("layers", "path", "config") if getattr(student, name) is not None]
    if len(given) > 1:
        raise UserError(f"--student.{given[0]} and --student.{given[1]} exclude each other")


# ---- tlkernels distill-classifier --------------------------------------------------------------------------------


@dataclass
class ClassifierTeacherConfig:
    """The classifier that teaches.

    Args:
        path: The run folder of a finished `tlkernels finetune`.
    """

    path: str | None = None


@dataclass
class ClassifierLossConfig(SoftLossConfig):
    """The loss, tlkernels.distillation of the logits, and of rows with a label tlkernels.cross_entropy."""

    temperature: float = 2.0
    hard_weight: float = 0.5


@dataclass
class ClassifierRunConfig(RunConfig):
    """The run itself, and what the distilled student is compared with.

    Args:
        compare: Also train the student on the labels alone.
    """

    compare: bool = True


@dataclass
class DistillClassifierConfig(Options):
    """All options of `tlkernels distill-classifier`. Without options of the data, they are those of the teacher."""

    command = "distill-classifier"
    summary = "Train a small classifier to answer as a larger one does, which `tlkernels finetune` has trained."

    teacher: ClassifierTeacherConfig = field(default_factory=ClassifierTeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: ClassifierLossConfig = field(default_factory=ClassifierLossConfig)
    hints: HintConfig = field(default_factory=HintConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: ClassifierRunConfig = field(default_factory=ClassifierRunConfig)

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        super().check()
        check_data(self.data)
        check_distillation(self.loss)
        check_student_options(self.student)
        require(self.hints.weight > 0, "hints.weight", "above 0", self.hints.weight)
        if self.teacher.path is None:
            raise UserError("--teacher.path must be the run folder of a finished `tlkernels finetune`")
