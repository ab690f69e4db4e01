"""Loss, accuracy and macro-F1 of a classifier, from counts."""

from __future__ import annotations

import torch
from torch import Tensor

from tlkernels.train.data import IGNORE
from tlkernels.train.task import Scores


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
        """Return the scores of all batches, zeros if there were none. More accuracy is better, and then less loss."""
        right, predicted, true = self.counts.cpu()
        rows = int(true.sum())
        occurring = predicted + true > 0  # as in scikit-learn, a class that neither occurs nor is predicted is left out
        f1 = 2 * right[occurring] / (predicted + true)[occurring]
        n = max(rows, 1)
        loss, accuracy = float(self.loss) / n, float(right.sum()) / n
        macro_f1 = float(f1.mean()) if rows else 0.0
        return Scores({"loss": loss, "accuracy": accuracy, "macro_f1": macro_f1}, (accuracy, -loss), rows)
