"""The training loop. `train` shows everything that a step does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tlkernels.train.batches import whole_batch
from tlkernels.train.checkpoint import Progress, load_checkpoint, save_checkpoint, write_folder
from tlkernels.train.errors import RunError, UserError
from tlkernels.train.gradient import gradient
from tlkernels.train.log import Log
from tlkernels.train.optim import learning_rate
from tlkernels.train.sharding import load_optimizer_state, optimizer_state, prepared, whole_network
from tlkernels.train.stopping import stopped
from tlkernels.train.task import Task


def train(task: Task, folder: Path, start: Callable[[], nn.Module], until: int | None = None) -> Progress:
    """Train from the checkpoint in `folder`, or from `start()` if there is none; return the progress.

    After step `until`, or when the run is asked to stop, it saves a checkpoint and returns.

    Raises:
        RunError: the gradient is no longer finite, memory does not suffice for one row, or a checkpoint cannot be
            written.
        UserError: the checkpoint belongs to other rows, or is incomplete.
    """
    run, optim, accelerator, rows = task.config.run, task.config.optim, task.accelerator, task.rows["train"]
    network, model, optimizer, progress, whole = _begin(task, folder, start)
    total, log = task.steps, Log(folder, progress.step, run.tensorboard, accelerator.is_main_process)
    silent = None if accelerator.is_main_process else True  # None: no bar unless the output is a terminal
    bar = tqdm(total=total, initial=progress.step, desc=folder.name, unit="step", disable=silent)
    evaluate_every = run.eval_every or math.ceil(total / 4)
    model.train()

    for step in range(progress.step, min(total, until or total)):
        if run.patience is not None and progress.evaluations_since_best >= run.patience:
            break
        started = time.perf_counter()
        batch = whole_batch(step, task.batch_size, len(rows), run.seed)
        loss = gradient(task, model, batch, step, progress)
        computing = time.perf_counter()
        norm = float(accelerator.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf))
        if not math.isfinite(norm):
            raise RunError(f"the gradient of step {step + 1} is {norm}; a smaller --optim.lr may help")
        rate = learning_rate(step, total, optim.lr, task.config.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1
        progress.compute_seconds += time.perf_counter() - computing
        bar.update()

        if progress.step % run.log_every == 0:
            mean = float(accelerator.reduce(loss, "sum"))
            log.write(progress.step, loss=mean, lr=rate, grad_norm=norm, seconds=round(progress.seconds, 3))
        progress.seconds += time.perf_counter() - started
        evaluating = progress.step % evaluate_every == 0 or progress.step == total
        if evaluating:
            _evaluate(task, folder, network, whole, progress, log)
        stopping = progress.step == until or stopped(accelerator)
        if evaluating or stopping:
            state = optimizer_state(accelerator, optimizer)
            save_checkpoint(folder / "last", task, whole_network(accelerator, network, whole), state, progress)
        if stopping:
            break
    bar.close()
    log.close()
    accelerator.wait_for_everyone()
    return progress


def _begin(
    task: Task, folder: Path, start: Callable[[], nn.Module]
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Progress, nn.Module]:
    """Return the network, its wrapper by Accelerate, its optimiser, the progress, and a network for whole weights."""
    saved = load_checkpoint(folder / "last", task)
    network = saved[0] if saved else start()
    model, optimizer, whole = prepared(task.accelerator, network, task.config.optim)
    progress = Progress(fingerprint=task.rows["train"].fingerprint())
    if saved:
        if saved[2].fingerprint != progress.fingerprint:
            raise UserError(f"the training rows are not those that {folder} was trained on")
        load_optimizer_state(optimizer, saved[1])
        progress = saved[2]
    return network, model, optimizer, progress, whole


def _evaluate(task: Task, folder: Path, network: nn.Module, whole: nn.Module, progress: Progress, log: Log) -> None:
    """Score the network on the evaluation rows, and save it in `folder/best` if it is the best so far."""
    scores = task.scores(network, "eval")
    log.write(progress.step, **{f"eval_{name}": value for name, value in scores.values.items()})
    progress.evaluations_since_best += 1
    if scores.better_than(progress.best):
        progress.best, progress.best_step, progress.evaluations_since_best = replace(scores, each=()), progress.step, 0
        saved = whole_network(task.accelerator, network, whole)
        if task.accelerator.is_main_process:
            write_folder(folder / "best", lambda place: task.save(place, saved))
