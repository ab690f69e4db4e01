"""The network of distillation, a student that hears its teacher, and the losses of `tlkernels distill`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train.blocks import BlockOutputs
from tlkernels.train.distill_config import DistillLossConfig, HintConfig
from tlkernels.train.errors import UserError, one_line
from tlkernels.train.packing import IGNORE
from tlkernels.train.task import GATHERED, OURS, Loss


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

    def __init__(self, load: Callable[[], nn.Module], network: nn.Module | None = None) -> None:
        """Take the function that returns the network, ready for evaluation, and the network if it is loaded."""
        self._load, self._network = load, network

    def __deepcopy__(self, memo: object) -> Teacher:
        """Return the same teacher: a copy of a student has no teacher of its own."""
        return self

    @property
    def network(self) -> Any:
        """The network, in evaluation mode."""
        if self._network is None:
            # The head is read by autograd. A resumed run may load it at another moment, and draws the same numbers.
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                self._network = self._load()
        return self._network

    def release(self) -> None:
        """Free the network's memory until it is needed again."""
        self._network = None


class Taught(nn.Module):
    """A student, whose loss gets what the teacher computes from the same rows.

    Attributes:
        student: the network that is trained, a `LanguageModel` or a `Classifier`; the teacher is one, too.
        maps: for each pair of `hints`, the linear map from the student's hidden states to the teacher's.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | None = None, hints: HintConfig | None = None) -> None:
        """Add new maps for the hints, from the present random numbers."""
        super().__init__()
        self.student, self.teacher, self.hints = student, teacher, hints or HintConfig()
        self.maps = nn.ModuleList()
        if self.hints.blocks:
            assert teacher is not None
            configs = [transformer(network).config.get_text_config() for network in (student, teacher.network)]
            self.maps.extend(nn.Linear(*(config.hidden_size for config in configs)) for _ in self.hints.blocks)

    def forward(self, inputs: dict[str, Tensor], target: Tensor, *rest: Any) -> Tensor:
        """Return the loss. `rest` is what the student takes after the target, a `Lesson` or None, and the loss.

        Without a lesson the student is alone. With one, the loss also gets what the teacher gives to its own loss, or
        None if the lesson has the teacher's answers, and the lesson. Hints are added to the loss, summed over the
        tokens with a target, or of a classifier over all but padding.
        """
        *counts, lesson, loss = rest
        if lesson is None:
            return self._of(self.student, inputs, target, *counts, loss)
        if self.teacher is None or lesson.classes is not None:
            return self._of(self.student, inputs, target, *counts, lambda *head: loss(*head, None, lesson))
        teacher, taken = self.teacher.network, list[tuple[Any, ...]]()
        own_blocks, its_blocks = zip(*self.hints.blocks, strict=True) if self.hints.blocks else ((), ())

        def take(*head: Any) -> Tensor:
            taken.append(head)
            return torch.zeros(())

        with torch.no_grad(), _watched(teacher, its_blocks) as told:
            teacher(inputs, target, *counts, take)
        with _watched(self.student, own_blocks) as own:
            value = self._of(self.student, inputs, target, *counts, lambda *head: loss(*head, taken[0], lesson))
        for one, (mine, its) in zip(self.maps, self.hints.blocks, strict=True):
            counted = self._counted(inputs, target, told.values[its])
            guess, right = one(own.values[mine][counted]), told.values[its][counted]
            value = value + self.hints.weight / right.shape[-1] * tlk.mse(guess, right.to(guess.dtype), reduction="sum")
        return value

    @staticmethod
    def _counted(inputs: dict[str, Tensor], target: Tensor, hidden: Tensor) -> Tensor:
        if target.dim() == 2:
            return target != IGNORE
        mask = inputs.get("attention_mask")
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()

    @staticmethod
    def _of(network: nn.Module, *arguments: Any) -> Tensor:
        value: Tensor = network(*arguments)
        return value


def transformer(network: Any) -> Any:
    """Return the transformers model in a `LanguageModel` or a `Classifier`."""
    return network.model if hasattr(network, "model") else network.encoder


def save_maps(folder: Path, network: Taught) -> None:
    """Write the maps of the hints, if there are any."""
    if network.maps:
        maps = {name: value.detach().cpu().contiguous() for name, value in network.maps.state_dict().items()}
        safetensors.torch.save_file(maps, folder / "hints.safetensors")


def load_maps(folder: Path, network: Taught) -> None:
    """Load what `save_maps` wrote. Raises `UserError` if it is missing."""
    if network.maps:
        try:
            network.maps.load_state_dict(safetensors.torch.load_file(folder / "hints.safetensors"))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} has no maps of the hints: {one_line(error)}") from error


def _watched(network: nn.Module, blocks: Sequence[int]) -> Any:
    return BlockOutputs(transformer(network), sorted(set(blocks))) if blocks else nullcontext()


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
        loss: Tensor = (1 - share) * temperature**2 * (soft.sum(-1) * (target != IGNORE)).sum()
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
    return ways | ({GATHERED: on_gathered} if gathered else {})


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
