"""`tlkernels lm`: causal and masked language modelling with the model's own vocabulary head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk
from tlkernels.train import language, report
from tlkernels.train.batches import micro_batches
from tlkernels.train.documents import load_documents
from tlkernels.train.errors import UserError
from tlkernels.train.lm_config import LmConfig, MaskConfig
from tlkernels.train.masking import MaskTokens, masked
from tlkernels.train.model import load_preprocessor, position_offset, positions
from tlkernels.train.packed_inputs import model_inputs, takes_additive_mask, verify_packing
from tlkernels.train.packing import IGNORE, Batch, PackedRows, causal_targets
from tlkernels.train.paths import absolute
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.task import OURS, Scores, Stage, Task


class LanguageModelling(Task):
    """Language modelling. The loss is linear cross entropy, summed over the predicted tokens."""

    command = "lm"
    headings: ClassVar[dict[str, str]] = {"perplexity": "perplexity", "accuracy": "accuracy", "entropy": "entropy"}
    curve = "perplexity"
    unit = "tokens"
    rows: dict[str, PackedRows]

    def __init__(self, config: LmConfig, accelerator: Accelerator) -> None:
        """Read the model and the documents. Raises `UserError` if they or an option are wrong."""
        self.config, self.accelerator = config, accelerator
        with accelerator.main_process_first():  # it may download files for the others
            self.name, self.extra = language.find(config.model.path)
            self.causal = language.is_causal(self.name, self.extra, config.model.objective)
            self.tokenizer = load_preprocessor(self.name, images=False, **self.extra)
            documents = load_documents(config.data, config.run.seed, self.causal)
        if self.causal and config.mask != MaskConfig():
            raise UserError("--mask.probability and --mask.whole_words apply to masked models; this one is causal")
        self.batch_size = config.run.batch_size or (8 if self.causal else 64)
        model = self._new().model
        limit = positions(model)
        self.length = min(config.data.tokens(self.causal), limit or config.data.tokens(self.causal))
        if config.data.pack:
            verify_packing(model, config.model.path or "all-MiniLM-L6-v2", self.length, causal=self.causal)
        self.offset, self.additive = position_offset(model), takes_additive_mask(model)
        self.masks = None if self.causal else MaskTokens.of(self.tokenizer)
        options = {"causal": self.causal, "pack": config.data.pack, "words": config.mask.whole_words}
        made: dict[int, PackedRows] = {}  # "test" may be "eval"
        for documents_of_side in documents.values():
            if id(documents_of_side) not in made:
                made[id(documents_of_side)] = PackedRows(documents_of_side, self.tokenizer, self.length, **options)
        self.rows = {side: made[id(of_side)] for side, of_side in documents.items()}
        if not any(self.rows["train"].counts):
            raise UserError("none of the training tokens counts: no chat has an answer of the assistant")
        self.row_size = float(self.rows["train"].lengths.float().mean())
        absolute(config.model, "path")
        absolute(config.data, "path", *(side for side in ("eval", "test") if documents[side].split is None))
        z_loss, impl = config.loss.z_loss, config.loss.impl

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

        def gathered(hidden: Tensor, target: Tensor, *rest: Any) -> Tensor:
            counted = target != IGNORE
            return eager(hidden[counted], target[counted], *rest)

        self.losses = {OURS: ours, "eager": eager}
        if not self.causal or int(self.rows["train"].counts.sum()) < 0.9 * int(self.rows["train"].lengths.sum()):
            self.losses["eager on gathered rows"] = gathered

    def stages(self) -> dict[str, Stage]:
        """Return the pretrained network as it is, and trained."""
        return {
            "pretrained": Stage("pretrained", measure=self._pretrained),
            "trained": Stage("trained", start=self._new),
        }

    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return the number of predicted tokens; 1 if there is none."""
        return max(1, int((self._targets("train", numbers, step)[2] != IGNORE).sum()))

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the model's inputs, the targets and their number."""
        batch, ids, target = self._targets(side, numbers, step)
        packed = Batch(ids, batch.piece, batch.position, batch.counted, batch.word)
        mode = {"packed_mask": self.config.data.pack, "offset": self.offset, "additive": self.additive}
        inputs = model_inputs(packed, causal=self.causal, **mode)
        valid = int((target != IGNORE).sum())
        return {name: value.to(self.device) for name, value in inputs.items()}, target.to(self.device), valid

    @torch.no_grad()
    def scores(self, network: nn.Module, side: str) -> Scores:
        """Return loss, perplexity, accuracy and entropy of the predicted tokens, from one pass."""
        training, accelerator, rows = network.training, self.accelerator, self.rows[side]
        network.eval()

        def sums(hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, t: float, cap: Any) -> Tensor:
            options: Any = {"linear_bias": bias, "temperature": t, "softcap": cap, "num_valid": valid}
            out = tlk.linear_cross_entropy_stats(
                hidden, weight, target, **options, ignore_index=IGNORE, reduction="sum", impl=self.config.loss.impl
            )
            return torch.stack([out.loss.double(), out.correct.sum().double(), out.entropy.double().sum()])

        everything, total = torch.arange(len(rows)), torch.zeros(4, dtype=torch.float64, device=self.device)
        limit = self.config.run.micro_batch or self.batch_size
        share = accelerator.process_index, accelerator.num_processes
        for piece in micro_batches(everything, rows.lengths, limit, *share):
            inputs = self.inputs(side, piece if len(piece) else everything[:1], None)
            found = network(*inputs, sums)
            if len(piece):
                total[:3] += found
                total[3] += inputs[-1]
        loss, correct, entropy, count = accelerator.reduce(total, "sum").tolist()
        network.train(training)
        n = max(count, 1)
        values = {"loss": loss / n, "perplexity": math.exp(min(loss / n, 700)), "accuracy": correct / n}
        return Scores(values | {"entropy": entropy / n}, (-loss / n,), int(count))

    def save(self, folder: Path, network: Any) -> None:
        """Write the model and the tokenizer."""
        language.save(folder, network, self.tokenizer, {"causal": self.causal, "max_length": self.length})

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        return language.load(folder, self.config.model)

    def describe(self) -> str:
        """Return the data, the model and the number of steps."""
        rows = self.rows["train"]
        tokens = {side: int(of_side.lengths.sum()) for side, of_side in self.rows.items()}
        apart = self.rows["test"] is not self.rows["eval"]
        hold_out = f"{tokens['test']} hold-out" if apart else "the evaluation tokens are the hold-out"
        kind = "causal" if self.causal else "masked"
        counted = int(rows.counts.sum()) / tokens["train"]
        predicted = counted if self.causal else counted * self.config.mask.probability
        return (
            f"{kind} language modelling: {tokens['train']} training tokens in {len(rows)} rows up to {self.length}, "
            f"{tokens['eval']} evaluation, {hold_out}; {predicted:.0%} of the tokens are predicted; "
            f"model {self.config.model.path or 'all-MiniLM-L6-v2'}, {self.steps} steps of {self.batch_size} rows"
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

    def _targets(self, side: str, numbers: Tensor, step: int | None) -> tuple[Batch, Tensor, Tensor]:
        """Return the rows, the token ids that the model gets, and the targets."""
        batch = self.rows[side].batch(numbers)
        if self.masks is None:
            return batch, batch.ids, causal_targets(batch)
        mask, seed = self.config.mask, self.config.run.seed
        options: Any = {"probability": mask.probability, "whole_words": mask.whole_words}
        return batch, *masked(batch, numbers, self.masks, seed=seed, step=step, **options)
