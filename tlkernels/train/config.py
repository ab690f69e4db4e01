"""The options that every command shares, and those of `tlkernels finetune`: one dataclass for each part of the job.

All of them have defaults. On the command line an option is `--part.name value`; in a YAML or JSON file it is
`part: {name: value}`. A run folder has the options of its run in `config.json`, which `--config` can read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from tlkernels.train.errors import UserError


@dataclass
class OptimConfig:
    """The optimiser, from torch.

    Args:
        name: The optimiser; `sgd` has no momentum, `momentum` is SGD with momentum.
        lr: Largest learning rate, above 0.
        weight_decay: 0 or more; not applied to biases and normalisation weights.
        momentum: Used by `momentum` alone, 0 < value < 1.
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
        name: After the warm-up: linear to 0, cosine to 0, or constant.
        warmup: Share of the steps over which the rate rises from 0, 0 <= share < 1.
    """

    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1


@dataclass
class RunConfig:
    """The run itself.

    Args:
        folder: The folder for all results; it must be empty or not exist. None: runs/<date and time>.
        steps: Optimiser steps. None: given by `epochs`.
        epochs: Passes over the training rows, above 0, if `steps` is not given.
        batch_size: Rows of one optimiser step, over all processes and micro-batches.
            None: 32; in `lm` and `distill` 64, for causal models 8, and 2 on the built-in data of `distill`; in
            `contrast` 128.
        micro_batch: Largest number of rows in one forward pass of a process. None: no limit. Where memory runs out, it
            is halved.
        eval_every: Steps between evaluations, each followed by a checkpoint. None: a quarter of the run.
        log_every: Steps between lines in metrics.jsonl.
        patience: Evaluations without a better score after which the run stops. None: it never stops early.
        seed: Seed of new weights, the order of the rows, masks and dropout.
        precision: bf16: autocast to bfloat16; the weights stay float32.
        device: cpu: use no accelerator.
        tensorboard: Also write TensorBoard events.
        compare_loss: Before the training, train this many steps, 3 or more, with tlkernels' loss and with PyTorch's,
            and compare the losses, the time and the memory. None: no comparison.
    """

    folder: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int | None = None
    micro_batch: int | None = None
    eval_every: int | None = None
    log_every: int = 1
    patience: int | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    tensorboard: bool = False
    compare_loss: int | None = None


class Options:
    """What the configurations of all commands share; a subclass is a dataclass with one field for each part."""

    command: ClassVar[str]
    summary: ClassVar[str]  # of the command, one sentence

    optim: OptimConfig
    schedule: ScheduleConfig
    run: Any  # a RunConfig

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        optim, run = self.optim, self.run
        for name in ("batch_size", "log_every", "steps", "micro_batch", "eval_every", "patience"):
            value = getattr(run, name)
            require(value is None or value >= 1, f"run.{name}", "1 or more", value)
        require(run.compare_loss is None or run.compare_loss >= 3, "run.compare_loss", "3 or more", run.compare_loss)
        require(optim.lr > 0, "optim.lr", "above 0", optim.lr)
        require(optim.weight_decay >= 0, "optim.weight_decay", "0 or more", optim.weight_decay)
        require(0 < optim.momentum < 1, "optim.momentum", "above 0 and below 1", optim.momentum)
        require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", "above 0", optim.clip_norm)
        require(0 <= self.schedule.warmup < 1, "schedule.warmup", "0 or more and below 1", self.schedule.warmup)
        require(run.epochs > 0, "run.epochs", "above 0", run.epochs)
        require(run.seed >= 0, "run.seed", "0 or more", run.seed)

    def to_json(self) -> str:
        """Return the options as JSON, which is also YAML."""
        return json.dumps(asdict(cast(Any, self)), indent=2) + "\n"

    @classmethod
    def load(cls, file: Path) -> Self:
        """Return the options that `to_json` wrote. Raises `UserError` if the file does not have them."""
        try:
            parts: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
            config = cls()
            for part in fields(cast(Any, cls)):
                setattr(config, part.name, type(getattr(config, part.name))(**parts[part.name]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a run's configuration ({type(error).__name__}: {error})") from error
        return config


# ---- tlkernels finetune ------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """The network: a pretrained encoder, mask-aware mean pooling, and a linear head.

    Args:
        path: A local folder (config.json, *.safetensors, a tokenizer or image processor) or a hub name.
            None: all-MiniLM-L6-v2.
        adapted: The run folder of a `tlkernels lm` that started from `path`: the final table gets one more line, the
            classifier that is fine-tuned from its best network. None: no such line.
    """

    path: str | None = None
    adapted: str | None = None


@dataclass
class DataConfig:
    """The rows: texts or images, each with a label. A row without a label counts in no loss and no score.

    Args:
        path: A .csv, .tsv, .jsonl, .ndjson, .json (also .gz) or .parquet file, a folder of images or data files, or a
            hub name. None: the built-in docstrings.
        subset: The subset of a hub data set that has several.
        split: The split to train on, if `path` has several.
        eval: A file like `path`, or another split of `path`, to evaluate on while training. None: a share of the rows.
        test: The same for the hold-out of the final table, on which nothing is tuned. None: a share of the rows.
        eval_fraction: Share of the rows for `eval` if none is named, 0 < share < 1.
        test_fraction: Share of the rows for `test` if none is named, 0 <= share < 1.
            0: the final table uses the rows of `eval`.
        text_column: Column with the text.
        label_column: Column with the label, whose values are the names of the classes (-100 or empty: no label).
        image_column: Column with the image, used if there is no text column.
        num_labels: The labels are the integers 0 ... num_labels-1, and each is a class even if no row has it.
            None: the classes are the labels of the training rows.
        encoding: Encoding of text files, by its name in Python, such as cp1252 or utf-16. None: UTF-8, or that of the
            file's byte order mark.
        separator: The character between the fields of .csv and .tsv files; \\t is a tab. None: a comma, a tab in .tsv.
        quotes: Whether quotation marks may enclose the fields of .csv and .tsv files (a doubled one stands for one of
            the text). Otherwise they are text. None: true in .csv, false in .tsv.
        max_length: The number of tokens after which a text is cut, special tokens included, 3 or more; never more than
            the model's positions. None: 128, and 32 on the built-in data, so that the demonstration is short.
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
        """`max_length`, or its default."""
        return self.max_length or (32 if self.path is None else 128)


