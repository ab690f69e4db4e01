"""`tlkernels lm`: causal and masked language modelling with the model's own vocabulary head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train import language, report
from tlkernels.train.lm_config import LmConfig
from tlkernels.train.packing import IGNORE
from tlkernels.train.paths import absolute
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.task import GATHERED, OURS, Loss, Stage
from tlkernels.train.token_task import TokenTask


class LanguageModelling(TokenTask):
    """Language modelling. The loss is linear cross entropy, summed over the predicted tokens."""

    command = "lm"

    def __init__(self, config: LmConfig, accelerator: Accelerator) -> None:
        """Read the model and the documents. Raises `UserError` if they or an option are wrong."""
        self.config, self.accelerator = config, accelerator
        self.read(config.model.path, config.model.objective, config.model)
        absolute(config.model, "path")
        self.losses = losses(config.loss.impl, config.loss.z_loss, gathered=self.some_ignored)

    def stages(self) -> dict[str, Stage]:
        """Return the pretrained network as it is, and trained."""
        return {
            "pretrained": Stage("pretrained", measure=self._pretrained),
            "trained": Stage("trained", start=self._new),
        }

    def save(self, folder: Path, network: Any) -> None:
        """Write the model and the tokenizer."""
        language.save(folder, network, self.tokenizer, {"causal": self.causal, "max_length": self.length})

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        return language.load(folder, self.config.model)

    def describe(self) -> str:
        """Return the data, the model and the number of steps."""
        kind = "causal" if self.causal else "masked"
        return (
            f"{kind} language modelling: {self.describe_rows()}; model {self.config.model.path or 'all-MiniLM-L6-v2'}, "
            f"{self.steps} steps of {self.batch_size} rows"
        )

    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return the perplexity before and after."""
        before, after = results
        return (
            f"The perplexity of {after['count']} hold-out tokens goes from {before['perplexity']:.2f} "
            f"to {after['perplexity']:.2f}."
        )

    def _new(self) -> language.LanguageModel:
        return language.new_model(self.name, self.extra, self.causal, self.config.model)

    def _pretrained(self) -> dict[str, Any]:
        network = for_evaluation(self.accelerator, self._new())
        return report.result("pretrained", self.scores(network, "test"))


def losses(impl: str, z_loss: float, gathered: bool) -> dict[str, Loss]:
    """Return tlkernels' and eager PyTorch's cross entropy with the vocabulary head, summed over the predicted tokens.

    `gathered` adds eager PyTorch's on the tokens that count.
    """

    def ours(
        hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, temperature: float, softcap: Any
    ) -> Tensor:
        return tlk.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, temperature=temperature, softcap=softcap, z_loss=z_loss,
            ignore_index=IGNORE, reduction="sum", num_valid=valid, impl=impl,
        )  # fmt: skip

    def eager(
        hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, temperature: float, softcap: Any
    ) -> Tensor:
        logits = functional.linear(hidden, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.flatten(0, -2) / temperature if temperature != 1 else logits.flatten(0, -2)
        loss = functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORE, reduction="sum")
        if z_loss:
            loss = loss + z_loss * (logits.logsumexp(-1)[target.flatten() != IGNORE] ** 2).sum()
        return loss

    def on_gathered(hidden: Tensor, target: Tensor, *rest: Any) -> Tensor:
        counted = target != IGNORE
        return eager(hidden[counted], target[counted], *rest)

    ways: dict[str, Loss] = {OURS: ours, "eager": eager}
    return ways | ({GATHERED: on_gathered} if gathered else {})
