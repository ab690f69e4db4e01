"""`tlkernels check-normalisation`: whether a task's gradients depend on the micro-batches and on the processes."""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlkernels.normalisation import check_normalisation, repeatable
from tlkernels.train import pipeline
from tlkernels.train.batches import micro_batches, whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.config import Options
from tlkernels.train.errors import UserError
from tlkernels.train.gradient import gradient
from tlkernels.train.task import OURS, Task

PIECES, PROCESSES = (1, 2, 3, 4), (1, 2)


def check(config: Options) -> bool:
    """Check the first step of the job of `config`, print what was found, and return whether its gradient is the same.

    It also computes, on the same rows, the gradients of a loop that averages the means of its micro-batches.

    Raises:
        UserError: an option, the data or the model folder are wrong, there are several processes already, or a batch
            has fewer rows than the check has micro-batches.
    """
    config.check()
    task = pipeline.prepare(config, pipeline.start(config))
    if task.accelerator.num_processes > 1:
        raise UserError("check-normalisation starts its own processes; run it without torchrun or accelerate launch")
    if task.batch_size < max(PIECES):
        raise UserError(f"--run.batch_size must be at least {max(PIECES)} for this check, got {task.batch_size}")
    network = task.start()
    model: Any = task.accelerator.prepare_model(network)
    print(f"{task.describe()}\n", flush=True)
    size = task.batch_size  # of which not every number of pieces of one size can be made
    pieces = [count for count in PIECES if -(-size // -(-size // count)) == count]
    checks = {
        f"tlkernels {config.command}": (lambda count: _gradient(task, model, count), pieces, "micro-batches"),
        "the same, over processes": (lambda count: _over_processes(config, task, model, count), PROCESSES, "processes"),
        "a loop that averages the means of its micro-batches, on the same rows": (
            lambda count: _mean_of_means(task, model, count), pieces, "micro-batches",
        ),
    }  # fmt: skip
    right = []
    for name, (step, counts, what) in checks.items():
        report = check_normalisation(step, network, counts)
        print(f"{name}\n{report.text(what)}\n", flush=True)
        right.append(report.ok)
    return all(right[:2])


def _gradient(task: Task, model: nn.Module, count: int) -> None:
    """Leave the gradient of the first step in the parameters; each process has `count` micro-batches."""
    rows = -(-task.batch_size // task.accelerator.num_processes)
    batch = whole_batch(0, task.batch_size, len(task.rows["train"]), task.config.run.seed)
    model.train()
    gradient(task, model, batch, 0, Progress(micro_batch=-(-rows // count)))


def _mean_of_means(task: Task, model: nn.Module, count: int) -> None:
    rows, run = task.rows["train"], task.config.run
    batch = whole_batch(0, task.batch_size, len(rows), run.seed)
    pieces = micro_batches(batch, rows.lengths, -(-len(batch) // count))
    model.train()
    for piece in pieces:
        loss = model(*task.inputs("train", piece, 0), task.losses[OURS]) / task.divisor(piece, 0)
        (loss / len(pieces)).backward()


def _over_processes(config: Options, task: Task, model: nn.Module, count: int) -> None:
    """Leave the gradient of the first step in the parameters, computed by `count` processes on the CPU."""
    if count == 1:
        return _gradient(task, model, 1)
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        file = str(Path(folder) / "gradient.pt")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the processes would warn about unused parameters
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(_worker, (count, port, config, file), count)
        found = torch.load(file, weights_only=True)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name].to(parameter.device) if name in found else None


def _worker(rank: int, count: int, port: str, config: Options, file: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    warnings.simplefilter("ignore")  # each process would repeat those of Accelerate
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    config.run.device = "cpu"
    task = pipeline.prepare(config, pipeline.start(config))
    network = task.start()
    model: Any = task.accelerator.prepare(network)
    with repeatable(network):
        _gradient(task, model, 2)
        if rank == 0:
            torch.save({name: p.grad for name, p in network.named_parameters() if p.grad is not None}, file)
    # Before the process group ends: DDP's destructor would wait for threads of gloo that wait for the same lock.
    del model, network
    task.accelerator.free_memory()
    task.accelerator.end_training()
