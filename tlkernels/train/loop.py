"""The training loop. `train` shows everything that a step does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.checkpoint import Progress, load_checkpoint, save_checkpoint, write_folder
from tlkernels.train.config import Config
from tlkernels.train.data import IGNORE
from tlkernels.train.errors import RunError, UserError
from tlkernels.train.log import Log
from tlkernels.train.metrics import evaluate
from tlkernels.train.model import Classifier, save_model
from tlkernels.train.optim import learning_rate, make_optimizer
from tlkernels.train.rows import Rows


@dataclass(frozen=True)
class Job:
    """What all trainings of a run share.

    Attributes:
        rows: the rows of "train", "eval" and "test".
        criterion: the loss of logits and classes, summed over the labelled rows.
        preprocessor: tokenizer or image processor, saved with the weights.
        about: the other data that `tlkernels.train.load` needs.
    """

    config: Config
    accelerator: Accelerator
    rows: dict[str, Rows]
    criterion: nn.Module
    preprocessor: Any
    about: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimiser steps of one training."""
        run = self.config.run
        return run.steps or math.ceil(run.epochs * len(self.rows["train"]) / run.batch_size)


def train(job: Job, folder: Path, make_model: Callable[[], Classifier], until: int | None = None) -> Progress:
    """Train from the checkpoint in `folder`, or from `make_model()` if there is none; return the progress.

    After step `until` it saves a checkpoint and stops.

    Raises:
        RunError: the gradient is no longer finite, or a checkpoint cannot be written.
        UserError: the checkpoint belongs to other rows, or is incomplete.
    """
    run, optim, accelerator, rows = job.config.run, job.config.optim, job.accelerator, job.rows["train"]
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    classifier, model, optimizer, progress = _begin(job, folder, make_model)
    log = Log(folder, progress.step, run.tensorboard, accelerator.is_main_process)
    silent = None if accelerator.is_main_process else True  # None: no bar unless the output is a terminal
    bar = tqdm(total=job.steps, initial=progress.step, desc=folder.name, unit="step", disable=silent)
    evaluate_every = run.eval_every or math.ceil(job.steps / 4)

    for step in range(progress.step, min(job.steps, until or job.steps)):
        if run.patience is not None and progress.evaluations_since_best >= run.patience:
            break
        started = time.perf_counter()
        # Dropout depends on seed, step and process: a resumed run draws the same numbers as an uninterrupted one.
        torch.manual_seed((run.seed * 1_000_003 + step) * 1_009 + rank)

        # The rows of the step's micro-batches on all processes are known in advance. Each summed loss is divided by the
        # number of labelled rows of the whole step, so that the gradients add up to that of the batch's mean.
        batch = whole_batch(step, run.batch_size, len(rows), run.seed)
        labelled = max(1, int((rows.labels[batch] != IGNORE).sum()))
        pieces = micro_batches(batch, rows.lengths, run.micro_batch, rank, world)
        loss = torch.zeros((), device=device)
        for number, piece in enumerate(pieces, start=1):
            with nullcontext() if number == len(pieces) else accelerator.no_sync(model):
                logits = model(**rows.inputs(piece, device))
                share = job.criterion(logits, rows.labels[piece].to(device)) / labelled
                accelerator.backward(share * world)  # undoes the average that data parallelism takes over processes
            loss += share.detach()

        norm = float(accelerator.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf))
        if not math.isfinite(norm):
            raise RunError(f"the gradient of step {step + 1} is {norm}; a smaller --optim.lr may help")
        rate = learning_rate(step, job.steps, optim.lr, job.config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1
        progress.seconds += time.perf_counter() - started
        bar.update()

        if progress.step % run.log_every == 0:
            mean = float(accelerator.reduce(loss, "sum"))
            log.write(progress.step, loss=mean, lr=rate, grad_norm=norm, seconds=round(progress.seconds, 3))
        evaluating = progress.step % evaluate_every == 0 or progress.step == job.steps
        if evaluating:
            _evaluate(job, folder, classifier, progress, log)
        if (evaluating or progress.step == until) and accelerator.is_main_process:
            save_checkpoint(folder / "last", classifier, optimizer, progress, job.preprocessor, job.about)
    bar.close()
    log.close()
    accelerator.wait_for_everyone()
    return progress


def _begin(
    job: Job, folder: Path, make_model: Callable[[], Classifier]
) -> tuple[Classifier, nn.Module, torch.optim.Optimizer, Progress]:
    """Return the network, its wrapper by Accelerate, its optimiser, and the progress."""
    saved = load_checkpoint(folder / "last")
    classifier = saved[0] if saved else make_model()
    model, optimizer = job.accelerator.prepare(classifier, make_optimizer(classifier, job.config.optim))
    progress = Progress(fingerprint=job.rows["train"].fingerprint())
    if saved:
        if saved[2].fingerprint != progress.fingerprint:
            raise UserError(f"the training rows are not those that {folder} was trained on")
        optimizer.load_state_dict(saved[1])
        progress = saved[2]
    model.train()
    return classifier, model, optimizer, progress


def _evaluate(job: Job, folder: Path, classifier: Classifier, progress: Progress, log: Log) -> None:
    """Score the network on the evaluation rows, and save it in `folder/best` if it is the best so far."""
    scores = evaluate(classifier, job.rows["eval"], job.criterion, job.accelerator)
    log.write(progress.step, eval_loss=scores.loss, eval_accuracy=scores.accuracy, eval_macro_f1=scores.macro_f1)
    progress.evaluations_since_best += 1
    if scores.better_than(progress.best):
        progress.best, progress.best_step, progress.evaluations_since_best = scores, progress.step, 0
        if job.accelerator.is_main_process:
            write_folder(folder / "best", lambda place: save_model(place, classifier, job.preprocessor, job.about))
