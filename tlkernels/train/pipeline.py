"""The whole job: read the data, train, compare, report. Finished parts are on disk and are not repeated."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list

from tlkernels.train import loop, report
from tlkernels.train.checkpoint import write_file
from tlkernels.train.compare import compare_losses
from tlkernels.train.config import Options
from tlkernels.train.errors import UserError
from tlkernels.train.memory import peak, reset_peak
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.stopping import stop_on_sigterm, stopped
from tlkernels.train.task import OURS, Stage, Task
from tlkernels.train.tasks import CONFIGS, task_class


def run(config: Options, until: int | None = None) -> Path:
    """Run the job of `config` and return its run folder.

    The folder gets results.json and curves.png, and for each training its metrics.jsonl, best model and last
    checkpoint. After step `until` the first training saves a checkpoint and stops. SIGTERM does the same at any step.

    Raises:
        UserError: an option, the data or the model folder are wrong.
        RunError: the run had to stop; `resume` continues from the last checkpoint.
    """
    started = time.perf_counter()
    with stop_on_sigterm():
        config.check()
        accelerator = start(config)
        folder = _new_folder(config, accelerator)
        task = prepare(config, accelerator)
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / "command", config.command + "\n")
            write_file(folder / "config.json", config.to_json())
        return _run(task, folder, until, started)


def resume(folder: str | Path, until: int | None = None) -> Path:
    """Continue the run in `folder` with its options, and return the folder. Raises as `run` does."""
    started = time.perf_counter()
    with stop_on_sigterm():
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise UserError(f"{folder} is not a run folder: it has no config.json")
        config = CONFIGS[command_of(folder)].load(file)
        config.run.folder = str(folder)  # it may have been moved, or be seen from another folder
        config.check()
        return _run(prepare(config, start(config)), Path(folder), until, started)


def command_of(folder: str | Path) -> str:
    """Return the command that made a run folder. Raises `UserError` if it is none."""
    file = Path(folder) / "command"
    command = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    if command not in CONFIGS:
        raise UserError(f"{folder} is not a run folder: its file `command` names none of {', '.join(CONFIGS)}")
    return command


def start(config: Options) -> Accelerator:
    """Return the Accelerator for `config`; turn off the progress bars and messages of the libraries."""
    for library in (transformers, datasets):
        logs: Any = library.utils.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    for name in ("accelerate", "huggingface_hub"):  # the latter logs every attempt to reach the hub
        logging.getLogger(name).setLevel(logging.ERROR)
    return Accelerator(
        mixed_precision="bf16" if config.run.precision == "bf16" else "no",
        cpu=config.run.device == "cpu",
        # With mean pooling a pooler has no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )


def prepare(config: Options, accelerator: Accelerator) -> Task:
    """Return the task of `config`, which has read its data."""
    task: Task = task_class(config.command)(config, accelerator)
    if task.batch_size < accelerator.num_processes:
        raise UserError(f"--run.batch_size must be at least the number of processes, {accelerator.num_processes}")
    if config.run.compare_loss is not None and accelerator.num_processes > 1:
        raise UserError(f"--run.compare_loss takes one process, got {accelerator.num_processes}")
    return task


def _run(task: Task, folder: Path, until: int | None, started: float) -> Path:
    """Run every part that is not finished, and write the report."""
    accelerator, stages = task.accelerator, task.stages()
    accelerator.wait_for_everyone()
    _say(task, f"{task.describe()}\nrun folder {folder}")
    comparison = None
    if task.config.run.compare_loss is not None:
        comparison = _finished(folder / "comparison.json") or compare_losses(task, folder, task.start)
    results: list[dict[str, Any]] = []
    for name, stage in stages.items():
        result = _finished(folder / name / "result.json")
        if result is None and not stopped(accelerator):
            result = _run_stage(name, stage, task, folder / name, until, comparison)
        if result is None:
            _say(task, f"to continue: tlkernels {task.config.command} --resume {folder}")
            break
        results.append(result)
    else:
        if accelerator.is_main_process:
            report.write(folder, task, results, comparison, time.perf_counter() - started)
    accelerator.free_memory()  # before the process group ends, for which DDP's destructor would wait forever
    accelerator.end_training()
    return folder


def _run_stage(
    name: str, stage: Stage, task: Task, folder: Path, until: int | None, comparison: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return one line of the final table, or None if the training stopped before its end."""
    started, accelerator = time.perf_counter(), task.accelerator
    compared, task = stage.task is None, stage.task or task
    if stage.measure is not None:
        result = stage.measure()
        if result is None:
            return None
    else:
        assert stage.start is not None
        reset_peak()
        progress = loop.train(task, folder, stage.start, until)
        if progress.step < task.steps and (progress.step == until or stopped(accelerator)):
            _say(task, f"stopped after step {progress.step}")
            return None
        memory = {"peak_bytes": peak()}
        best = for_evaluation(accelerator, task.load(folder / "best"))
        losses = comparison["losses"] if comparison and compared else {}
        known = {name: losses[name]["loss_seconds"] for name in (OURS, "eager")} if "eager" in losses else None
        result = report.training_result(task, name, progress, task.scores(best, "test"), best, known) | memory
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "result.json", json.dumps(result, indent=2) + "\n")
        score = next(iter(task.headings))
        seconds = time.perf_counter() - started
        scored = f"{task.headings[score]} {result[score]:.3f}, " if score in result else ""
        _say(task, f"{stage.title}: {scored}{seconds:.0f} s")
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


def _finished(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _new_folder(config: Options, accelerator: Accelerator) -> Path:
    """Return the run folder, which the main process chooses."""
    chosen = [config.run.folder or f"runs/{datetime.now():%Y%m%d-%H%M%S}", ""]
    if accelerator.is_main_process:
        folder = Path(chosen[0])
        first = ("command", "command.new", "config.json.new")  # a kill can leave these behind before the job begins
        if folder.exists() and (not folder.is_dir() or any(file.name not in first for file in folder.iterdir())):
            chosen[1] = f"{folder} is not empty: give another --run.folder, or continue the run with --resume {folder}"
    broadcast_object_list(chosen)
    if chosen[1]:
        raise UserError(chosen[1])
    config.run.folder = chosen[0]
    return Path(chosen[0])


def _say(task: Task, text: str) -> None:
    if task.accelerator.is_main_process:
        print(text, flush=True)
