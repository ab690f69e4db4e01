"""`--compare-loss`: the same steps from the same start with tlkernels' loss and with PyTorch's."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from tlkernels.timing import interleaved, wait
from tlkernels.train import report
from tlkernels.train.batches import micro_batches, step_seed, whole_batch
from tlkernels.train.checkpoint import write_file
from tlkernels.train.errors import RunError, one_line
from tlkernels.train.gradcache import joint_gradient
from tlkernels.train.memory import out_of_memory, peak_bytes
from tlkernels.train.optim import learning_rate, make_optimizer
from tlkernels.train.stopping import stopped
from tlkernels.train.task import GATHERED, OURS, Loss, Task

WORTH = 1.02  # a step that is faster by less is called no gain


class _Run:
    """A training in plain PyTorch with one of the losses."""

    def __init__(self, task: Task, network: nn.Module, loss: Loss) -> None:
        self.task, self.network, self.loss = task, network.to(task.device), loss
        self.optimizer = make_optimizer(network, task.config.optim)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak: int | None = None
        network.train()

    def step(self, number: int) -> None:
        """Do step `number`, counted from 0, of the run's schedule."""
        task, run, optim = self.task, self.task.config.run, self.task.config.optim
        torch.manual_seed(step_seed(run.seed, number))
        rows = task.rows["train"]
        batch = whole_batch(number, task.batch_size, len(rows), run.seed)
        pieces = [task.inputs("train", piece, number) for piece in micro_batches(batch, rows.lengths, run.micro_batch)]
        wait()
        started = time.perf_counter()
        value = self._gradient(pieces, task.divisor(batch, number), step_seed(run.seed, number))
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), optim.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, task.steps, optim.lr, task.config.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(value)

    def _gradient(self, pieces: list[tuple[Any, ...]], divisor: float, seed: int) -> float:
        """Compute the gradient of a step's micro-batches, and return its loss."""
        task, value = self.task, 0.0
        if task.joint:
            return float(joint_gradient(task.accelerator, self.network, pieces, self.loss, task.features, seed))
        for piece in pieces:
            with task.accelerator.autocast():
                loss = self.network(*piece, self.loss) / divisor
            loss.backward()
            value += float(loss.detach())
        return value

    def state_bytes(self) -> int:
        """Return the size of the parameters and of the optimiser's state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.network.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]
        return sum(tensor.nbytes for tensor in tensors)


def compare_losses(task: Task, folder: Path, start: Callable[[], nn.Module]) -> dict[str, Any] | None:
    """Train `run.compare_loss` steps with each of the task's losses; print, draw and return what they cost.

    The steps are done in turns, so that a change of the machine's speed affects all losses alike. The times of the
    first two steps are not counted: the first makes the optimiser's state, and in the second memory is measured. A loss
    that runs out of memory drops out. Return None if the run is asked to stop.

    Raises:
        RunError: tlkernels' loss runs out of memory.
    """
    network, count = start(), task.config.run.compare_loss
    runs = {name: _Run(task, copy.deepcopy(network), loss) for name, loss in task.losses.items()}
    for number in range(count):
        if stopped(task.accelerator):
            return None
        for name, run in list(runs.items()):
            try:
                if number == 1:
                    run.peak = peak_bytes(partial(run.step, number))
                else:
                    run.step(number)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if name == OURS:
                    raise RunError(f"out of memory: give a smaller --run.micro_batch ({one_line(error)})") from error
                del runs[name]
    batches = report.features(task, runs[OURS].network, 0, task.config.run.micro_batch)
    alone = interleaved({name: report.way(task, run.loss, batches) for name, run in runs.items()}, 0.5, least=2)
    result = {name: _measured(run, runs[OURS], alone[name]) for name, run in runs.items()}
    comparison = {"steps": count, "losses": result, "description": task.describe()}
    dropped = [f"{name} ran out of memory." for name in task.losses if name not in runs]
    comparison["text"] = "\n".join([in_words(result), *dropped])
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "compare_loss.png", result)
    write_file(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    print(f"\n{comparison['text']}\n", flush=True)
    return comparison


def _measured(run: _Run, ours: _Run, loss_seconds: float) -> dict[str, Any]:
    """Return the figures of one loss. `speedup` is ours over it: the median over steps, and the quartiles."""
    times = run.seconds[2:]
    ratios = [own / mine for own, mine in zip(times, ours.seconds[2:], strict=True)]
    step = statistics.median(times)
    return {
        "values": run.losses,
        "step_seconds": step,
        "speedup": [statistics.median(ratios), *_quartiles(ratios)],
        "peak_bytes": None if run.peak is None else run.peak + run.state_bytes(),
        "loss_seconds": loss_seconds,
        "loss_share": min(1.0, loss_seconds / step),
        "bound": step / max(step - loss_seconds, 1e-9),
        "difference": max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours.losses, run.losses, strict=True)),
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def in_words(result: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as a table, and plain sentences on what it means."""
    width = max(map(len, result))
    lines = [f"{'the same steps with':<{width}}    s/step   peak memory   the loss's share   a free loss would give"]
    for name, row in result.items():
        memory = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"{name:<{width}} {row['step_seconds']:>9.3f}  {memory:>12}   {row['loss_share']:>16.2%}"
            f"   at most {row['bound']:.3f} ×"
        )
    ours = result[OURS]
    for name, row in result.items():
        if name == OURS:
            continue
        middle, low, high = row["speedup"]
        sentence = f"Against {name}: the step is {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
        if row["peak_bytes"] and ours["peak_bytes"]:
            sentence += f", with {ours['peak_bytes'] / row['peak_bytes']:.2f} of the memory"
        sentence += f"; the losses of the steps differ by at most {row['difference']:.1e} of their value."
        if high < 1:
            sentence += " Here PyTorch's loss is the faster one."
        if row["bound"] < WORTH:
            sentence += (
                f" No loss can gain speed here: one that costs nothing would make the step at most "
                f"{(row['bound'] - 1) * 100:.2g} % faster."
            )
        elif low <= 1 <= high:
            sentence += " The steps' times vary by more than that."
        elif 1 < middle < WORTH:
            sentence += " That is hardly a gain in speed."
        lines.append(sentence)
    others = [name for name in result if name != OURS]
    if len(others) == 2 and others[1] == GATHERED:
        whole, gathered = (result[name] for name in others)
        gain = whole["step_seconds"] - ours["step_seconds"]
        by_hand = (whole["step_seconds"] - gathered["step_seconds"]) / gain if gain > 0 else 0.0
        if by_hand > 0.5:
            lines.append(
                f"{min(by_hand, 1):.0%} of the time gained against {others[0]} comes from leaving out the rows that do "
                f"not count, which `{others[1]}` does as well."
            )
    return "\n".join(lines)


