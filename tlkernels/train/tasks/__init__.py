"""The tasks, one file each, by the name of their command. Importing this loads none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tlkernels.train.config import Config, Options
from tlkernels.train.contrast_config import ContrastConfig
from tlkernels.train.distill_config import DistillClassifierConfig, DistillConfig
from tlkernels.train.lm_config import LmConfig

CONFIGS: dict[str, type[Options]] = {
    config.command: config for config in (Config, LmConfig, DistillConfig, DistillClassifierConfig, ContrastConfig)
}
_CLASSES = {
    "finetune": ("classify", "Classify"),
    "lm": ("lm", "LanguageModelling"),
    "distill": ("distill", "Distill"),
    "distill-classifier": ("distill_classifier", "DistillClassifier"),
    "contrast": ("contrast", "Contrast"),
}


def task_class(command: str) -> Any:
    """Return the subclass of `tlkernels.train.task.Task` that a command runs."""
    module, name = _CLASSES[command]
    return getattr(import_module(f"tlkernels.train.tasks.{module}"), name)
