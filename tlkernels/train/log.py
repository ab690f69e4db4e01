"""metrics.jsonl, with one line for each logged step and each evaluation, and TensorBoard if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tlkernels.train.checkpoint import write_file


class Log:
    """Appends to `folder/metrics.jsonl` and to TensorBoard; only the main process writes."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, main_process: bool) -> None:
        """Open the files. Drop lines of steps after `step`, which a killed run left behind."""
        self.file = self.board = None
        if not main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in read(path) if line["step"] <= step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Write one line and flush it."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, except a last one that a kill cut short; none if there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
