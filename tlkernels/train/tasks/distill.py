"""`tlkernels distill`: a small language model learns to predict what a larger one predicts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from tlkernels.train import language, report
from tlkernels.train.blocks import block_list
from tlkernels.train.checkpoint import write_folder
from tlkernels.train.distill_config import DistillConfig
from tlkernels.train.errors import UserError
from tlkernels.train.language import LanguageModel
from tlkernels.train.lm_config import LmModelConfig
from tlkernels.train.memory import halved, out_of_memory
from tlkernels.train.model import load_from
from tlkernels.train.packing import IGNORE, Batch
from tlkernels.train.paired import paired_difference
from tlkernels.train.paths import absolute
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.stopping import stopped
from tlkernels.train.student import check_student, head_rows, new_student
from tlkernels.train.task import Stage
from tlkernels.train.tasks.lm import losses as text_losses
from tlkernels.train.teacher_cache import (
    Identity,
    TeacherCache,
    file_digest,
    is_complete,
    open_cache,
    tokenizer_digest,
    write_cache,
    written_top_k,
)
from tlkernels.train.teaching import (
    Lesson,
    Taught,
    Teacher,
    cached_losses,
    live_losses,
    load_maps,
    most_probable,
    save_maps,
)
from tlkernels.train.token_task import TokenTask

TOP_K = 32  # of a cache, if it is not given


class Distill(TokenTask):
    """Distillation. The loss is that of the student's head and the teacher's, summed over the tokens with a target.

    Attributes:
        way: what the student learns from: "live", the teacher itself; "cached", its answers on disk; or "text" alone.
    """

    command = "distill"
    verb = "are distilled"
    sources = 9  # the demonstration trains the student three times
    _answers: TeacherCache | None = None

    def __init__(self, config: DistillConfig, accelerator: Accelerator) -> None:
        """Read the teacher, the student and the documents. Raises `UserError` if they or an option are wrong."""
        self.config, self.accelerator = config, accelerator
        self.compare = config.data.path is None if config.run.compare is None else config.run.compare
        teacher = self.read(config.teacher.path or "smollm2", config.teacher.objective, LmModelConfig())
        given = config.teacher.top_k is not None or config.teacher.cache is not None
        if given and not self.causal:
            raise UserError(
                "--teacher.top_k and --teacher.cache apply to causal models; this one's masks are new in every step"
            )
        if self.causal and config.loss.tokens != "all":
            raise UserError("--loss.tokens applies to masked models; this one is causal")
        student = new_student(config, teacher, self.causal)
        check_student(config, teacher, student, self.tokenizer, self.length, self.causal)
        absolute(config.teacher, "path")
        if config.teacher.cache is not None:  # it need not exist yet
            config.teacher.cache = str(Path(config.teacher.cache).expanduser().resolve())
        absolute(config.student, "path", "config")
        blocks = [str(len(block_list(network.model)[1])) for network in (student, teacher)]
        self.about = config.student.path or config.student.config or f"of {blocks[0]} of its {blocks[1]} blocks"
        self.vocabulary = head_rows(teacher)
        written = written_top_k(self._folder) if given else None
        self.top_k = config.teacher.top_k or written or min(TOP_K, self.vocabulary)
        self.teacher = Teacher(self._read_teacher, self._frozen(teacher))
        self._set_way("cached" if given else "live")
        if given and is_complete(self._folder):
            self.top_k = self.answers.top_k  # raises if the cache does not fit

    def stages(self) -> dict[str, Stage]:
        """Return the teacher, the student as it begins, and the student's trainings."""
        stages = {
            "teacher": Stage("teacher", measure=lambda: self._measured("teacher", self.teacher.network)),
            "student": Stage("student before", measure=self._measure_student),
        }
        titles = {"live": "student distilled live", "cached": "student distilled from the cache"}
        others = ["live" if self.way == "cached" else "cached"] if self.compare else []
        if not self.causal or self.config.hints.blocks:  # of which there is no cache
            others = []
        cached = {self.way: self, **{way: self._sibling(way) for way in others}}.get("cached")
        if cached is not None:  # before any training, as it may not fit
            title = f"the teacher's {self.top_k} best classes on disk"
            stages["cache"] = Stage(title, measure=cached.write_answers)
        stages["distilled"] = Stage(titles[self.way], self.start)
        if self.compare:  # after the training with the teacher, which is then still in memory
            text = self._sibling("text")
            stages["text"] = Stage("student trained on text alone", text.start, task=text)
        for way in others:
            other = cached if way == "cached" and cached is not None else self._sibling(way)
            stages[way] = Stage(titles[way], other.start, task=other)
        return stages

    @property
    def usual_batch_size(self) -> int:
        """The number of rows of a step if none is given; few in the demonstration, for more steps."""
        return 2 if self.causal and self.config.data.path is None else super().usual_batch_size

    @property
    def target_share(self) -> float:
        """The share of the training tokens that has a target."""
        share = super().target_share
        return share / self.config.mask.probability if self.every_token else share

    @property
    def every_token(self) -> bool:
        """Whether a masked model distils every token of the text, not only masked ones."""
        return not self.causal and self.config.loss.tokens == "all"

    def start(self) -> nn.Module:
        """Return the network with which the distillation starts."""
        if self.way == "cached":
            self.write_answers()  # --run.compare_loss comes before the stages
        student = self.new_student()
        torch.manual_seed(self.config.run.seed)  # of the maps
        return self._taught(student)

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the model's inputs, the targets, their number, and in training the lesson."""
        arguments = super().inputs(side, numbers, step)
        if step is None or side != "train" or self.way == "text":
            return *arguments, None
        lesson = Lesson(*self.config.loss.at(step, self.steps))
        if self.way == "cached":
            classes, log_probs = (values.to(self.device) for values in self.answers.rows(numbers))
            lesson = lesson._replace(classes=classes, log_probs=log_probs)
        return *arguments, lesson

    def targets(self, side: str, numbers: Tensor, step: int | None) -> tuple[Batch, Tensor, Tensor]:
        """Return the rows, the token ids that the models get, and the targets, in training also of unmasked tokens."""
        batch, ids, target = super().targets(side, numbers, step)
        if self.every_token and side == "train" and self.way != "text":
            target = torch.where(batch.counted, batch.ids.to(target.dtype), IGNORE)
        return batch, ids, target

    def save(self, folder: Path, network: Any) -> None:
        """Write the student, its tokenizer, and the maps of the hints."""
        language.save(folder, network.student, self.tokenizer, {"causal": self.causal, "max_length": self.length})
        save_maps(folder, network)

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        network = self._taught(language.load(folder, LmModelConfig(dropout=self.config.student.dropout)))
        load_maps(folder, network)
        return network

    def describe(self) -> str:
        """Return the data, the networks and the number of steps."""
        source = f"its {self.top_k} best classes on disk" if self.way == "cached" else "the teacher in memory"
        return (
            f"distillation: {self.describe_rows()}; teacher {self.config.teacher.path or 'SmolLM2-135M-Instruct'}, "
            f"student {self.about}; {self.config.loss.divergence} from {source}, "
            f"{self.steps} steps of {self.batch_size} rows"
        )

    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return the student's perplexity before and after, and what distillation gains over the text, row by row."""
        lines = {row["stage"]: row for row in results}
        before, after = lines["student"], lines["distilled"]
        said = [
            f"The student's perplexity on {after['count']} hold-out tokens goes from {before['perplexity']:.2f} to "
            f"{after['perplexity']:.2f}; the teacher's is {lines['teacher']['perplexity']:.2f}."
        ]
        if cache := lines.get("cache"):
            mass, size = cache["mass"], cache["cache_bytes"]
            said.append(f"The cache takes {size:.0f} bytes a token, for {mass:.1%} of the teacher's probability.")
        names = {"distilled": self.way, "live": "live", "cached": "cached"}
        for stage, way in names.items():
            if stage in lines and "text" in lines:
                name = "Distilled live" if way == "live" else "Distilled from the cache"
                said.append(self._gain(name, lines[stage], lines["text"]))
        return "\n".join(said)

    def new_student(self) -> LanguageModel:
        """Return the student as it begins. Once it has been measured it is on disk, and needs no teacher."""
        if self._beginning is not None and self._beginning.is_dir():
            return language.load(self._beginning, LmModelConfig(dropout=self.config.student.dropout))
        return new_student(self.config, self.teacher.network, self.causal)

    @property
    def answers(self) -> TeacherCache:
        """The cache, which must fit the teacher and the rows. Raises `UserError` if it does not, or is not complete."""
        if self._answers is None:
            self._answers = open_cache(self._folder, self._identity(), self.config.teacher.top_k)
            self.facts = {"cache_bytes": self._answers.bytes_per_token}
        return self._answers

    def write_answers(self) -> dict[str, Any] | None:
        """Write what the cache lacks, and return its line of the table; None if the run is asked to stop.

        A complete cache is only read.
        """
        limit, accelerator = self.config.run.micro_batch or 8, self.accelerator

        def best(numbers: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal limit
            while True:
                try:
                    return self._best(numbers.split(limit))
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    limit = halved(min(limit, len(numbers)), 1, error)  # no other process waits for this one's shard
                torch.cuda.empty_cache()
                print(f"the teacher's answers: out of memory; going on with {limit} rows at a time", flush=True)

        complete = is_complete(self._folder) or write_cache(
            self._folder, self._identity(), self.top_k, self.rows["train"].counts, best,
            rank=accelerator.process_index, world=accelerator.num_processes,
            stop=lambda: stopped(accelerator), wait=accelerator.wait_for_everyone,
        )  # fmt: skip
        if not complete:
            return None
        cache = self.answers
        return {"stage": "cache", "mass": cache.mass, "cache_bytes": cache.bytes_per_token, "top_k": cache.top_k}

    # ---- parts -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _best(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the teacher's most probable classes of some rows, and their log-probabilities."""
        found: list[tuple[Tensor, Tensor]] = []

        def keep(*head: Any) -> Tensor:
            found.append(most_probable(head, self.top_k))
            return torch.zeros(())

        for part in parts:
            self.teacher.network(*super().inputs("train", part, None), keep)
        index, log_probs = zip(*found, strict=True)
        return torch.cat(index), torch.cat(log_probs)

    def _set_way(self, way: str) -> None:
        self.way, self._answers, self.facts = way, None, {}
        if way == "text":
            self.losses = text_losses(self.config.loss.impl, 0.0, gathered=self.some_ignored)
        elif way == "live":
            self.losses = live_losses(self.config.loss, gathered=self.some_ignored and not self.every_token)
        else:
            self.losses = cached_losses(self.config.loss)

    def _sibling(self, way: str) -> Distill:
        """Return the task that trains the same student on the same rows in another way."""
        other = copy.copy(self)
        other._set_way(way)
        return other

    def _read_teacher(self) -> nn.Module:
        return self._frozen(language.new_model(self.name, self.extra, self.causal, LmModelConfig()))

    def _frozen(self, teacher: LanguageModel) -> nn.Module:
        return for_evaluation(self.accelerator, teacher.requires_grad_(False))

    def _taught(self, student: LanguageModel) -> Taught:
        if self.way == "live":
            self.teacher.network  # noqa: B018  # loaded before the first step, whose time is measured
            return Taught(student, self.teacher, self.config.hints)
        self.teacher.release()
        return Taught(student)

    def _measured(self, stage: str, network: LanguageModel) -> dict[str, Any]:
        return report.result(stage, self.scores(for_evaluation(self.accelerator, Taught(network)), "test"))

    def _measure_student(self) -> dict[str, Any]:
        student = self.new_student()
        place = self._beginning
        if self.accelerator.is_main_process and place is not None and not place.is_dir():
            write_folder(place, lambda new: self.save(new, Taught(student)))
        return self._measured("student", student)

    @property
    def _beginning(self) -> Path | None:
        folder = self.config.run.folder  # None in check-normalisation
        return None if folder is None else Path(folder) / "student" / "start"

    @property
    def _folder(self) -> Path:
        given, run = self.config.teacher.cache, self.config.run.folder
        if given is None and run is None:
            raise UserError("--teacher.cache must name a folder, as this command makes no run folder")
        return Path(given) if given is not None else Path(run) / "teacher-cache"

    def _identity(self) -> Identity:
        """Return what a cache must belong to."""
        place = Path(self.name)
        if place.is_dir():
            teacher = file_digest(place, self.extra.get("gguf_file"))
        else:
            commit = getattr(load_from(transformers.AutoConfig, self.name), "_commit_hash", None)
            teacher = f"{self.name} @ {commit}"
        rows = self.rows["train"].fingerprint()
        return Identity(teacher, tokenizer_digest(self.tokenizer), rows, self.vocabulary)

    def _gain(self, name: str, ours: dict[str, Any], text: dict[str, Any]) -> str:
        """Return whether one training's loss is lower than that on the text alone."""
        rows = self.rows["test"]
        counts = torch.cat(
            [(self.targets("test", part, None)[2] != IGNORE).sum(1) for part in torch.arange(len(rows)).split(64)]
        )
        gain, margin = paired_difference(text["each"], ours["each"], counts)
        figures = (
            f"perplexity {ours['perplexity']:.2f} against {text['perplexity']:.2f}, "
            f"{gain:+.3f} ± {margin:.3f} nats a token (95 %, {len(rows)} rows)"
        )
        if abs(gain) <= margin:
            return f"{name} and trained on text alone cannot be told apart: {figures}."
        return f"{name} is {'better' if gain > 0 else 'worse'} than trained on text alone: {figures}."
