"""The tasks, one file each, by the name of their command. Importing this loads none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tlkernels.train.config import Config, Options
from tlkernels.train.distill_config import DistillConfig
from tlkernels.train.lm_config import LmConfig

CONFIGS: dict[str, type[Options]] = {"finetune": Config, "lm": LmConfig, "distill": DistillConfig}
_CLASSES = {
    "finetune": ("classify", "Classify"),
    "lm": ("lm", "LanguageModelling"),
    "distill": ("distill", "Distill"),
}


def task_class(command: str) -> Any:
    """Return the subclass of `tlkernels.train.task.Task` that a command runs."""
    module, name = _CLASSES[command]
    return getattr(import_module(f"tlkernels.train.tasks.{module}"), name)
