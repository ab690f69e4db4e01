"""Using a trained network."""

from __future__ import annotations

from pathlib import Path

from tlkernels.train.encoders import Embedder, load_embedder
from tlkernels.train.model import Predictor, load_predictor


def load(run_folder: str | Path) -> Predictor | Embedder:
    """Return the best network of a run, in evaluation mode on the CPU.

    Of `tlkernels finetune` and `tlkernels distill-classifier` it is a classifier: `load("runs/mine").predict(["a"])`.
    Of `tlkernels contrast` it gives embeddings: `load("runs/mine").queries(["a"])`. Those of `tlkernels lm` and
    `tlkernels distill` are models of transformers, in the folders trained/best and distilled/best.

    Raises:
        UserError: the folder has no such network.
    """
    folder = Path(run_folder)
    command = folder / "command"
    if command.is_file() and command.read_text(encoding="utf-8").strip() == "contrast":
        return load_embedder(folder)
    return load_predictor(folder)