def draw(file: Path, result: dict[str, dict[str, Any]]) -> None:
    """Draw the loss curves on top of each other, and bars of the steps' time and memory."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    curves, times, memory = figure.subplots(1, 3, width_ratios=(1.8, 1.4, 1.2))
    names = list(result)
    for number, (name, row) in enumerate(result.items()):
        steps = range(1, len(row["values"]) + 1)
        curves.plot(steps, row["values"], color=f"C{number}", label=name, linewidth=2 * (len(result) - number))
    curves.set(xlabel="step", ylabel="loss, nats", title="loss of each step")
    curves.legend(fontsize="small")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.3)
    colors = [f"C{number}" for number in range(len(names))]
    trunk = [row["step_seconds"] - row["loss_share"] * row["step_seconds"] for row in result.values()]
    loss = [row["loss_share"] * row["step_seconds"] for row in result.values()]
    times.barh(names, trunk, color=colors, alpha=0.4)
    times.barh(names, loss, left=trunk, color=colors)
    times.set(xlabel="seconds a step (full colour: the loss)", title="time")
    if all(row["peak_bytes"] is not None for row in result.values()):
        memory.barh(names, [row["peak_bytes"] / 1e9 for row in result.values()], color=colors)
        memory.set(xlabel="GB at the peak", title="memory")
        memory.set_yticks([])
    else:
        memory.set_axis_off()
    for axes in (times, memory):
        axes.invert_yaxis()
    new = file.with_name("compare_loss.new.png")
    figure.savefig(new, dpi=120)
    new.replace(file)
