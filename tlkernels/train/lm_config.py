"""The options of `tlkernels lm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tlkernels.train.config import OptimConfig, Options, RunConfig, ScheduleConfig, require
from tlkernels.train.documents_config import CorpusConfig, check_corpus


@dataclass
class LmModelConfig:
    """The network: a pretrained transformers model, with its own vocabulary head.

    Args:
        path: A local folder (config.json, *.safetensors, a tokenizer), a .gguf file, a hub name, the run folder of a
            finished `tlkernels lm` or `tlkernels distill`, or "smollm2": SmolLM2-135M-Instruct. None: all-MiniLM-L6-v2.
            An encoder without a head gets its embeddings as the head.
        objective: causal: predict the next token; masked: predict masked tokens. auto: as the model's configuration
            says.
        freeze: The number of blocks, counted from the input, that are not trained, nor the embeddings below them if
            the head does not share them.
        dropout: Whether the model's dropout is on. Off, as is usual where a text is seen once; on a CPU it takes a
            quarter of a step of MiniLM.
    """

    path: str | None = None
    objective: Literal["auto", "causal", "masked"] = "auto"
    freeze: int = 0
    dropout: bool = False


@dataclass
class MaskConfig:
    """The masks of a masked model, which are new in every step.

    Args:
        probability: Share of the tokens to predict, above 0 and below 1. Of these 80 % become the mask token, 10 % a
            random token, and 10 % stay (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).
        whole_words: Choose words, not tokens, and mask all tokens of each.
    """

    probability: float = 0.15
    whole_words: bool = False


@dataclass
class LmLossConfig:
    """The loss, tlkernels.linear_cross_entropy with the model's own head.

    Args:
        z_loss: Factor of the squared log of the softmax's normaliser, 0 or more (PaLM, Chowdhery et al. 2022: 1e-4).
        impl: The implementation that computes it. `tlkernels doctor` lists the available ones.
    """

    z_loss: float = 0.0
    impl: Literal["auto", "reference", "native", "triton"] = "auto"


@dataclass
class LmConfig(Options):
    """All options of `tlkernels lm`."""

    command = "lm"
    summary = "Train a pretrained language model, causal or masked, on text or on chats."

    model: LmModelConfig = field(default_factory=LmModelConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LmLossConfig = field(default_factory=LmLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise `UserError` with the name of the first option whose value is out of range."""
        super().check()
        check_corpus(self.data)
        require(self.model.freeze >= 0, "model.freeze", "0 or more", self.model.freeze)
        require(0 < self.mask.probability < 1, "mask.probability", "above 0 and below 1", self.mask.probability)
        require(self.loss.z_loss >= 0, "loss.z_loss", "0 or more", self.loss.z_loss)
