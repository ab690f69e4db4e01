"""The network of `tlkernels distill`, a student that hears its teacher, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train.distill_config import DistillLossConfig, HintConfig
from tlkernels.train.language import LanguageModel
from tlkernels.train.packing import IGNORE
from tlkernels.train.student import BlockOutputs
from tlkernels.train.task import OURS, Loss


class Lesson(NamedTuple):
    """What a step's loss takes apart from the student: its schedules' values, and the teacher's answers from a cache.

    Attributes:
        temperature, hard_weight: of the step.
        classes, log_probs: the teacher's most probable classes of each token with a target, `(tokens, K)`.
    """

    temperature: float
    hard_weight: float
    classes: Tensor | None = None
    log_probs: Tensor | None = None


class Teacher:
    """A network that is loaded when it is needed, and is no part of the one that is trained, saved or copied."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        """Take the function that returns the network, ready for evaluation."""
        self._load = load
        self._network: nn.Module | None = None

    def __deepcopy__(self, memo: object) -> Teacher:
        """Return the same teacher: a copy of a student has no teacher of its own."""
        return self

    @property
    def network(self) -> Any:
        """The network, in evaluation mode."""
        if self._network is None:
            with torch.enable_grad():  # by which the head is read
                self._network = self._load()
        return self._network

    def release(self) -> None:
        """Free the network's memory until it is needed again."""
        self._network = None


class Taught(nn.Module):
    """A student, whose loss gets what the teacher computes from the same rows.

    Attributes:
        student: the network that is trained.
        maps: for each pair of `hints`, the linear map from the student's hidden states to the teacher's.
    """

    def __init__(self, student: LanguageModel, teacher: Teacher | None = None, hints: HintConfig | None = None) -> None:
        """Add new maps for the hints, from the present random numbers."""
        super().__init__()
        self.student, self.teacher, self.hints = student, teacher, hints or HintConfig()
        self.maps = nn.ModuleList()
        if self.hints.blocks:
            assert teacher is not None
            widths = [
                network.config.get_text_config().hidden_size for network in (student.model, teacher.network.model)
            ]
            self.maps.extend(nn.Linear(*widths) for _ in self.hints.blocks)

    def forward(
        self, inputs: dict[str, Tensor], target: Tensor, valid: int, lesson: Lesson | None, loss: Callable[..., Tensor]
    ) -> Tensor:
        """Return `loss(...)` with the arguments of the student's head, and with a lesson those of the teacher's.

        Hints are added to it, summed over the tokens with a target. Without a lesson the student is alone.
        """
        if lesson is None:
            alone: Tensor = self.student(inputs, target, valid, loss)
            return alone
        if self.teacher is None or lesson.classes is not None:
            cached: Tensor = self.student(inputs, target, valid, lambda *head: loss(*head, None, lesson))
            return cached
        teacher = self.teacher.network
        blocks = list(zip(*self.hints.blocks, strict=True)) or [(), ()]
        taken: list[tuple[Any, ...]] = []

        def take(*head: Any) -> Tensor:
            taken.append(head)
            return torch.zeros(())

        def watch(model: Any, numbers: tuple[int, ...]) -> Any:
            return BlockOutputs(model, sorted(set(numbers))) if numbers else nullcontext()

        with torch.no_grad(), watch(getattr(teacher, "model", None), blocks[1]) as told:
            teacher(inputs, target, valid, take)
        with watch(self.student.model, blocks[0]) as own:
            value: Tensor = self.student(inputs, target, valid, lambda *head: loss(*head, taken[0], lesson))
        counted = target != IGNORE
        for one, (mine, its) in zip(self.maps, self.hints.blocks, strict=True):
            guess, right = one(own.values[mine][counted]), told.values[its][counted]
            value = value + self.hints.weight / right.shape[-1] * tlk.mse(guess, right.to(guess.dtype), reduction="sum")
        return value


