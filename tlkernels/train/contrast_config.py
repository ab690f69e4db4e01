"""The options of `tlkernels contrast`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tlkernels.train.config import OptimConfig, Options, RunConfig, ScheduleConfig, require
from tlkernels.train.errors import UserError
from tlkernels.train.pairs_config import PairsConfig, check_pairs

KINDS = {"info_nce": "pairs", "sigmoid": "pairs", "nt_xent": "views", "sup_con": "labels"}  # of the rows, by the loss


@dataclass
class EncodersConfig:
    """The encoders: the mean of the last hidden states over all tokens but padding, divided by its 2-norm.

    Args:
        path: The encoder of queries and, without `key_path`, of keys: a local folder (config.json, *.safetensors, a
            tokenizer or image processor) or a hub name. None: all-MiniLM-L6-v2.
        key_path: Another encoder for the keys.
        dimensions: The length of the embeddings, which a learned linear map of each encoder has then. None: the width
            of the encoder, without a map; two encoders must have the same.
        dropout: Whether dropout is on. None: only where it makes the two views of a text differ (`nt_xent`).
    """

    path: str | None = None
    key_path: str | None = None
    dimensions: int | None = None
    dropout: bool | None = None


@dataclass
class ContrastLossConfig:
    """The loss of a whole batch, over all processes.

    Args:
        name: info_nce: tlkernels.info_nce of queries and keys; sigmoid: tlkernels.sigmoid_contrastive of them (SigLIP);
            nt_xent: tlkernels.nt_xent of two views of each row (SimCLR); sup_con: tlkernels.sup_con, with labels.
        symmetric: `info_nce` only: also classify each key among the queries. Hard negatives take part in one direction.
        temperature: Divides the cosine similarities at the start, above 0; 0.01 or more if it is learned.
        learnable: Whether the temperature is learned, down to 0.01.
        bias: `sigmoid` only: what is added to the similarities at the start, and learned.
        label_smoothing: `info_nce` only: 0 <= value < 1.
        impl: The implementation that computes it. `tlkernels doctor` lists the available ones.
    """

    name: Literal["info_nce", "sigmoid", "nt_xent", "sup_con"] = "info_nce"
    symmetric: bool = True
    temperature: float = 0.05
    learnable: bool = True
    bias: float = -10.0
    label_smoothing: float = 0.0
    impl: Literal["auto", "reference", "native", "triton"] = "auto"


@dataclass
class ContrastConfig(Options):
    """All options of `tlkernels contrast`."""

    command = "contrast"
    summary = "Train one or two encoders so that what belongs together has similar embeddings."

    model: EncodersConfig = field(default_factory=EncodersConfig)
    data: PairsConfig = field(default_factory=PairsConfig)
    loss: ContrastLossConfig = field(default_factory=ContrastLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        super().check()
        check_pairs(self.data)
        model, loss, default = self.model, self.loss, ContrastLossConfig()
        require(model.dimensions is None or model.dimensions >= 1, "model.dimensions", "1 or more", model.dimensions)
        require(loss.temperature > 0, "loss.temperature", "above 0", loss.temperature)
        valid = not loss.learnable or loss.temperature >= 0.01
        require(valid, "loss.temperature", "0.01 or more if it is learned", loss.temperature)
        require(0 <= loss.label_smoothing < 1, "loss.label_smoothing", "0 <= x < 1", loss.label_smoothing)
        require(
            self.run.batch_size is None or self.run.batch_size >= 2, "run.batch_size", "2 or more", self.run.batch_size
        )
        for name, only in {"symmetric": "info_nce", "label_smoothing": "info_nce", "bias": "sigmoid"}.items():
            if loss.name != only and getattr(loss, name) != getattr(default, name):
                raise UserError(f"--loss.{name} applies to {only}, not to {loss.name}")
        if loss.name != "info_nce" and self.data.negatives:
            raise UserError(f"--data.negatives applies to info_nce; {loss.name} has no hard negatives")
        if KINDS[loss.name] != "pairs" and model.key_path is not None:
            raise UserError(f"--model.key_path applies to pairs; {loss.name} has one encoder")
