"""A linear probe on the frozen features of the pretrained network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlkernels.train.batches import micro_batches
from tlkernels.train.data import IGNORE
from tlkernels.train.loop import Job
from tlkernels.train.metrics import Scores, Tally
from tlkernels.train.model import Classifier
from tlkernels.train.rows import Rows

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


def linear_probe(job: Job, network: Classifier) -> Probe:
    """Fit a linear layer to the standardised features of the labelled "train" rows, and score it on "test"."""
    device = job.accelerator.device
    network = job.accelerator.prepare_model(network, evaluation_mode=True).eval()
    started = time.perf_counter()
    features = {"train": _features(network, job.rows["train"], device)}
    seconds = time.perf_counter() - started
    features |= {side: _features(network, job.rows[side], device) for side in ("eval", "test")}
    shift, scale = features["train"].mean(0), features["train"].std(0).clamp_min(1e-6)
    inputs = {side: (rows - shift) / scale for side, rows in features.items()}
    targets = {side: rows.labels[rows.labels != IGNORE].to(device) for side, rows in job.rows.items()}

    best: tuple[Scores, float, nn.Linear] | None = None
    started, passes = time.perf_counter(), 0
    for penalty in PENALTIES:
        head, evaluations = _fit(job, inputs["train"], targets["train"], penalty)
        passes += evaluations
        scores = _scores(job, head, inputs["eval"], targets["eval"])
        if best is None or scores.better_than(best[0]):
            best = scores, penalty, head
    assert best is not None
    fitting = time.perf_counter() - started
    eval_scores, penalty, head = best
    return Probe(
        scores=_scores(job, head, inputs["test"], targets["test"]),
        eval_scores=eval_scores,
        penalty=penalty,
        seconds=seconds + fitting,
        pass_seconds=fitting / passes,
        logits=head(inputs["train"]).detach(),
        target=targets["train"],
    )


@torch.no_grad()
def _features(network: Classifier, rows: Rows, device: torch.device) -> Tensor:
    """Return the features of the labelled rows, in their order. The network's head is the identity."""
    labelled = (rows.labels != IGNORE).nonzero().flatten()
    pieces = micro_batches(labelled, rows.lengths, 64)
    features = torch.cat([network(**rows.inputs(piece, device)).float() for piece in pieces])
    return features[torch.cat(pieces).argsort().to(device)]


def _fit(job: Job, inputs: Tensor, target: Tensor, penalty: float) -> tuple[nn.Linear, int]:
    """Return the layer, and the number of forward and backward passes over the rows."""
    head = nn.Linear(inputs.shape[1], job.rows["train"].classes).to(inputs.device)
    nn.init.zeros_(head.weight)  # the problem is convex: the start does not decide the result
    nn.init.zeros_(head.bias)
    optimizer: Any = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    passes = 0

    def closure() -> float:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = job.criterion(head(inputs), target) / len(target) + penalty * head.weight.square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return head, passes


@torch.no_grad()
def _scores(job: Job, head: nn.Linear, inputs: Tensor, target: Tensor) -> Scores:
    tally = Tally(job.rows["train"].classes, inputs.device)
    logits = head(inputs)
    tally.add(logits, target, job.criterion(logits, target))
    return tally.scores()
