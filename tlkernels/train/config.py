"""Every option of `tlkernels finetune`: one dataclass for each part of the job. All of them have defaults.

On the command line an option is `--part.name value`; in a YAML or JSON file it is `part: {name: value}`. A run folder
holds its own as `config.json`, which `--config` reads again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tlkernels.train.errors import UserError


@dataclass
class ModelConfig:
    """The network: a pretrained encoder, mask-aware mean pooling, and a linear head.

    Args:
        path: A local folder (config.json, *.safetensors, a tokenizer or image processor) or a hub name.
            None: all-MiniLM-L6-v2.
    """

    path: str | None = None


@dataclass
class DataConfig:
    """The rows: texts or images, each with a label. A row without a label is carried along and counts in nothing.

    Args:
        path: A .csv, .tsv, .jsonl, .ndjson, .json (also .gz) or .parquet file, a folder of images or data files, or a
            hub name. None: the built-in docstrings.
        subset: The subset of a hub data set that has several.
        split: The split to train on, where `path` has several.
        eval: A file like `path`, or another split of `path`, to evaluate on while training. None: a share of the rows.
        test: The same for the hold-out of the final table, which chooses nothing. None: a share of the rows.
        eval_fraction: Share of the rows for `eval` where none is named, 0 < share < 1.
        test_fraction: Share of the rows for `test` where none is named, 0 <= share < 1.
            0: the final table is made on the rows of `eval`.
        text_column: Column with the text.
        label_column: Column with the label, whose values are the names of the classes (-100 or empty: no label).
        image_column: Column with the image; it is looked for where there is no text column.
        num_labels: The labels are the integers 0 ... num_labels-1, each of them a class even where no row has it.
            None: the classes are the labels that the training rows have.
        encoding: Encoding of text files, as Python calls it: cp1252, utf-16. None: UTF-8, or what the file's byte order
            mark says.
        separator: The character between the fields of .csv and .tsv files; \\t is a tab. None: a comma, a tab in .tsv.
        quotes: Whether quotation marks may enclose fields of .csv and .tsv files (a doubled one is one of the text), or
            are text themselves. None: they may in .csv, and are text in .tsv.
        max_length: Tokens of a text that the model sees, special tokens included, 3 or more; never more than it has
            positions for. None: 128, and 32 on the built-in data, so that the demonstration is short.
        classes: Built-in data only: number of packages to tell apart.
        per_class: Built-in data only: docstrings of each package, all splits together.
    """

    path: str | None = None
    subset: str | None = None
    split: str = "train"
    eval: str | None = None
    test: str | None = None
    eval_fraction: float = 0.1
    test_fraction: float = 0.15
    text_column: str = "text"
    label_column: str = "label"
    image_column: str = "image"
    num_labels: int | None = None
    encoding: str | None = None
    separator: str | None = None
    quotes: bool | None = None
    max_length: int | None = None
    classes: int = 8
    per_class: int = 400

    @property
    def tokens(self) -> int:
        """Tokens of a text, as asked for or by default."""
        return self.max_length or (32 if self.path is None else 128)


@dataclass
class LossConfig:
    """The head's loss, tlkernels.CrossEntropyLoss.

    Args:
        label_smoothing: 0 <= value < 1.
        impl: Which implementation computes it. `tlkernels doctor` says which ones are here.
    """

    label_smoothing: float = 0.0
    impl: Literal["auto", "reference", "native", "triton"] = "auto"


@dataclass
class OptimConfig:
    """The optimiser, from torch.

    Args:
        name: Which one; `sgd` is without momentum, `momentum` is SGD with it.
        lr: Largest learning rate, above 0.
        weight_decay: 0 or more; biases and normalisation weights are left out.
        momentum: Of `momentum` alone, 0 < value < 1.
        clip_norm: Largest 2-norm of the whole gradient, above 0. None: no clipping.
    """

    name: Literal["adamw", "adam", "sgd", "momentum", "adagrad"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    momentum: float = 0.9
    clip_norm: float | None = 1.0


@dataclass
class ScheduleConfig:
    """The learning rate over the steps.

    Args:
        name: After the warm-up: down to 0 in a straight line, down to 0 along a cosine, or constant.
        warmup: Share of the steps over which the rate rises from 0, 0 <= share < 1.
    """

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1


@dataclass
class RunConfig:
    """The run itself.

    Args:
        folder: Where everything is written; it must not exist or be empty. None: runs/<date and time>.
        steps: Optimiser steps. None: as many as `epochs` make.
        epochs: Passes over the training rows, above 0, where `steps` is not given.
        batch_size: Rows of one optimiser step, over all processes and micro-batches together.
        micro_batch: Largest number of rows that go through the network at once. None: no limit.
        eval_every: Steps between evaluations, each followed by a checkpoint. None: a quarter of the run.
        log_every: Steps between lines in metrics.jsonl.
        patience: Evaluations without a better accuracy after which the run stops. None: it never stops early.
        seed: Of the head's first weights, the order of the rows and dropout.
        precision: bf16: autocast to bfloat16; the weights stay float32.
        device: cpu: use no accelerator even where there is one.
        tensorboard: Also write TensorBoard events.
        compare: Also train a linear probe on frozen features and the same network from random weights.
            None: only on the built-in data.
    """

    folder: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch: int | None = None
    eval_every: int | None = None
    log_every: int = 1
    patience: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    tensorboard: bool = False
    compare: bool | None = None


@dataclass
class Config:
    """All of it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise `UserError` naming the first option whose value is out of its range."""
        data, optim, run = self.data, self.optim, self.run
        whole = [("run.batch_size", run.batch_size), ("run.log_every", run.log_every), ("run.steps", run.steps)]
        whole += [
            ("run.micro_batch", run.micro_batch),
            ("run.eval_every", run.eval_every),
            ("run.patience", run.patience),
        ]
        whole += [("data.num_labels", data.num_labels), ("data.per_class", data.per_class)]
        for name, value in whole:
            _require(value is None or value >= 1, name, "1 or more", value)
        _require(
            data.encoding is None or _is_encoding(data.encoding), "data.encoding", "an encoding of text", data.encoding
        )
        one = data.separator is None or data.separator == r"\t" or len(data.separator) == 1
        one = one and data.separator not in ("\n", "\r", '"')
        _require(one, "data.separator", "one character, no quotation mark or line end", repr(data.separator))
        _require(data.max_length is None or data.max_length >= 3, "data.max_length", "3 or more", data.max_length)
        _require(data.classes >= 2, "data.classes", "2 or more", data.classes)
        _require(0 < data.eval_fraction < 1, "data.eval_fraction", "above 0 and below 1", data.eval_fraction)
        _require(0 <= data.test_fraction < 1, "data.test_fraction", "0 or more and below 1", data.test_fraction)
        both = data.eval_fraction + data.test_fraction
        _require(both < 1, "data.eval_fraction + data.test_fraction", "below 1", both)
        _require(0 <= self.loss.label_smoothing < 1, "loss.label_smoothing", "0 <= x < 1", self.loss.label_smoothing)
        _require(optim.lr > 0, "optim.lr", "above 0", optim.lr)
        _require(optim.weight_decay >= 0, "optim.weight_decay", "0 or more", optim.weight_decay)
        _require(0 < optim.momentum < 1, "optim.momentum", "above 0 and below 1", optim.momentum)
        _require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", "above 0", optim.clip_norm)
        _require(0 <= self.schedule.warmup < 1, "schedule.warmup", "0 or more and below 1", self.schedule.warmup)
        _require(run.epochs > 0, "run.epochs", "above 0", run.epochs)
        _require(run.seed >= 0, "run.seed", "0 or more", run.seed)

    def to_json(self) -> str:
        """Return it as JSON, which is YAML too."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, file: Path) -> Config:
        """Return the configuration that `to_json` made. Raises `UserError` where the file is not one."""
        try:
            parts: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
            config = cls()
            for part in fields(cls):
                setattr(config, part.name, type(getattr(config, part.name))(**parts[part.name]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a run's configuration ({type(error).__name__}: {error})") from error
        return config


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, UnicodeError):  # none of that name; one that is not of text
        return False
    return True


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise UserError(f"--{name} must be {expected}, got {value}")
