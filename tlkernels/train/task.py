"""What the trainer asks of a task. The loop knows steps, processes and checkpoints; a task knows what is learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tlkernels.train.config import RunConfig

# Returns the loss of the features that a network's trunk computes, summed over a micro-batch. The further arguments are
# the network's own, such as the head and the targets.
Loss = Callable[..., Tensor]
OURS = "tlkernels"  # the names of losses in `Task.losses`; the second is eager PyTorch's on the rows that count
GATHERED = "eager on gathered rows"


class Rows(Protocol):
    """The rows of one side. `lengths` is the length of each: rows of similar length are batched together."""

    lengths: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def fingerprint(self) -> str:
        """Return a digest by which a resumed run recognises its rows."""
        ...


@dataclass(frozen=True)
class Scores:
    """How good a network is on `count` labelled rows or counted tokens.

    Attributes:
        values: each score by its name.
        rank: scores with a larger one are better.
        each: what each row adds to the first heading's score, by which two networks are compared row by row.
    """

    values: dict[str, float]
    rank: tuple[float, ...]
    count: int
    each: tuple[float, ...] = ()

    def better_than(self, other: Scores | None) -> bool:
        """Compare by `rank`; any scores are better than None."""
        return other is None or self.rank > tuple(other.rank)


@dataclass(frozen=True)
class Stage:
    """One line of the final table.

    Attributes:
        title: its name there.
        start: returns the network that is trained; None if none is.
        measure: returns the line of a stage without training, or None if the run is asked to stop.
        task: trains the network, if it is not the run's own task; it has the same rows.
    """

    title: str
    start: Callable[[], nn.Module] | None = None
    measure: Callable[[], dict[str, Any] | None] | None = None
    task: Task | None = None


class Task(ABC):
    """One kind of training; `tlkernels.train.tasks` has one file for each.

    Attributes:
        rows: the rows of "train", "eval" and "test", on each process all of them. "test" may be "eval".
        losses: "tlkernels" and what PyTorch's users write in its place, by name. Each takes what the network's forward
            gives it, and returns the sum over the micro-batch.
        headings: the scores in the final table, and their headings there.
        curve: the score in the picture.
        unit: "samples" or "tokens", in which the speed is given.
        batch_size: rows of an optimiser step, on all processes together.
        row_size: how many of them a training row has on average.
        features: how many of a loss's first arguments the network computes from the rows.
        joint: whether the loss compares the rows of a batch with one another. It is then the mean over the whole batch,
            which it gets at once, in the order in which `inputs` gave the rows; with several processes, each gets its
            own rows, and the loss sees to the others'.
        facts: further figures of the task's lines in the table.
    """

    command: ClassVar[str]  # of the command line
    config: Any  # a subclass of Options
    accelerator: Accelerator
    rows: Mapping[str, Rows]
    losses: dict[str, Loss]
    headings: ClassVar[dict[str, str]]
    curve: ClassVar[str]
    unit: ClassVar[str]
    batch_size: int
    row_size: float
    features: ClassVar[int] = 1
    joint: ClassVar[bool] = False
    facts: Mapping[str, float] = {}

    @abstractmethod
    def stages(self) -> dict[str, Stage]:
        """Return the lines of the final table by the names of their folders."""

    @abstractmethod
    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return what the losses of a whole step are divided by; `numbers` are its rows on all processes."""

    @abstractmethod
    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the network's arguments for some rows, before the loss; `step` is None in an evaluation."""

    @abstractmethod
    def scores(self, network: nn.Module, side: str) -> Scores:
        """Return the scores on one side's rows; each process computes a share, and all return the same."""

    @abstractmethod
    def save(self, folder: Path, network: nn.Module) -> None:
        """Write everything that `load`, and a user of the trained network, need."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote, bit for bit. Raises `UserError` if one is missing."""

    @abstractmethod
    def describe(self) -> str:
        """Return the first line of a run, which describes the data and the model."""

    @abstractmethod
    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return what the lines of the final table show, in one or more sentences; "" if nothing is compared."""

    def start(self) -> nn.Module:
        """Return the network with which the first training starts."""
        return next(stage.start for stage in self.stages().values() if stage.start is not None)()

    def hold_out(self, count: int, what: str = "rows") -> str:
        """Return how large the hold-out is, for `describe`; `count` is the number of `what` in "test"."""
        apart = self.rows["test"] is not self.rows["eval"]
        return f"{count} hold-out" if apart else f"the evaluation {what} are the hold-out"

    @property
    def steps(self) -> int:
        """Optimiser steps of one training."""
        run: RunConfig = self.config.run
        return run.steps or math.ceil(run.epochs * len(self.rows["train"]) / self.batch_size)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device