@dataclass
class LossConfig:
    """The head's loss, tlkernels.CrossEntropyLoss.

    Args:
        label_smoothing: 0 <= value < 1.
        impl: The implementation that computes it. `tlkernels doctor` lists the available ones.
    """

    label_smoothing: float = 0.0
    impl: Literal["auto", "reference", "native", "triton"] = "auto"


@dataclass
class FinetuneRunConfig(RunConfig):
    """The run itself, and what the fine-tuned network is compared with.

    Args:
        compare: Also train a linear probe on frozen features, and the same network from random weights.
            None: only on the built-in data.
    """

    compare: bool | None = None


@dataclass
class Config(Options):
    """All options of `tlkernels finetune`."""

    command = "finetune"
    summary = "Fine-tune a pretrained encoder with a linear head."

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        super().check()
        check_data(self.data)
        require(0 <= self.loss.label_smoothing < 1, "loss.label_smoothing", "0 <= x < 1", self.loss.label_smoothing)


def check_data(data: DataConfig) -> None:
    """Raise `UserError` with the name of the first option of the rows whose value is out of range."""
    require(data.num_labels is None or data.num_labels >= 1, "data.num_labels", "1 or more", data.num_labels)
    require(data.per_class >= 1, "data.per_class", "1 or more", data.per_class)
    check_encoding(data.encoding)
    check_separator(data.separator)
    require(data.max_length is None or data.max_length >= 3, "data.max_length", "3 or more", data.max_length)
    require(data.classes >= 2, "data.classes", "2 or more", data.classes)
    check_shares(data.eval_fraction, data.test_fraction)


def check_encoding(name: str | None) -> None:
    """Raise `UserError` unless --data.encoding is None or a text encoding of Python."""
    require(name is None or is_encoding(name), "data.encoding", "a text encoding", name)


def check_separator(character: str | None) -> None:
    """Raise `UserError` unless --data.separator is None or can separate fields."""
    valid = character is None or character == r"\t" or len(character) == 1
    valid = valid and character not in ("\n", "\r", '"')
    expected = "one character other than a quotation mark or a line end"
    require(valid, "data.separator", expected, repr(character))


def check_shares(of_eval: float, of_test: float) -> None:
    """Raise `UserError` unless --data.eval_fraction and --data.test_fraction leave rows to train on."""
    require(0 < of_eval < 1, "data.eval_fraction", "above 0 and below 1", of_eval)
    require(0 <= of_test < 1, "data.test_fraction", "0 or more and below 1", of_test)
    require(of_eval + of_test < 1, "data.eval_fraction + data.test_fraction", "below 1", of_eval + of_test)


def is_encoding(name: str) -> bool:
    """Return whether Python has a text encoding of this name."""
    try:
        "".encode(name)
    except (LookupError, UnicodeError):  # an unknown name, or an encoding of bytes
        return False
    return True


def require(holds: bool, name: str, expected: str, value: object) -> None:
    """Raise `UserError` for option `--name`, unless `holds`."""
    if not holds:
        raise UserError(f"--{name} must be {expected}, got {value}")
