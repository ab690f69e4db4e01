"""What the tasks on tokens share: their rows, and the scores of a model with a vocabulary head."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tlkernels as tlk
from tlkernels.train import language
from tlkernels.train.batches import micro_batches
from tlkernels.train.documents import SOURCES, load_documents
from tlkernels.train.errors import UserError
from tlkernels.train.lm_config import LmModelConfig, MaskConfig
from tlkernels.train.masking import MaskTokens, masked
from tlkernels.train.model import load_preprocessor, position_offset, positions
from tlkernels.train.packed_inputs import model_inputs, takes_additive_mask, verify_packing
from tlkernels.train.packing import IGNORE, Batch, PackedRows, causal_targets
from tlkernels.train.paths import absolute
from tlkernels.train.task import Scores, Task


class TokenTask(Task):
    """A task on rows of tokens. The configuration has `data`, `mask`, `loss.impl` and `run`.

    Attributes:
        name: the folder or hub name of the model whose tokenizer makes the rows; `extra` is for `from_pretrained`.
        causal: whether the rows are for a causal language model.
        length: the largest number of tokens in a row.
    """

    headings: ClassVar[dict[str, str]] = {"perplexity": "perplexity", "accuracy": "accuracy", "entropy": "entropy"}
    curve = "perplexity"
    unit = "tokens"
    verb = "are predicted"  # of tokens with a target
    sources = SOURCES  # files of the built-in documents for causal models
    rows: dict[str, PackedRows]

    def read(self, path: str | None, objective: str, options: LmModelConfig) -> language.LanguageModel:
        """Read the documents and the model of `path`, and return the model.

        Raises:
            UserError: the documents, the model or an option are wrong.
        """
        config = self.config
        with self.accelerator.main_process_first():  # it may download files for the others
            self.name, self.extra = language.find(path)
            self.causal = language.is_causal(self.name, self.extra, objective)
            self.tokenizer = load_preprocessor(self.name, images=False, **self.extra)
            documents = load_documents(config.data, config.run.seed, self.causal, self.sources)
        if self.causal and config.mask != MaskConfig():
            raise UserError("--mask.probability and --mask.whole_words apply to masked models; this one is causal")
        self.batch_size = config.run.batch_size or self.usual_batch_size
        network = language.new_model(self.name, self.extra, self.causal, options)
        limit = positions(network.model)
        self.length = min(config.data.tokens(self.causal), limit or config.data.tokens(self.causal))
        if config.data.pack:
            verify_packing(network.model, path or "all-MiniLM-L6-v2", self.length, causal=self.causal)
        self.offset, self.additive = position_offset(network.model), takes_additive_mask(network.model)
        self.masks = None if self.causal else MaskTokens.of(self.tokenizer)
        packing = {"causal": self.causal, "pack": config.data.pack, "words": config.mask.whole_words}
        made: dict[int, PackedRows] = {}  # "test" may be "eval"
        for documents_of_side in documents.values():
            if id(documents_of_side) not in made:
                made[id(documents_of_side)] = PackedRows(documents_of_side, self.tokenizer, self.length, **packing)
        self.rows = {side: made[id(of_side)] for side, of_side in documents.items()}
        if not any(self.rows["train"].counts):
            raise UserError("none of the training tokens counts: no chat has an answer of the assistant")
        self.row_size = float(self.rows["train"].lengths.float().mean())
        absolute(config.data, "path", *(side for side in ("eval", "test") if documents[side].split is None))
        return network

    @property
    def usual_batch_size(self) -> int:
        """The number of rows of a step if none is given."""
        return 8 if self.causal else 64

    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return the number of tokens with a target; 1 if there is none."""
        return max(1, int((self.targets("train", numbers, step)[2] != IGNORE).sum()))

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the model's inputs, the targets and their number."""
        batch, ids, target = self.targets(side, numbers, step)
        packed = Batch(ids, batch.piece, batch.position, batch.counted, batch.word)
        mode = {"packed_mask": self.config.data.pack, "offset": self.offset, "additive": self.additive}
        inputs = model_inputs(packed, causal=self.causal, **mode)
        valid = int((target != IGNORE).sum())
        return {name: value.to(self.device) for name, value in inputs.items()}, target.to(self.device), valid

    def targets(self, side: str, numbers: Tensor, step: int | None) -> tuple[Batch, Tensor, Tensor]:
        """Return the rows, the token ids that the model gets, and the targets."""
        batch = self.rows[side].batch(numbers)
        if self.masks is None:
            return batch, batch.ids, causal_targets(batch)
        mask, seed = self.config.mask, self.config.run.seed
        options: Any = {"probability": mask.probability, "whole_words": mask.whole_words}
        return batch, *masked(batch, numbers, self.masks, seed=seed, step=step, **options)

    @torch.no_grad()
    def scores(self, network: nn.Module, side: str) -> Scores:
        """Return loss, perplexity, accuracy and entropy of the predicted tokens, and the losses of the rows."""
        training, accelerator, rows = network.training, self.accelerator, self.rows[side]
        network.eval()

        def sums(hidden: Tensor, target: Tensor, valid: int, weight: Tensor, bias: Any, t: float, cap: Any) -> Tensor:
            options: Any = {"linear_bias": bias, "temperature": t, "softcap": cap, "num_valid": valid}
            out = tlk.linear_cross_entropy_stats(
                hidden, weight, target, **options, ignore_index=IGNORE, reduction="none", impl=self.config.loss.impl
            )
            figures = (out.loss, out.correct, out.entropy, target != IGNORE)
            return torch.stack([figure.double().sum(1) for figure in figures])

        everything = torch.arange(len(rows))
        found = torch.zeros(4, len(rows), dtype=torch.float64, device=self.device)
        limit = self.config.run.micro_batch or self.batch_size
        share = accelerator.process_index, accelerator.num_processes
        for piece in micro_batches(everything, rows.lengths, limit, *share):
            of_piece = network(*self.inputs(side, piece if len(piece) else everything[:1], None), sums)
            found[:, piece] = of_piece[:, : len(piece)]
        found = accelerator.reduce(found, "sum").cpu()
        network.train(training)
        loss, correct, entropy, count = found.sum(1).tolist()
        n = max(count, 1)
        values = {"loss": loss / n, "perplexity": math.exp(min(loss / n, 700)), "accuracy": correct / n}
        return Scores(values | {"entropy": entropy / n}, (-loss / n,), int(count), tuple(found[0].tolist()))

    def describe_rows(self) -> str:
        """Return the numbers of tokens, and what share of them has a target."""
        rows = self.rows["train"]
        tokens = {side: int(of_side.lengths.sum()) for side, of_side in self.rows.items()}
        hold_out = self.hold_out(tokens["test"], "tokens")
        return (
            f"{tokens['train']} training tokens in {len(rows)} rows up to {self.length}, {tokens['eval']} evaluation, "
            f"{hold_out}; {self.target_share:.0%} of the tokens {self.verb}"
        )

    @property
    def target_share(self) -> float:
        """The share of the training tokens that has a target."""
        rows = self.rows["train"]
        counted = int(rows.counts.sum()) / int(rows.lengths.sum())
        return counted if self.causal else counted * self.config.mask.probability

    @property
    def some_ignored(self) -> bool:
        """Whether so many tokens have no target that leaving them out is worth while."""
        rows = self.rows["train"]
        return not self.causal or int(rows.counts.sum()) < 0.9 * int(rows.lengths.sum())
