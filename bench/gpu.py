"""Measures the losses on a GPU, the most telling cases first, and writes each figure as a line of JSON.

    python -m bench.gpu FILE [--seconds 200]     measures until the time is over
    python -m bench.gpu FILE --first             the first call of every contestant that compiles; fills the caches
    python -m bench.gpu FILE --once              one native and one Triton call of each of the first cases, for ncu
    --dry                                        tiny sizes on a CPU, to try this script

The floors are measured in the same run: a copy of as many bytes for a loss on logits, and the bare products for linear
losses and losses on pairs. `native` and `triton` are contestants of one run, from which the rows of
tlkernels/_core/choice.py come.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tlkernels as tlk
from bench.cases import BF16, F32
from tlkernels._core import triton
from tlkernels.bench import cost, losses
from tlkernels.bench.clock import AHEAD, Clock
from tlkernels.bench.measure import checked_errors, excess
from tlkernels.bench.memory import peak_on_gpu
from tlkernels.bench.origin import ROOT, describe
from tlkernels.bench.work import Case, Make, Shape, Step, Work, build, name_of

sys.path.append(str(ROOT / "tests"))
import harness

LEAST_ROUNDS, MOST_ROUNDS = 5, 60
SECONDS_OF_ONE = 0.25
DRY = 512  # sizes are divided by it
OURS = ("native", "triton")
COMPILED = (*OURS, "compile")  # native is there for comparison
LINEAR_PEERS = ("liger", "liger large chunks", "quack", "cce", "cce exact")
PAIRS_PEERS = ("inf-cl", "memeff", "siglip-kernel")
PEERS = (*LINEAR_PEERS, *PAIRS_PEERS)
FIRST_CASES = 4  # for --once
PRODUCTS = {"info_nce": 4, "nt_xent": 3, "sup_con": 3, "sigmoid_contrastive": 3}
"""Products of N x N x D that each loss needs: similarities and gradients. InfoNCE, NT-Xent and SupCon compute the
similarities twice, the sigmoid loss once. NT-Xent and SupCon need one product for their gradient, the others two."""


def operations(loss: str, shape: Shape) -> int:
    """Floating-point operations of the products of a forward and a backward; 0 where memory is the limit."""
    if loss == "linear_cross_entropy":
        return 3 * 2 * prod(shape)
    if loss == "linear_selective_log_softmax":
        return 4 * 2 * prod(shape)
    if loss == "linear_distillation":
        rows, features, teacher_features, classes = shape
        return 2 * rows * classes * (3 * features + teacher_features)
    return PRODUCTS.get(loss, 0) * 2 * shape[0] ** 2 * shape[1]


def _case(name: str, shape: Shape, make: Make, bars: dict[str, float], *contestants: str) -> Case:
    peers = tuple(contestant for contestant in contestants if contestant in PEERS)
    return Case(name, shape, BF16, make, bars, ("floor", *OURS, *contestants), peers=peers, device="cuda")


def _ways(*names: str) -> tuple[str, ...]:
    """Return contestants: native, with the rows kept in each of these ways (harness.cross_entropy_strategy)."""
    return tuple(f"native:{name}" for name in names)


def _cases() -> Iterator[Case]:
    """The most telling first: the time may end early."""
    logits = {"floor": 0.9, "compile": 1.4, "liger": 1.0, "quack": 1.0}
    both = {"floor": 0.88, "compile": 3.0}
    peers = ("eager", "compile", "liger", "quack")
    few = _ways("shared", "shared 256", "sweeps", "sweeps 512")
    many = _ways("cluster", "sweeps", "sweeps 512")
    yield _case("cross_entropy", (32768, 32768), losses.cross_entropy, logits, *few, *peers)
    # 17.3 ms where the products at 790 TFLOP/s take 16.3
    linear = {"floor": 16.3 / 17.3, "liger": 1.0, "cce": 1.0}
    yield _case(
        "linear_cross_entropy", (4096, 4096, 128256), losses.linear_cross_entropy, linear, "eager", *LINEAR_PEERS
    )
    yield _case("distillation", (16384, 32000), losses.distillation, both, "eager", "compile")
    yield _case("info_nce", (65536, 1024), losses.info_nce, {"floor": 0.65})
    yield _case("cross_entropy", (16384, 131072), losses.cross_entropy, logits, *many, *peers)
    yield _case(
        "cross_entropy",
        (32768, 4096),
        losses.cross_entropy,
        logits,
        *_ways("registers", "registers 256", "shared"),
        *peers,
    )
    ways = _ways("registers", "shared", "shared 256", "sweeps")
    yield _case("cross_entropy", (32768, 16384), losses.cross_entropy, {"floor": 0.9}, *ways)
    yield _case("cross_entropy", (256, 1000), losses.cross_entropy, {"eager": 1.0}, *peers)
    yield _case("cross_entropy", (8192, 50257), losses.cross_entropy, {"floor": 0.8}, *few)
    yield _case("distillation", (8192, 128256), losses.distillation, both, "eager", "compile")
    shape = (4096, 4096, 4096, 128256)
    yield _case("linear_distillation", shape, losses.linear_distillation, {"floor": 1 / 1.1}, "eager")
    yield _case("info_nce", (16384, 1024), losses.info_nce, {}, "eager", *PAIRS_PEERS)
    # The bar is 0.85 of the bandwidth, for two reads and a write; the floor has a read and a write.
    rows = (8192, 151936)
    yield _case("selective_log_softmax", rows, losses.selective_log_softmax, {"floor": 0.85 / 1.5}, "eager")
    yield _case("topk_distillation", rows, losses.topk_distillation, {"selective": 1 / 1.2}, "selective", "eager")
    layer, masked, peers_of = (8192, 4096, 128256), {"counted": 0.15}, ("floor", *OURS, "all", "counted")
    bars = {"all": 1 / 0.22}
    yield Case(
        "linear_cross_entropy", layer, BF16, losses.masked_linear_cross_entropy, bars, peers_of, masked, device="cuda"
    )
    bars, layer = {"floor": 0.75 / 1.1}, (4096, 4096, 128256)  # four products, and a tenth
    yield _case("linear_selective_log_softmax", layer, losses.linear_selective_log_softmax, bars, "eager")
    for make in (losses.nt_xent, losses.sup_con, losses.sigmoid_contrastive):
        yield _case(make.__name__, (32768, 768), make, {}, *PAIRS_PEERS)
    yield _case("info_nce", (65536, 512), losses.info_nce, {"floor": 0.6})
    yield _case("cross_entropy", (8192, 262144), losses.cross_entropy, logits, *many, *peers)
    yield _case("cross_entropy", (65536, 45), losses.cross_entropy, {}, *_ways("lanes", "warp"), "eager")
    yield _case("distillation", (65536, 45), losses.distillation, {}, "eager")
    yield _case("mse", (8192, 8192), losses.mse, {}, "eager")
    yield _case("info_nce", (64, 128), losses.info_nce, {}, "eager")
    options, contestants = {"divergence": "js"}, ("floor", *OURS, "eager")
    yield Case("distillation", (4096, 128256), F32, losses.distillation, {}, contestants, options, device="cuda")


CASES: tuple[Case, ...] = tuple(_cases())


class Timing(NamedTuple):
    """Quartiles in ms on the GPU, the host's µs until it has launched everything, and the peak above the inputs."""

    ms: list[float]
    host_us: float
    peak_bytes: int
    rounds: int


