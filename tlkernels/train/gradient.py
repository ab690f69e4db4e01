"""The gradient of a step, in micro-batches and processes."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tlkernels.train.batches import micro_batches, step_seed
from tlkernels.train.checkpoint import Progress
from tlkernels.train.gradcache import joint_gradient
from tlkernels.train.memory import halved, out_of_memory
from tlkernels.train.task import OURS, Task


def gradient(task: Task, model: nn.Module, batch: Tensor, step: int, progress: Progress) -> Tensor:
    """Add the gradient of the batch's mean loss to the parameters; return this process's part of the loss.

    Where memory runs out, the micro-batches are halved, and the step begins again. The batch stays the same.
    """
    accelerator, run = task.accelerator, task.config.run
    rank, world = accelerator.process_index, accelerator.num_processes
    while True:
        limit = progress.micro_batch or run.micro_batch
        pieces = micro_batches(batch, task.rows["train"].lengths, limit, rank, world)
        try:
            return (_joint if task.joint else _summed)(task, model, batch, pieces, step, progress)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            progress.micro_batch = halved(max(map(len, pieces)), world, error)
        model.zero_grad()  # the graph of the failed step went with the frame that made it
        torch.cuda.empty_cache()
        if accelerator.is_main_process:
            print(f"step {step + 1}: out of memory; going on with micro-batches of {progress.micro_batch}", flush=True)


def _summed(task: Task, model: nn.Module, batch: Tensor, pieces: list[Tensor], step: int, progress: Progress) -> Tensor:
    """Do a step whose loss is a sum over the rows, one micro-batch after the other."""
    accelerator, world = task.accelerator, task.accelerator.num_processes
    torch.manual_seed(step_seed(task.config.run.seed, step, accelerator.process_index))
    # The rows of the step's micro-batches on all processes are known in advance. Each summed loss is divided by
    # what the whole step counts, so that the gradients add up to that of the batch's mean.
    divisor, loss = task.divisor(batch, step), torch.zeros((), device=accelerator.device)
    for number, piece in enumerate(pieces, start=1):
        started = time.perf_counter()
        inputs = task.inputs("train", piece if len(piece) else batch[:1], step)
        ready = time.perf_counter()
        with nullcontext() if number == len(pieces) else accelerator.no_sync(model):
            # A process without a row takes part in the communication, with a loss of weight zero.
            share = model(*inputs, task.losses[OURS]) * (bool(len(piece)) / divisor)
            accelerator.backward(share * world)  # undoes the average that data parallelism takes
        loss += share.detach()
        progress.data_seconds += ready - started
        progress.compute_seconds += time.perf_counter() - ready
    return loss


def _joint(task: Task, model: nn.Module, batch: Tensor, pieces: list[Tensor], step: int, progress: Progress) -> Tensor:
    """Do a step whose loss compares all rows of the batch with one another."""
    accelerator, started = task.accelerator, time.perf_counter()
    inputs = [task.inputs("train", piece, step) for piece in pieces]
    ready = time.perf_counter()
    seed = step_seed(task.config.run.seed, step, accelerator.process_index)
    loss = joint_gradient(accelerator, model, inputs, task.losses[OURS], task.features, seed)
    progress.data_seconds += ready - started
    progress.compute_seconds += time.perf_counter() - ready
    share: Tensor = (
        loss / accelerator.num_processes
    )  # each process's loss is a mean, of which the average is the batch's
    return share
