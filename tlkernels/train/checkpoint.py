"""Checkpoints that a kill or a full disk cannot damage: the last one is complete at any moment.

A folder is written next to the old one, flushed to the disk, and then renamed. Single files are written in this way
too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlkernels.train.errors import RunError, UserError, one_line
from tlkernels.train.task import Scores, Task


@dataclass
class Progress:
    """The state of a run, apart from the weights and the optimiser.

    The order of the rows, masks, dropout and the learning rate depend only on the seed and the step.
    """

    step: int = 0  # steps done
    best: Scores | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    micro_batch: int | None = None  # rows, where memory did not suffice for the one that was asked for
    seconds: float = 0.0  # time of the steps, without evaluations and checkpoints
    data_seconds: float = 0.0  # part of it that prepared the rows
    compute_seconds: float = 0.0  # part of it in the network, the loss and the optimiser
    fingerprint: str = ""  # of the training rows


def save_checkpoint(
    folder: Path, task: Task, network: nn.Module, optimizer_state: dict[str, Any], progress: Progress
) -> None:
    """Replace the checkpoint in `folder`. Raises `RunError` if that fails; the old one is then still complete."""

    def fill(place: Path) -> None:
        task.save(place, network)
        torch.save(optimizer_state, place / "optimizer.pt")
        (place / "progress.json").write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")

    if task.accelerator.is_main_process:
        write_folder(folder, fill)


def load_checkpoint(folder: Path, task: Task) -> tuple[nn.Module, dict[str, Any], Progress] | None:
    """Return the network, the optimiser's state and the progress, or None if there is no checkpoint yet.

    Raises:
        UserError: the checkpoint is incomplete.
    """
    settle(folder)
    if not folder.exists():
        return None
    network = task.load(folder)
    try:
        state: dict[str, Any] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        saved = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        best = saved.pop("best")
        progress = Progress(**saved, best=None if best is None else Scores(**best))
    except Exception as error:  # torch.load raises many kinds of errors for a bad file
        raise UserError(f"{folder} has no complete checkpoint: {one_line(error)}") from error
    return network, state, progress


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill(place)` write into an empty folder next to `final`, and then replace `final` by it.

    Raises:
        RunError: writing failed; `final` is unchanged.
    """
    new, old = _temporary(final)
    settle(final)
    try:
        new.mkdir(parents=True)
        fill(new)
        for file in [*new.rglob("*"), new]:
            to_disk(file)
        if final.exists():
            final.rename(old)  # a folder cannot replace another; `settle` repairs a kill between these two lines
        new.rename(final)
        to_disk(final.parent)
    except Exception as error:  # on a full disk torch, safetensors and tokenizers each raise their own error
        settle(final)
        kept = "the previous one is complete" if final.exists() else "there is no previous one"
        raise RunError(f"cannot write {final} ({one_line(error)}); {kept}") from error
    shutil.rmtree(old, ignore_errors=True)


def settle(final: Path) -> None:
    """Restore the old folder after a kill between the two renames, and remove what a kill left behind."""
    new, old = _temporary(final)
    if not final.exists() and old.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def write_file(final: Path, text: str) -> None:
    """Replace a file. Raises `RunError` if that fails; the old one is then still complete."""
    new = final.with_name(final.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        to_disk(new)
        new.replace(final)
    except OSError as error:
        raise RunError(f"cannot write {final}: {one_line(error)}") from error


def _temporary(final: Path) -> tuple[Path, Path]:
    return final.with_name(final.name + ".new"), final.with_name(final.name + ".old")


def to_disk(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
