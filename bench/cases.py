"""What is measured: shapes, options, the bytes a call has to move, and the bars that it has to clear."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEMORY_SLACK = 4 << 20  # the resident size also moves with thread stacks and huge-page rounding


class Data(NamedTuple):
    logits: Tensor
    target: Tensor
    upstream: Tensor  # the gradient that comes from above, of the shape of the loss


@dataclass(frozen=True)
class Case:
    """One forward and backward. `bars`: contestant -> the least its time may be, divided by ours."""

    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bars: Mapping[str, float] = field(default_factory=dict)
    contestants: tuple[str, ...] = ("eager", "copy")
    options: Mapping[str, Any] = field(default_factory=dict)
    probabilities: bool = False
    seconds: float = 8.0  # how long the rounds may take, once there are enough of them
    quick: bool = False  # part of the short run

    @property
    def id(self) -> str:
        parts = [
            "x".join(map(str, self.shape)),
            str(self.dtype).removeprefix("torch."),
            *map(str, self.options.values()),
        ]
        parts += ["probabilities"] * self.probabilities
        return "-".join(parts if self.group == "table" else [self.group, *parts])

    @property
    def inplace(self) -> bool:
        return self.group == "inplace"

    @property
    def rows(self) -> int:
        return prod(self.shape) // self.shape[1]

    @property
    def gradient_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Read and written at the least: logits and target once in, gradient and row losses once out.

        The roof is the memory: some ten operations stand against the 4 to 16 bytes of an element.
        """
        target = self.gradient_bytes if self.probabilities else 8 * self.rows
        return 2 * self.gradient_bytes + target + self.dtype.itemsize * self.rows

    @property
    def memory_bar(self) -> int:
        """Peak bytes above the inputs: one gradient (none in place), and for each row its loss and its log-sum."""
        return (0 if self.inplace else self.gradient_bytes) + 16 * self.rows + MEMORY_SLACK

    def data(self) -> Data:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.shape, generator=generator).mul_(3).to(self.dtype)
        positions = (self.shape[0], *self.shape[2:])
        if self.probabilities:
            target = torch.randn(self.shape, generator=generator).softmax(1).to(self.dtype)
        else:
            target = torch.randint(self.shape[1], positions, generator=generator)
        upstream = torch.ones(positions if self.options.get("reduction") == "none" else (), dtype=self.dtype)
        return Data(logits, target, upstream)


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# So many times as fast as eager and torch.compile, and at most so many times a copy's time.
ROWS: tuple[tuple[tuple[int, ...], dict[str, float]], ...] = (
    ((8192, 1000), {"eager": 4.0, "compile": 4.0, "copy": 1 / 1.4}),
    ((2048, 32000), {"eager": 9.0, "compile": 5.0, "copy": 1 / 2.0}),
    ((512, 256000), {"eager": 16.0, "compile": 5.0, "copy": 1 / 1.7}),
    ((65536, 45), {"eager": 3.5, "compile": 1.3}),
    ((8, 21, 512, 512), {"eager": 4.0, "compile": 2.0}),
    ((32, 10), {"eager": 1 / 1.6}),
)


def _table() -> Iterator[Case]:
    for dtype, (shape, bars) in itertools.product((F32, BF16), ROWS):
        # In bf16 the bar is eager in bf16; the other contestants are there to be seen.
        own = bars if dtype is F32 else {"eager": bars["eager"]}
        quick = dtype is F32 and prod(shape) < 16 << 20
        yield Case("table", shape, dtype, own, ("eager", "compile", "copy"), quick=quick)


def _inplace() -> Iterator[Case]:
    for (shape, bars), dtype in itertools.product(ROWS[:3], (F32, BF16)):
        yield Case("inplace", shape, dtype, {"eager": bars["eager"]}, quick=shape == (8192, 1000))


def _grid() -> Iterator[Case]:
    """`auto` is nowhere slower than eager by more than 5 %."""
    shapes = ((32, 10), (8192, 2), (2048, 45), (1024, 1000), (256, 4099), (32, 50257))
    axes = itertools.product(shapes, (F32, BF16, F16, F64), ("mean", "sum", "none"), (0.0, 0.1), (False, True))
    for number, (shape, dtype, reduction, smoothing, probabilities) in enumerate(axes):
        yield Case(
            "grid",
            shape,
            dtype,
            bars={"eager": 1 / 1.05},
            contestants=("eager",),
            options={"reduction": reduction, "label_smoothing": smoothing},
            probabilities=probabilities,
            seconds=0.3,
            quick=number % 13 == 0,
        )


CASES: tuple[Case, ...] = (*_table(), *_inplace(), *_grid())