def live_losses(config: DistillLossConfig, gathered: bool) -> dict[str, Loss]:
    """Return tlkernels' loss with a teacher, and the lines that PyTorch's users write; summed over the tokens.

    `gathered` adds those lines on the tokens that count.
    """
    options: Any = {"divergence": config.divergence, "beta": config.beta}

    def ours(*arguments: Any) -> Tensor:
        return _linear_distillation(*arguments, **options, impl=config.impl)

    def eager(*arguments: Any) -> Tensor:
        if config.divergence != "forward_kl":
            return _linear_distillation(*arguments, **options, impl="reference")
        hidden, target, _, weight, bias, t, cap, teacher, lesson = arguments
        temperature, share = lesson.temperature, lesson.hard_weight
        student = _logits(hidden, weight, bias, t, cap)
        with torch.no_grad():
            taught = _logits(teacher[0], *teacher[3:])
        soft = functional.kl_div(
            functional.log_softmax(student / temperature, -1), functional.softmax(taught / temperature, -1),
            reduction="none",
        )  # fmt: skip
        loss = (1 - share) * temperature**2 * (soft.sum(-1) * (target != IGNORE)).sum()
        if share:
            hard = functional.cross_entropy(
                student.flatten(0, -2), target.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss = loss + share * hard
        return loss

    def on_gathered(hidden: Tensor, target: Tensor, valid: int, *rest: Any) -> Tensor:
        *head, teacher, lesson = rest
        counted = target != IGNORE
        return eager(hidden[counted], target[counted], valid, *head, (teacher[0][counted], *teacher[1:]), lesson)

    ways: dict[str, Loss] = {OURS: ours, "eager": eager}
    return ways | ({"eager on gathered rows": on_gathered} if gathered else {})


def cached_losses(config: DistillLossConfig) -> dict[str, Loss]:
    """Return tlkernels' loss from a cache, and the same in plain PyTorch with all logits; summed over the tokens."""

    def way(impl: str) -> Loss:
        def loss(
            hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, t: float, cap: Any,
            teacher: None, lesson: Lesson,
        ) -> Tensor:  # fmt: skip
            counted = target != IGNORE
            hidden, bias = _unscaled(hidden[counted], bias, t)
            assert lesson.classes is not None and lesson.log_probs is not None
            return tlk.linear_topk_distillation(
                hidden, weight, lesson.classes, lesson.log_probs, target[counted], student_bias=bias,
                temperature=lesson.temperature, divergence=config.divergence, beta=config.beta, tail=config.tail,
                hard_weight=lesson.hard_weight, reduction="sum", softcap=cap, impl=impl,
            )  # fmt: skip

        return loss

    return {OURS: way(config.impl), "eager": way("reference")}


@torch.no_grad()
def most_probable(head: tuple[Any, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Return the `top_k` most probable classes of each token with a target, and their log-probabilities.

    `head` is what a `LanguageModel` gives to its loss.
    """
    hidden, target, _, *rest = head
    indices, log_probs = [], []
    for part in hidden[target != IGNORE].split(2048):  # of which the logits exist at a time
        logits = _logits(part, *rest)
        values, index = logits.topk(top_k, -1)
        log_probs.append(values - logits.logsumexp(-1, keepdim=True))
        indices.append(index)
    return torch.cat(indices), torch.cat(log_probs)


def _linear_distillation(
    hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, t: float, cap: Any,
    teacher: tuple[Any, ...], lesson: Lesson, **options: Any,
) -> Tensor:  # fmt: skip
    heard, _, _, its_weight, its_bias, its_t, its_cap = teacher
    hidden, bias = _unscaled(hidden, bias, t)
    heard, its_bias = _unscaled(heard, its_bias, its_t)
    return tlk.linear_distillation(
        hidden, weight, heard, its_weight, target, student_bias=bias, teacher_bias=its_bias,
        temperature=lesson.temperature, hard_weight=lesson.hard_weight, ignore_index=IGNORE,
        softcap=(cap, its_cap), reduction="sum", **options,
    )  # fmt: skip


def _unscaled(hidden: Tensor, bias: Tensor | None, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Return the arguments of a head without the temperature of its own; it has no softcap then."""
    if temperature == 1:
        return hidden, bias
    return hidden / temperature, None if bias is None else bias / temperature


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    logits = functional.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1 else logits / temperature