def timed(step: Step, dry: bool) -> Timing:
    """Time a forward and a backward."""
    clock = Clock(torch.device("cpu" if dry else "cuda"), cold=False)
    for _ in range(2):
        clock.sample(step)
    peak = 0 if dry else peak_on_gpu(step, calls=1)
    once = clock.sample(step)
    ahead = 0.0 if dry else AHEAD * once.host
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS_OF_ONE / max(once.seconds + ahead, 1e-6))))
    samples = [clock.sample(step, ahead=ahead) for _ in range(rounds)]
    quartiles = statistics.quantiles([1e3 * one.seconds for one in samples], n=4, method="inclusive")
    host = statistics.median(1e6 * one.host for one in samples)
    return Timing([float(f"{ms:.4g}") for ms in quartiles], float(f"{host:.4g}"), peak, rounds)


class Bench:
    """Measures cases until the time is over, and writes lines to a file.

    A contestant that has a line in the file is not measured again: the program can be restarted after one has ended the
    process or lost the GPU's context. A second file names the contestant that is running.
    """

    def __init__(self, path: Path, seconds: float, dry: bool, first: bool) -> None:
        """`first`: measure first calls, which are not resumed."""
        self.dry, self.is_first = dry, first
        self.end = time.monotonic() + seconds
        self.running = path.with_suffix(".first" if first else ".running")
        self.done = _done(path)
        self.file = path.open("a", buffering=1)
        if self.running.exists() and not first:
            line = json.loads(self.running.read_text())
            self.done[line["case"], line["who"]] = None
            self.file.write(json.dumps({**line, "failed": "ended the process"}) + "\n")

    def close(self) -> None:
        self.running.unlink(missing_ok=True)
        self.file.close()

    def over(self) -> bool:
        return time.monotonic() > self.end

    def write(self, case: Case, **values: Any) -> None:
        line = {
            "case": case.id,
            "loss": case.loss,
            "shape": case.shape,
            "dtype": name_of(case.dtype),
            "architecture": "cpu" if self.dry else triton.architecture(torch.device("cuda", 0)),
        }
        first = {"first": True} if self.is_first else {}
        self.file.write(json.dumps({**line, **values, **first}) + "\n")

    def contestants(self, case: Case, work: Work) -> list[str]:
        """Return the contestants of a case that are installed and support it."""
        available = {"floor", "eager", *work.peers, *self.served(work)}
        available |= set() if self.dry else {"compile"}  # minutes on two cores, and nothing of ours
        named = ["reference" if self.dry and name == "triton" else name for name in case.contestants]
        ways = "native" in available and not self.dry
        return [name for name in named if name in available or (ways and name.startswith("native:"))]

    def served(self, work: Work) -> list[str]:
        """Return our implementations that serve the call of a case; a dry run takes the reference for Triton."""
        found = []
        for name in ("native", "reference") if self.dry else OURS:
            report = tlk.explain(work.ours, *work.inputs, impl=name)
            if f"served by {name}" in report.splitlines()[0]:
                found.append(name)
        return found

    def measure(self, case: Case) -> None:
        """Time every contestant; then compare our results with float64."""
        work = self.attempt(case, "inputs", case.work)
        if work is None:
            return
        for name in self.contestants(case, work):
            if self.over():
                return
            if (case.id, name) not in self.done:
                self.attempt(case, name, partial(self.time, case, name, work))
        if (case.id, "errors") not in self.done and not self.over():
            self.attempt(case, "errors", partial(self.errors, case, work))

    def time(self, case: Case, name: str, work: Work) -> None:
        loss, _, way = name.partition(":")
        with harness.cross_entropy_strategy(way) if way else nullcontext():
            timing = timed(build(loss, work), self.dry)
        self.done[case.id, name] = timing.ms[1]
        floor = self.done.get((case.id, "floor"))
        share = {"of_floor": floor / timing.ms[1]} if floor else {}
        self.write(case, who=name, **timing._asdict(), **_rate(case, timing), **share, bars=dict(case.bars))

    def errors(self, case: Case, work: Work) -> None:
        found = checked_errors(case, ["eager", *self.served(work), *(name for name in work.peers if name in PEERS)])
        wrong = [f"{name}, {why}" for name, why in excess(case, found).items()]
        self.write(case, who="errors", error=found, **({"wrong": "; ".join(wrong)} if wrong else {}))

    def first(self, case: Case, names: Sequence[str]) -> None:
        """Call these contestants for the first time in this process."""
        work = self.attempt(case, "inputs", case.work)
        for name in self.contestants(case, work) if work else ():
            if name in names and not self.over():
                self.attempt(case, name, partial(self.first_call, case, name, work))

    def first_call(self, case: Case, name: str, work: Work) -> None:
        start = time.perf_counter()
        build(name, work)()
        if not self.dry:
            torch.cuda.synchronize()
        self.write(case, who=name, first_ms=1e3 * (time.perf_counter() - start))

    def attempt(self, case: Case, name: str, function: Callable[[], Any]) -> Any:
        """Return the function's value; where it fails, write why and return None."""
        self.running.write_text(json.dumps({"case": case.id, "who": name}))
        try:
            return function()
        except Exception as error:
            text = traceback.format_exception_only(error)[-1].strip()
            self.write(case, who=name, failed=text[-300:])
            if harness.context_lost(text):
                self.running.unlink()
                os._exit(harness.CONTEXT_LOST)
            return None
        finally:
            self.running.unlink(missing_ok=True)
            if not self.dry:
                torch.cuda.empty_cache()


