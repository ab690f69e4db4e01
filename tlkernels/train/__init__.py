"""The trainer behind the commands. Importing it does not load transformers, accelerate or datasets.

Example:
    config = Config()
    config.data.path = "mine.csv"
    folder = run(config)
    answers = load(folder).predict(["a text"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlkernels.train.config import Config
from tlkernels.train.contrast_config import ContrastConfig
from tlkernels.train.distill_config import DistillClassifierConfig, DistillConfig
from tlkernels.train.errors import RunError, UserError, need_extras
from tlkernels.train.lm_config import LmConfig

if TYPE_CHECKING:
    from tlkernels.train.loading import load
    from tlkernels.train.pipeline import resume, run

__all__ = [
    "Config", "ContrastConfig", "DistillClassifierConfig", "DistillConfig", "LmConfig", "RunError", "UserError", "load",
    "resume", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in ("run", "resume", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need_extras()
    from tlkernels.train import loading, pipeline

    return loading.load if name == "load" else getattr(pipeline, name)
