"""Measures the losses for sentence-transformers against the library's own, and prints tables in markdown.

    python -m bench.hosts.sentence_transformers [--tiny]

The losses alone: forward and backward on embeddings of N pairs of 384 features, float32, interleaved, with emptied
caches. Whole steps: all-MiniLM-L6-v2 with dropout, its optimiser (AdamW) included, 1024 pairs of a docstring and its
function, each cut to 32 tokens, the cached loss in mini-batches of 32. Memory is the highest resident size above that
before the call, each in a process of its own; so is every whole step. `--tiny` tries the script.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs
from torch import Tensor

from tlkernels.bench import busy
from tlkernels.bench.clock import Clock
from tlkernels.bench.measure import interleave, quartiles, speedups
from tlkernels.bench.memory import peak
from tlkernels.bench.work import Step
from tlkernels.integrations import sentence_transformers as ours
from tlkernels.machine import machine, version_of
from tlkernels.train.code_search import build
from tlkernels.train.memory import own_mappings, reset_resident, resident
from tlkernels.train.model import source

SIDES = {"theirs": theirs, "tlkernels": ours}
WIDTH, MINI_BATCH, TOKENS = 384, 32, 32
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


class Case(NamedTuple):
    """A loss on embeddings of some numbers of pairs. `mini_batch`: of the cached losses; 0: the loss is not cached."""

    label: str
    name: str
    rows: tuple[int, ...]
    options: dict[str, Any]
    mini_batch: int = 0


CASES = [
    Case("MultipleNegativesRankingLoss", "MultipleNegativesRankingLoss", (1024, 4096, 8192), {}),
    Case(
        "the same, both directions, `per_direction`", "MultipleNegativesRankingLoss", (1024, 4096, 8192),
        {"directions": ALL[::2], "partition_mode": "per_direction"},
    ),
    Case("the same, all four directions, `joint`", "MultipleNegativesRankingLoss", (4096,), {"directions": ALL}),
    Case(
        "the same, hardness `all_negatives`", "MultipleNegativesRankingLoss", (1024, 4096),
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    ),
    Case(
        "CachedMultipleNegativesRankingLoss, its loss alone", "CachedMultipleNegativesRankingLoss", (1024, 4096), {},
        MINI_BATCH,
    ),
    # What GISTEmbedLoss computes from the embeddings: one mini-batch of all rows.
    Case("GISTEmbedLoss, its loss alone", "CachedGISTEmbedLoss", (256,), {}, 256),
    Case("CachedGISTEmbedLoss, its loss alone", "CachedGISTEmbedLoss", (256,), {}, MINI_BATCH),
]  # fmt: skip


class LossCall(Step):
    """Forward and backward of a loss on embeddings."""

    repeatable = False

    def __init__(self, run: Callable[[], Tensor], leaves: list[Tensor]) -> None:
        self.run, self.leaves, self.value = run, leaves, torch.tensor(0.0)

    def prepare(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        self.value = self.run().detach()


def minilm() -> SentenceTransformer:
    logging: Any = transformers.utils.logging  # untyped
    logging.disable_progress_bar()
    model = SentenceTransformer(source(None), device="cpu")
    model.max_seq_length = TOKENS
    return model


def columns(rows: int, mini_batch: int, seed: int, grad: bool) -> list[list[Tensor]]:
    """Draw embeddings of queries and of documents that resemble them a little, cut into mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    query, noise = torch.randn(2, rows, WIDTH, generator=generator)
    parts = [column.split(mini_batch or rows) for column in (query, 0.15 * query + noise)]
    return [[part.clone().requires_grad_(grad) for part in column] for column in parts]


def call(case: Case, side: str, rows: int, model: Any = None) -> LossCall:
    """Return forward and backward of a case."""
    options = case.options | ({"mini_batch_size": case.mini_batch} if case.mini_batch else {})
    if "GIST" in case.name:
        options["guide"] = model = model or minilm()
    elif case.mini_batch:
        model = [None]  # it looks for a StaticEmbedding in it
    loss = getattr(SIDES[side], case.name)(model, **options)
    reps = columns(rows, case.mini_batch, 0, grad=True)
    leaves = [leaf for column in reps for leaf in column]
    run: Callable[[], Tensor]
    if "GIST" in case.name:
        run = partial(loss.calculate_loss, reps, columns(rows, case.mini_batch, 1, grad=False), with_backward=True)
    elif case.mini_batch:
        run = partial(loss.calculate_loss, reps, with_backward=True)
    else:
        run = partial(whole, loss, reps)
    return LossCall(run, leaves)


def whole(loss: Any, reps: list[list[Tensor]]) -> Tensor:
    value: Tensor = loss.compute_loss_from_embeddings([part for (part,) in reps], None)
    value.backward()
    return value