def _done(path: Path) -> dict[tuple[str, str], float | None]:
    """Return the lines of the file: case and contestant -> ms, or None."""
    found: dict[tuple[str, str], float | None] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if "who" in line and not line.get("first"):
            found[line["case"], line["who"]] = line["ms"][1] if "ms" in line else None
    return found


def _tiny(case: Case) -> Case:
    return replace(case, shape=tuple(max(8, size // DRY) for size in case.shape), device="cpu")


def _rate(case: Case, timing: Timing) -> dict[str, Any]:
    seconds = timing.ms[1] / 1e3
    if count := operations(case.loss, case.shape):
        count = count * case.options.get("counted", 1)  # the share of the rows
        return {"rate": count / seconds / 1e12, "unit": "TFLOP/s"}
    count = cost.nbytes(case.loss, case.shape, case.options, case.dtype.itemsize)
    return {"rate": count / seconds / 1e9, "unit": "GB/s"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.dry or torch.cuda.is_available()):
        print("there is no GPU", file=sys.stderr)
        return 2
    first = arguments.first or arguments.once
    with closing(Bench(arguments.file, arguments.seconds, arguments.dry, first)) as bench:
        what = "first calls, with other work on the machine" if arguments.first else "times, alone on the card"
        bench.file.write(json.dumps({**describe(), "what": what, "dry": arguments.dry}) + "\n")
        for case in CASES[: FIRST_CASES if arguments.once else None]:
            if bench.over():
                break
            case = _tiny(case) if arguments.dry else case
            if first:
                bench.first(case, OURS if arguments.once else COMPILED)
            else:
                bench.measure(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
