"""`tlkernels contrast`: one or two encoders learn which queries and keys belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tlkernels.train import contrast_losses, report
from tlkernels.train.batches import micro_batches, step_seed
from tlkernels.train.contrast_config import KINDS, ContrastConfig
from tlkernels.train.encoders import new_encoders, read_encoders, save_encoders
from tlkernels.train.errors import UserError
from tlkernels.train.model import empty_encoder, load_preprocessor, positions, source
from tlkernels.train.pair_rows import PairRows
from tlkernels.train.paired import paired_difference
from tlkernels.train.pairs import Pairs, load_pairs
from tlkernels.train.paths import absolute
from tlkernels.train.retrieval import ranks, recall, reciprocals
from tlkernels.train.sharding import for_evaluation
from tlkernels.train.task import OURS, Scores, Stage, Task


class Contrast(Task):
    """Contrastive training. The loss is one of all rows of a batch, over all processes."""

    command = "contrast"
    headings: ClassVar[dict[str, str]] = {"mrr10": "MRR@10", "recall1": "recall@1", "recall10": "recall@10"}
    curve = "mrr10"
    unit, row_size = "pairs", 1.0
    features, joint = 3, True
    rows: dict[str, PairRows]

    def __init__(self, config: ContrastConfig, accelerator: Accelerator) -> None:
        """Read the data and the encoders. Raises `UserError` if they or an option are wrong."""
        self.config, self.accelerator = config, accelerator
        self.batch_size = config.run.batch_size or 128
        if self.batch_size % accelerator.num_processes:
            raise UserError(
                f"--run.batch_size must be a multiple of the number of processes, {accelerator.num_processes}, since "
                f"they compare equal shares; got {self.batch_size}"
            )
        self.kind = KINDS[config.loss.name]
        with accelerator.main_process_first():  # it may download files for the others
            paths = [config.model.path, *([config.model.key_path] if config.model.key_path else [])]
            self.names = [source(path) for path in paths]
            data = load_pairs(config.data, config.run.seed, self.kind)  # type: ignore[arg-type]
            images = data["train"].images
            self.images = [images[0], images[1] if self.kind == "pairs" else images[0]]
            if self.images[0] != self.images[1] and len(self.names) == 1:
                raise UserError("queries and keys of two kinds need two encoders: --model.path and --model.key_path")
            sides = list(zip([self.names[0], self.names[-1]], self.images, strict=True))
            self.preprocessors = [load_preprocessor(name, image) for name, image in sides]
            limits = [None if image else positions(empty_encoder(name)) for name, image in sides]
        if data["train"].negatives and config.loss.name != "info_nce":
            raise UserError(f"--data.negative_column applies to info_nce; {config.loss.name} has no hard negatives")
        wanted = (config.data.query_tokens, config.data.key_tokens)
        self.lengths = [min(length, limit or length) for length, limit in zip(wanted, limits, strict=True)]
        self.dropout = config.model.dropout
        if self.dropout is None:
            self.dropout = self.kind == "views" and not self.images[0]
        if self.kind == "views" and not self.images[0] and not self.dropout:
            raise UserError("--model.dropout must not be false: without it the two views of a text are the same")
        absolute(config.model, "path", "key_path")
        absolute(config.data, "path", *(side for side in ("eval", "test") if data[side].split is None))

        def rows(pairs: Pairs) -> PairRows:
            first, second = self.preprocessors
            return PairRows(pairs, first, second, self.lengths[0], self.lengths[1])

        self.rows = {"train": rows(data["train"]), "eval": rows(data["eval"])}
        self.rows["test"] = self.rows["eval"] if data["test"] is data["eval"] else rows(data["test"])
        if len(self.rows["train"]) < self.batch_size:
            raise UserError(
                f"--run.batch_size must be at most {len(self.rows['train'])}, the training rows: in a larger batch a "
                f"row would be its own negative; got {self.batch_size}"
            )
        group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
        self.losses = contrast_losses.losses(config.loss, group, config.run.micro_batch)
        self.alone = contrast_losses.losses(config.loss, None, None)[OURS]  # in evaluations each process has all rows

    def stages(self) -> dict[str, Stage]:
        """Return the pretrained encoders as they are, and trained."""
        return {"pretrained": Stage("before", measure=self._before), "trained": Stage("after", start=self._new)}

    def divisor(self, numbers: Tensor, step: int) -> float:
        """Return 1: the loss is a mean."""
        return 1.0

    def inputs(self, side: str, numbers: Tensor, step: int | None) -> tuple[Any, ...]:
        """Return the encoders' inputs, the ids and the labels. In an evaluation the views are always the same."""
        seed = self.config.run.seed if step is None else step_seed(self.config.run.seed, step)
        return (
            self.rows[side].inputs(numbers, self.device, seed if side == "train" or self.kind == "views" else None),
        )

    @torch.no_grad()
    def scores(self, network: nn.Module, side: str) -> Scores:
        """Return the loss of batches as large as in training, and how well each query finds its key among all keys."""
        training, rows = network.training, self.rows[side]
        network.train(self.kind == "views" and not self.images[0])  # dropout makes the views
        found: list[list[Tensor | None]] = [[], []]
        scale: list[Any] = []

        def keep(query: Tensor, key: Tensor | None, negatives: Any, ids: Any, labels: Any, *rest: Any) -> Tensor:
            found[0].append(query.float())
            found[1].append(None if key is None else key.float())
            scale[:] = rest
            return torch.zeros((), device=self.device)

        everything, share = torch.arange(len(rows)), (self.accelerator.process_index, self.accelerator.num_processes)
        pieces = micro_batches(everything, rows.lengths, 64, *share)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.run.seed)
            for piece in pieces:
                [inputs] = self.inputs(side, piece if len(piece) else everything[:1], None)
                network(inputs | {"negatives": None}, keep)  # no score takes the hard negatives
        network.train(training)
        query: Any
        query, key = (self._together(parts, pieces, len(rows)) for parts in found)
        ids = (rows.ids if rows.labels is None else rows.labels).to(self.device)
        place = ranks(query, query if key is None else key, ids, ids, same=key is None)
        reciprocal = reciprocals(place)
        loss, mrr = self._loss(query, key, rows, scale), float(reciprocal.mean())
        values = {"loss": loss, "mrr10": mrr, "recall1": recall(place, 1), "recall10": recall(place, 10)}
        return Scores(values, (mrr, -loss), len(rows), tuple(reciprocal.tolist()))

    def save(self, folder: Path, network: Any) -> None:
        """Write the encoders, their preprocessors and the other parameters."""
        about = {"lengths": self.lengths, "images": self.images}
        save_encoders(folder, network, self.preprocessors, about)

    def load(self, folder: Path) -> nn.Module:
        """Return the network that `save` wrote."""
        return read_encoders(folder, self.config.loss, self.config.model, bool(self.dropout))[0]

    def describe(self) -> str:
        """Return the data, the model and the number of steps."""
        sizes = {side: len(rows) for side, rows in self.rows.items()}
        hold_out = self.hold_out(sizes["test"])
        what = {"pairs": "pairs", "views": "rows in two views", "labels": "labelled rows"}[self.kind]
        models = " and ".join(
            p or "all-MiniLM-L6-v2" for p in (self.config.model.path, self.config.model.key_path)[: len(self.names)]
        )
        negatives = self.rows["train"].negatives
        return (
            f"contrast ({self.config.loss.name}): {sizes['train']} training {what}"
            f"{f' with {negatives} hard negatives each' if negatives else ''}, {sizes['eval']} evaluation, {hold_out}; "
            f"model {models}, {self.steps} steps of {self.batch_size} rows"
        )

    def verdict(self, results: list[dict[str, Any]]) -> str:
        """Return the MRR before and after, and whether they can be told apart."""
        before, after = results
        gain, margin = paired_difference(after["each"], before["each"])
        figures = (
            f"MRR@10 {after['mrr10']:.3f} against {before['mrr10']:.3f} on {after['count']} hold-out queries, "
            f"{gain:+.3f} ± {margin:.3f} (95 %)"
        )
        if abs(gain) <= margin:
            return f"After and before training cannot be told apart: {figures}."
        return f"After training the encoders find {'more' if gain > 0 else 'less'}: {figures}."

    def _new(self) -> nn.Module:
        config = self.config
        return new_encoders(self.names, config.loss, config.model, bool(self.dropout), config.run.seed)

    def _before(self) -> dict[str, Any]:
        return report.result("pretrained", self.scores(for_evaluation(self.accelerator, self._new()), "test"))

    def _together(self, parts: list[Tensor | None], pieces: list[Tensor], rows: int) -> Tensor | None:
        """Return the embeddings of all rows, of which each process has computed some."""
        if parts[0] is None:
            return None
        whole = torch.zeros(rows, parts[0].shape[1], device=self.device)
        for part, piece in zip(parts, pieces, strict=True):
            assert part is not None
            whole[piece] = part[: len(piece)]
        reduced: Tensor = self.accelerator.reduce(whole, "sum")
        return reduced

    def _loss(self, query: Any, key: Any, rows: PairRows, scale: list[Any]) -> float:
        """Return the mean over batches of the rows in their order, without hard negatives."""
        total, count = 0.0, 0
        for numbers in torch.arange(len(rows)).split(self.batch_size):
            ids, labels = (None if v is None else v[numbers].to(self.device) for v in (rows.ids, rows.labels))
            value = float(self.alone(query[numbers], None if key is None else key[numbers], None, ids, labels, *scale))
            if value == value:  # a last batch may have no two rows of one label
                total, count = total + value * len(numbers), count + len(numbers)
        return total / max(count, 1)
