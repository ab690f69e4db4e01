"""Loss, accuracy and macro-F1 of a model on a set of rows, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tlkernels.train.batches import micro_batches
from tlkernels.train.data import IGNORE
from tlkernels.train.rows import Rows


@dataclass(frozen=True)
class Scores:
    """`loss` in nats per labelled row; `accuracy` and `macro_f1` from 0 to 1; `rows` is the number of labelled rows."""

    loss: float
    accuracy: float
    macro_f1: float
    rows: int

    def better_than(self, other: Scores | None) -> bool:
        """Compare by accuracy, and by loss if that is equal; any scores are better than None."""
        return other is None or (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class Tally:
    """Counts that are summed over batches and processes, and from which the scores are computed."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        """Start at zero."""
        # Rows: predicted and right, predicted, true. float64 counts are exact up to 2^53.
        self.counts = torch.zeros(3, classes, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, target: Tensor, loss_sum: Tensor) -> None:
        """Add a batch; `loss_sum` is the sum over its labelled rows."""
        valid = target != IGNORE
        predicted, target = logits.argmax(-1)[valid], target[valid]
        for counts, classes in zip(self.counts, (target[predicted == target], predicted, target), strict=True):
            counts += torch.bincount(classes, minlength=len(counts))
        self.loss += loss_sum

    def scores(self) -> Scores:
        """Return the scores of all batches; zeros if there were none."""
        right, predicted, true = self.counts.cpu()
        rows = int(true.sum())
        occurring = predicted + true > 0  # as in scikit-learn, a class that neither occurs nor is predicted is left out
        f1 = 2 * right[occurring] / (predicted + true)[occurring]
        n = max(rows, 1)
        return Scores(float(self.loss) / n, float(right.sum()) / n, float(f1.mean()) if rows else 0.0, rows)


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, criterion: nn.Module, accelerator: Accelerator, piece: int = 64) -> Scores:
    """Score `model` on `rows`; each process computes a share, and all return the same. `criterion` must sum."""
    training = model.training
    model.eval()
    tally = Tally(rows.classes, accelerator.device)
    everything = torch.arange(len(rows))
    for numbers in micro_batches(everything, rows.lengths, piece, accelerator.process_index, accelerator.num_processes):
        target = rows.labels[numbers].to(accelerator.device)
        logits = model(**rows.inputs(numbers, accelerator.device))
        tally.add(logits, target, criterion(logits, target))
    tally.counts = accelerator.reduce(tally.counts, "sum")
    tally.loss = accelerator.reduce(tally.loss, "sum")
    model.train(training)
    return tally.scores()
