"""A linear probe on the frozen features of the pretrained network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlkernels.train.batches import micro_batches
from tlkernels.train.data import IGNORE
from tlkernels.train.metrics import Tally
from tlkernels.train.model import Classifier
from tlkernels.train.rows import LabelledRows
from tlkernels.train.task import OURS, Scores

if TYPE_CHECKING:
    from tlkernels.train.tasks.classify import Classify

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # factors of the squared weights; the eval rows select one
ITERATIONS = 100  # limit for L-BFGS


@dataclass(frozen=True)
class Probe:
    """The probe's scores on the hold-out and on the rows that selected its penalty, and its cost.

    `seconds` is the time for the features of the training rows and for all fits; `pass_seconds` that of one forward and
    backward pass over the features; `logits` and `target` are those of the training rows.
    """

    scores: Scores
    eval_scores: Scores
    penalty: float
    seconds: float
    pass_seconds: float
    logits: Tensor
    target: Tensor


def linear_probe(task: Classify, network: Classifier) -> Probe:
    """Fit a linear layer to the standardised features of the labelled "train" rows, and score it on "test"."""
    device = task.device
    network = task.accelerator.prepare_model(network, evaluation_mode=True).eval()
    started = time.perf_counter()
    features = {"train": _features(network, task.rows["train"], device)}
    seconds = time.perf_counter() - started
    features |= {side: _features(network, task.rows[side], device) for side in ("eval", "test")}
    shift, scale = features["train"].mean(0), features["train"].std(0).clamp_min(1e-6)
    inputs = {side: (rows - shift) / scale for side, rows in features.items()}
    targets = {side: rows.labels[rows.labels != IGNORE].to(device) for side, rows in task.rows.items()}

    best: tuple[Scores, float, nn.Linear] | None = None
    started, passes = time.perf_counter(), 0
    for penalty in PENALTIES:
        head, evaluations = _fit(task, inputs["train"], targets["train"], penalty)
        passes += evaluations
        scores = _scores(task, head, inputs["eval"], targets["eval"])
        if best is None or scores.better_than(best[0]):
            best = scores, penalty, head
    assert best is not None
    fitting = time.perf_counter() - started
    eval_scores, penalty, head = best
    return Probe(
        scores=_scores(task, head, inputs["test"], targets["test"]),
        eval_scores=eval_scores,
        penalty=penalty,
        seconds=seconds + fitting,
        pass_seconds=fitting / passes,
        logits=head(inputs["train"]).detach(),
        target=targets["train"],
    )


@torch.no_grad()
def _features(network: Classifier, rows: LabelledRows, device: torch.device) -> Tensor:
    """Return the features of the labelled rows, in their order."""
    labelled = (rows.labels != IGNORE).nonzero().flatten()
    pieces = micro_batches(labelled, rows.lengths, 64)
    features = torch.cat([network.features(**rows.inputs(piece, device)).float() for piece in pieces])
    return features[torch.cat(pieces).argsort().to(device)]


def _fit(task: Classify, inputs: Tensor, target: Tensor, penalty: float) -> tuple[nn.Linear, int]:
    """Return the layer, and the number of forward and backward passes over the rows."""
    head = nn.Linear(inputs.shape[1], task.rows["train"].classes).to(inputs.device)
    nn.init.zeros_(head.weight)  # the problem is convex: the start does not decide the result
    nn.init.zeros_(head.bias)
    optimizer: Any = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    passes = 0

    def closure() -> float:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = task.losses[OURS](head(inputs), target) / len(target) + penalty * head.weight.square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return head, passes


@torch.no_grad()
def _scores(task: Classify, head: nn.Linear, inputs: Tensor, target: Tensor) -> Scores:
    tally = Tally(task.rows["train"].classes, inputs.device)
    logits = head(inputs)
    tally.add(logits, target, task.losses[OURS](logits, target))
    return tally.scores()