def child(function: Callable[..., Sequence[float]], *arguments: object) -> Sequence[float]:
    """Return what the function returns in a new process, which has imported everything but computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tlkernels.integrations.sentence_transformers", "tlkernels.train.code_search"])
    queue = context.SimpleQueue()
    process = context.Process(target=_put, args=(queue, function, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__}{arguments} failed")
    found: Sequence[float] = queue.get()
    return found


def _put(queue: Any, function: Callable[..., Sequence[float]], *arguments: object) -> None:
    queue.put(function(*arguments))


def alone(tiny: bool, seconds: float) -> list[float]:
    """Print the table of the losses alone; return which share of the cores others used in each case's rounds."""
    clock, model = Clock(torch.device("cpu"), cold=True), minilm()
    shares: list[float] = []
    rows_of = [(index, rows) for index, case in enumerate(CASES) for rows in ((64,) if tiny else case.rows)]
    print("| loss | N | theirs, ms | tlkernels, ms | speed-up | theirs, MB | tlkernels, MB | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for index, rows in rows_of:
        steps = {side: call(CASES[index], side, rows, model) for side in SIDES}
        with busy.Watch() as watch:
            samples = interleave(steps, clock, seconds, least=5)
        shares.append(watch.share or 0.0)
        gain = speedups(samples, "tlkernels")["theirs"]
        times = [spread([1e3 * each for each in quartiles(samples[side])]) for side in SIDES]
        memory = [f"{child(peak_of, index, rows, side)[0] / 1e6:.0f}" for side in SIDES]
        value, right = (float(steps[side].value) for side in ("tlkernels", "theirs"))
        cells = [CASES[index].label, str(rows), *times, spread(gain), *memory, f"{abs(value - right) / right:.0e}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\nIn brackets the quartiles; the difference is that of the two losses, relative.\n")
    return shares


def spread(found: list[float]) -> str:
    """Return the median and, in brackets, the quartiles."""
    low, middle, high = (f"{each:.3g}" for each in found)
    return f"{middle} ({low}–{high})"


def peak_of(index: int, rows: int, side: str) -> Sequence[float]:
    """Return the peak of a case; a small call before it loads and sets up what only the first one does."""
    peak(call(CASES[index], side, 64))
    return (peak(call(CASES[index], side, rows)),)


def steps(tiny: bool) -> None:
    """Print the table of whole steps, each in a process of its own: theirs, ours, ours, theirs."""
    pairs, train = 96 if tiny else 1024, build(200 if tiny else 1150, 0.1, 0.0)["train"]
    texts = [[pair.query for pair in train][:pairs], [pair.key for pair in train][:pairs]]
    found: dict[str, list[Sequence[float]]] = {side: [] for side in SIDES}
    for side in (*SIDES, *reversed(SIDES)):
        found[side].append(child(step, side, texts))
    print(f"| a step of CachedMultipleNegativesRankingLoss, {pairs} pairs | s | of it the loss, s | peak, MB | loss |")
    print("| --- | --- | --- | --- | --- |")
    for side, runs in found.items():
        total, loss, memory, value = zip(*runs, strict=True)
        cells = [" and ".join(f"{each:.3g}" for each in cell) for cell in (total, loss)]
        print(f"| {side} | {' | '.join(cells)} | {statistics.mean(memory) / 1e6:.0f} | {value[0]:.6f} |", flush=True)
    print()


def step(side: str, texts: list[list[str]]) -> Sequence[float]:
    """Return the seconds of a step and of its loss, its peak memory, and the loss."""
    torch.manual_seed(0)
    model = minilm()
    loss = SIDES[side].CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    spent, calculate = [], loss.calculate_loss

    def timed(*args: Any, **options: Any) -> Tensor:
        start = perf_counter()
        value: Tensor = calculate(*args, **options)
        spent.append(perf_counter() - start)
        return value

    loss.calculate_loss = timed
    model.train()

    def train(rows: int) -> Tensor:
        value: Tensor = loss([model.preprocess(column[:rows]) for column in texts], None)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    train(2 * MINI_BATCH)
    torch.manual_seed(0)
    with own_mappings():
        reset_resident()
        before, start = resident("VmRSS"), perf_counter()
        value = train(len(texts[0]))
        return perf_counter() - start, spent[-1], resident("VmHWM") - before, float(value)


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="64 pairs, to try the script")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the rounds of a case, which are 5 at least")
    options = parser.parse_args()
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # of the new processes, as in tlkernels.bench.memory
    shares = alone(options.tiny, 0.1 if options.tiny else options.seconds)
    steps(options.tiny)
    about = machine()
    packages = {"sentence-transformers": version_of("sentence-transformers")} | about["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("sentence-transformers", "torch", "tlkernels"))
    print(f"{about['processor']}, {about['threads']} threads, {about['isa']}; {versions}, commit {about['commit']};")
    print("`python -m bench.hosts.sentence_transformers`, other processes used at most "
          f"{max(shares):.1%} of the cores while a loss was timed.")  # fmt: skip


if __name__ == "__main__":
    main()
