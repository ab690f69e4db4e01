"""The step of a `transformers.Trainer`, for `tlkernels.normalisation.check_normalisation`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainerMemoryTracker


class _BeforeOptimizer(Exception):
    """Ends the training before the optimiser's step."""


class _Stop(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _BeforeOptimizer


@contextmanager
def trainer_step(trainer: Any, counts: list[int]) -> Iterator[Callable[[int], None]]:
    """Give a function that trains up to the first step of the optimiser; its argument is the number of micro-batches.

    A copy of the trainer runs, so that the trainer does not change. The model is the same; its configurations are
    restored. The batch has `per_device_train_batch_size * gradient_accumulation_steps` rows, or the next larger number
    that all `counts` divide.

    Raises:
        ValueError: several processes or devices, DeepSpeed, or a batch that cannot be cut.
    """
    args = trainer.args
    if args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"step: expected a Trainer on one process and device without DeepSpeed, "
            f"got world_size={args.world_size}, n_gpu={args.n_gpu}"
        )
    configs = {
        id(value): (value, dict(vars(value)))
        for module in trainer.model.modules()
        for name in ("config", "generation_config")
        if hasattr(value := getattr(module, name, None), "__dict__")
    }
    multiple = math.lcm(*counts)
    rows = multiple * math.ceil(args.per_device_train_batch_size * args.gradient_accumulation_steps / multiple)
    batch = _first_batch(_copy(trainer, rows))
    cuts = {count: _cut("batch", batch, rows, count) for count in counts}
    try:

        def step(count: int) -> None:
            run = _copy(trainer, rows // count)
            run.args.gradient_accumulation_steps = count
            batches: Any = cuts[count]
            run.get_train_dataloader = lambda: DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
            try:
                run.train()
            except _BeforeOptimizer:
                return
            raise ValueError("step: the Trainer's train() ended before the first step of the optimiser")

        yield step
    finally:
        for config, values in configs.values():
            vars(config).clear()
            vars(config).update(values)


def _copy(trainer: Any, rows: int) -> Any:
    """Return a trainer with the same model and data that takes one step, with no callback of the user and no output."""
    run = copy.copy(trainer)
    run.args = args = copy.copy(trainer.args)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, 1
    args.max_steps, args.max_grad_norm = 1, 0.0
    args.eval_on_start = args.auto_find_batch_size = False
    run._train_batch_size = rows
    run.model_init = run.neftune_noise_alpha = None  # new weights; noise on the embeddings
    run.create_accelerator_and_postprocess()
    # Never stepped. The trainer's own may have states, and may change the weights when it is set to training mode.
    run.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    run.lr_scheduler, run._created_lr_scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1.0), False
    run.control = TrainerControl()
    handler: Any = CallbackHandler  # untyped
    callbacks = [DefaultFlowCallback, _Stop]
    run.callback_handler = handler(callbacks, run.model, run.processing_class, run.optimizer, run.lr_scheduler)
    tracker: Any = TrainerMemoryTracker
    run._memory_tracker = tracker(skip_memory_metrics=True)
    return run


def _first_batch(run: Any) -> Any:
    loader = run.get_train_dataloader()
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("step: the Trainer's training data are empty")
    if hasattr(loader, "end"):  # accelerate's loaders register themselves until they are exhausted
        loader.end()
    return batch


def _cut(name: str, value: Any, rows: int, count: int) -> list[Any]:
    """Cut what a collator returned into `count` pieces of the same number of rows."""
    if isinstance(value, Mapping):
        cuts = {key: _cut(str(key), item, rows, count) for key, item in value.items()}
        return [{key: pieces[k] for key, pieces in cuts.items()} for k in range(count)]
    if (
        isinstance(value, (str, bytes))
        or not hasattr(value, "__len__")
        or (isinstance(value, Tensor) and not value.ndim)
    ):
        return [value] * count
    if len(value) != rows:
        raise ValueError(
            f"step: expected {rows} rows in the first batch of the Trainer's data, got {len(value)} in {name!r}"
        )
    size = rows // count
    return [value[start : start + size] for start in range(0, rows, size)]
