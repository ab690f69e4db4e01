"""The peak of memory in each phase of a step, in a step of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tlkernels.profiling import phases
from tlkernels.profiling.calls import Call
from tlkernels.profiling.watch import Listener
from tlkernels.train.memory import RESET, own_mappings, resident


class Peaks(Listener):
    """Bytes in use: on a GPU those of its tensors, otherwise the resident memory of the process (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_phase: dict[str, int] = {}
        self.at_loss: int | None = None
        """Bytes in use when a loss is first called."""
        self._phase = phases.DATA
        self._open: list[str] = []
        self._border_set = False

    @property
    def measurable(self) -> bool:
        """Whether this machine tells."""
        return self.device.type == "cuda" or RESET.exists()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure a step."""
        if not self.measurable:
            yield
            return
        with nullcontext() if self.device.type == "cuda" else own_mappings():
            self._reset()
            yield
            self._border(phases.OTHER)

    def enter(self, phase: str) -> None:
        """A phase begins."""
        if phase in (phases.FORWARD, phases.NO_GRAD):
            self._border_set = False
        self._open.append(phase)
        self._border(phases.HEAD_BACKWARD if phase == phases.ENGINE and self._border_set else self._now())

    def leave(self, phase: str) -> None:
        """It ends."""
        if self._open:
            self._open.pop()
        after = phases.HEAD if phase in (phases.FORWARD, phases.HEAD) else phases.OTHER
        self._border(self._now() if self._open else after)

    def _now(self) -> str:
        return phases.BACKWARD_ALL if self._open[-1] == phases.ENGINE else self._open[-1]

    def head(self, input: Tensor) -> None:
        """The trunk's backward begins when the gradient of the head's input is there."""
        self._split_at(input)

    def loss(self, call: Call) -> None:
        """Without a head, the loss's input is what the trunk has computed."""
        if self.measurable and self.at_loss is None:
            self.at_loss = self.now()
        inputs = [leaf for leaf in tree_leaves(call.arguments) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if inputs and not self._border_set and not call.has_head:
            self._split_at(inputs[0])

    def _split_at(self, input: Tensor) -> None:
        if not input.requires_grad:
            return
        self._border_set = True

        def begin_trunk(_: Any) -> None:
            if self._open and self._open[-1] == phases.ENGINE:
                self._border(phases.BACKWARD)

        input.register_hook(begin_trunk)

    def _border(self, phase: str) -> None:
        if not self.measurable:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM")
        self.by_phase[self._phase] = max(peak, self.by_phase.get(self._phase, 0))
        self._phase = phase
        self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            RESET.write_text("5", encoding="ascii")

    def now(self) -> int:
        """Return the bytes in use."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident("VmRSS")


def free_bytes(device: torch.device) -> int:
    """Return how many bytes a new tensor may have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
