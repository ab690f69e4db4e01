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
from torch import nn

import tlkernels as tlk
from tlkernels.train import report
from tlkernels.train.checkpoint import write_file
from tlkernels.train.config import Config
from tlkernels.train.data import IGNORE, Data, Table, load_data
from tlkernels.train.errors import UserError
from tlkernels.train.loop import Job, train
from tlkernels.train.metrics import evaluate
from tlkernels.train.model import empty_encoder, load_model, load_preprocessor, new_classifier, positions, source
from tlkernels.train.probe import linear_probe
from tlkernels.train.rows import ImageRows, Rows, TextRows


def finetune(config: Config, until: int | None = None) -> Path:
    """Run the job of `config` and return its run folder.

    The folder gets results.json and curves.png, and for each training its metrics.jsonl, best model and last
    checkpoint. After step `until` the fine-tuning saves a checkpoint and stops.

    Raises:
        UserError: an option, the data or the model folder are wrong.
        RunError: the run had to stop; `resume` continues from the last checkpoint.
    """
    started = time.perf_counter()
    config.check()
    accelerator = start(config)
    folder = _new_folder(config, accelerator)
    job, name = prepare(config, accelerator)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.json", config.to_json())
    return _run(job, name, folder, until, started)


def resume(folder: str | Path, until: int | None = None) -> Path:
    """Continue the run in `folder` with its options, and return the folder. Raises as `finetune` does."""
    started = time.perf_counter()
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    config = Config.load(file)
    config.check()
    job, name = prepare(config, start(config))
    return _run(job, name, Path(folder), until, started)


def start(config: Config) -> Accelerator:
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
        # With mean pooling a pooler has no gradient. The numbers of micro-batches may differ between processes.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )


def prepare(config: Config, accelerator: Accelerator) -> tuple[Job, str]:
    """Return the job, with its preprocessed rows and its loss, and the model's folder or hub name."""
    if config.run.batch_size < accelerator.num_processes:
        raise UserError(f"--run.batch_size must be at least the number of processes, {accelerator.num_processes}")
    name = source(config.model)
    with accelerator.main_process_first():  # it may download files for the others
        data = load_data(config.data, config.run.seed)
        preprocessor = load_preprocessor(name, data.images)
        limit = None if data.images else positions(empty_encoder(name))
    _make_absolute(config, data)
    max_length = min(config.data.tokens, limit or config.data.tokens)

    def rows(table: Table) -> Rows:
        classes = len(data.classes)
        if data.images:
            return ImageRows(table, preprocessor, classes)
        return TextRows(table, preprocessor, max_length, classes)

    sides = {"train": rows(data.train), "eval": rows(data.eval)}
    sides["test"] = rows(data.test) if data.test is not None else sides["eval"]
    criterion = tlk.CrossEntropyLoss(
        ignore_index=IGNORE, reduction="sum", label_smoothing=config.loss.label_smoothing, impl=config.loss.impl
    )
    about = {"classes": data.classes, "images": data.images, "max_length": max_length}
    return Job(config, accelerator, sides, criterion, preprocessor, about), name


def _run(job: Job, name: str, folder: Path, until: int | None, started: float) -> Path:
    """Run every part that is not finished, and write the report."""
    accelerator, config = job.accelerator, job.config
    accelerator.wait_for_everyone()
    _say(job, f"{report.describe(job)}\nrun folder {folder}")
    compare = config.run.compare if config.run.compare is not None else config.data.path is None
    results: list[dict[str, Any]] = []
    for stage in ("frozen", "finetuned", "random") if compare else ("finetuned",):
        result = _finished(folder / stage) or _run_stage(stage, job, name, folder / stage, until)
        if result is None:
            _say(job, f"stopped after step {until}; to continue: tlkernels finetune --resume {folder}")
            break
        results.append(result)
    else:
        if accelerator.is_main_process:
            report.write(folder, job, results, time.perf_counter() - started)
    accelerator.end_training()
    return folder


def _run_stage(stage: str, job: Job, name: str, folder: Path, until: int | None) -> dict[str, Any] | None:
    """Return one line of the final table, or None if the training stopped at `until`."""
    seed, classes = job.config.run.seed, len(job.about["classes"])
    started, result = time.perf_counter(), dict[str, Any]()
    if stage == "frozen":
        if job.accelerator.is_main_process:
            network = new_classifier(name, classes, random_weights=False, seed=seed)
            network.head = nn.Identity()
            result = report.probe_result(job, linear_probe(job, network))
    else:
        progress = train(job, folder, lambda: new_classifier(name, classes, stage == "random", seed), until)
        if until is not None and progress.step == until < job.steps:
            return None
        best, _ = load_model(folder / "best")
        best = job.accelerator.prepare_model(best.eval(), evaluation_mode=True)
        scores = evaluate(best, job.rows["test"], job.criterion, job.accelerator)
        result = report.training_result(job, stage, progress, scores, best)
    if job.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "result.json", json.dumps(result, indent=2) + "\n")
        _say(job, f"{report.NAMES[stage]}: accuracy {result['accuracy']:.3f}, {time.perf_counter() - started:.0f} s")
    job.accelerator.wait_for_everyone()
    job.accelerator.free_memory()
    return result


def _finished(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _new_folder(config: Config, accelerator: Accelerator) -> Path:
    """Return the run folder, which the main process chooses."""
    chosen = [config.run.folder or f"runs/{datetime.now():%Y%m%d-%H%M%S}", ""]
    if accelerator.is_main_process:
        folder = Path(chosen[0])
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            chosen[1] = f"{folder} is not empty: give another --run.folder, or continue the run with --resume {folder}"
    broadcast_object_list(chosen)
    if chosen[1]:
        raise UserError(chosen[1])
    config.run.folder = chosen[0]
    return Path(chosen[0])


def _make_absolute(config: Config, data: Data) -> None:
    """Make paths in `config` absolute, so that `resume` finds them. A link keeps its name, which has the ending."""
    for part, option in ((config.model, "path"), (config.data, "path"), (config.data, "eval"), (config.data, "test")):
        value = getattr(part, option)
        if value is not None and not (option != "path" and value in data.splits) and Path(value).expanduser().exists():
            path = Path(value).expanduser()
            setattr(part, option, str(path.parent.resolve() / path.name))


def _say(job: Job, text: str) -> None:
    if job.accelerator.is_main_process:
        print(text, flush=True)
