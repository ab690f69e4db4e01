"""What is measured of the losses beyond cross entropy: sizes, the eager lines, the floor, and the bars to clear."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tlkernels as tlk
from bench.contestants import OURS, Step
from bench.measure import error_bar

Loss = Callable[..., Tensor]
Shape = tuple[int, ...]
Cast = Callable[[Tensor], Tensor]
F32, BF16 = torch.float32, torch.bfloat16


class Work(NamedTuple):
    """Tensors that get a gradient, who computes a loss of them, and `floor`: work that no way of doing it can avoid."""

    inputs: tuple[Tensor, ...]
    ours: Loss
    """Takes `impl=` too."""
    eager: Loss
    floor: Callable[[], object]
    peers: Mapping[str, Loss] = MappingProxyType({})
    """Other libraries' losses, by name."""
    overwriting: tuple[str, ...] = ()
    """The peers that put the gradients in the place of their inputs."""


Make = Callable[[Shape, Cast], Work]
"""Of a shape, and of what rounds float32 numbers to the dtype of the case (and for the oracle widens them again)."""


@dataclass(frozen=True)
class Case:
    """One forward and backward. `bars`: contestant -> the least its time may be, divided by ours."""

    loss: str
    shape: Shape
    dtype: torch.dtype
    make: Make
    bars: Mapping[str, float] = field(default_factory=dict)
    contestants: tuple[str, ...] = ("eager", "floor")
    seconds: float = 8.0
    quick: bool = False

    @property
    def id(self) -> str:
        return f"{self.loss}-{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}"


class WorkStep(Step):
    """Forward and backward of one contestant's loss; the inputs are leaves without a gradient yet."""

    value: Tensor | None = None

    def __init__(self, loss: Loss, inputs: tuple[Tensor, ...]) -> None:
        self.loss = loss
        self.leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def release(self) -> None:
        self.value = None
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.value = self.loss(*self.leaves)
        self.value.backward()

    def results(self) -> list[Tensor]:
        """The loss and the gradients of one call, in float64."""
        self.prepare()
        self()
        assert self.value is not None
        found = [self.value, *(leaf.grad for leaf in self.leaves if leaf.grad is not None)]
        wide = [tensor.detach().to(torch.float64, copy=True) for tensor in found]
        self.release()
        return wide


class OverwritingStep(WorkStep):
    """Of a loss that destroys its inputs: they are copied anew before each call."""

    repeatable = False

    def __init__(self, loss: Loss, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(loss, tuple(tensor.clone() for tensor in inputs))
        self.inputs = inputs

    def prepare(self) -> None:
        for leaf, tensor in zip(self.leaves, self.inputs, strict=True):
            leaf.detach().copy_(tensor)


class FloorStep(Step):
    def __init__(self, floor: Callable[[], object]) -> None:
        self.floor = floor

    def __call__(self) -> None:
        with torch.no_grad():
            self.floor()


def build(name: str, work: Work) -> Step:
    """Ready to be timed: what has to be compiled is."""
    if name == "floor":
        return FloorStep(work.floor)
    loss = {"eager": work.eager, **work.peers}.get(name)
    if name in OURS:
        loss = partial(work.ours, impl=name)
    if name == "compile":
        torch.compiler.reset()
        loss = torch.compile(work.eager, dynamic=False)
    if loss is None:
        raise ValueError(f"contestant: {name!r} is not one of this case's")
    step = (OverwritingStep if name in work.overwriting else WorkStep)(loss, work.inputs)
    if name == "compile":
        step()
        step.release()
    return step


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).mul_(scale)


_draw = 0


@contextmanager
def drawn(number: int) -> Iterator[None]:
    """Make cases meanwhile of other random numbers; 0 is what they are timed with."""
    global _draw
    before, _draw = _draw, number
    try:
        yield
    finally:
        _draw = before


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed + 1000 * _draw)


def _pairs(rows: int, features: int) -> tuple[Tensor, Tensor]:
    """Unit vectors, each nearer to its partner than to others."""
    one = normal(rows, features)
    return F.normalize(one, dim=-1), F.normalize(one + normal(rows, features, seed=1), dim=-1)


def classes_of(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,), generator=_generator(0))


def linear_cross_entropy(shape: Shape, cast: Cast) -> Work:
    rows, features, classes = shape
    x, w = cast(normal(rows, features)), cast(normal(classes, features, scale=features**-0.5))
    y = classes_of(rows, classes)
    logits = x.new_empty(rows, classes)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def floor() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    def chunked(x: Tensor, w: Tensor) -> Tensor:
        loss: Tensor = F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())
        return loss

    # On CPU it takes most of a minute a call in bfloat16, and no bar asks for it there.
    peers = {"chunked": chunked} if x.is_cuda or x.dtype is F32 else {}
    ours = lambda x, w, impl="auto": tlk.linear_cross_entropy(x, w, y, impl=impl)  # noqa: E731
    return Work((x, w), ours, eager, floor, peers)


def distillation(divergence: str) -> Make:
    def eager(s: Tensor, t: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1)
        if divergence == "forward_kl":
            return 4 * F.kl_div(log_p, log_q.exp(), reduction="batchmean")
        if divergence == "reverse_kl":
            return 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        p, q = log_p.exp(), log_q.exp()
        if divergence == "tv":
            return 4 * 0.5 * (p - q).abs().sum(-1).mean()
        log_m = ((p + q) / 2).log()
        kl = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
        return 4 * 0.5 * (kl + F.kl_div(log_m, log_p, reduction="batchmean", log_target=True))

    def make(shape: Shape, cast: Cast) -> Work:
        student, teacher = cast(normal(*shape, scale=3)), cast(normal(*shape, scale=2, seed=1))
        out = torch.empty_like(student)
        return Work(
            (student,),
            lambda s, impl="auto": tlk.distillation(s, teacher, temperature=2.0, divergence=divergence, impl=impl),
            lambda s: eager(s, teacher),
            lambda: torch.add(student, teacher, out=out),
        )

    return make


def linear_distillation(shape: Shape, cast: Cast) -> Work:
    rows, features, teacher_features, classes = shape
    x, xt = cast(normal(rows, features)), cast(normal(rows, teacher_features, seed=1))
    w = cast(normal(classes, features, scale=features**-0.5))
    wt = cast(normal(classes, teacher_features, scale=teacher_features**-0.5, seed=1))
    logits, teacher = x.new_empty(rows, classes), x.new_empty(rows, classes)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(w)

    def floor() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(xt, wt.T, out=teacher)
        torch.mm(logits, w, out=grad_x)
        torch.mm(logits.T, x, out=grad_w)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        log_p, q = F.log_softmax(F.linear(x, w) / 2, -1), F.softmax(F.linear(xt, wt) / 2, -1)
        return 4 * F.kl_div(log_p, q, reduction="batchmean")

    def ours(x: Tensor, w: Tensor, impl: str = "auto") -> Tensor:
        return tlk.linear_distillation(x, w, xt, wt, temperature=2.0, impl=impl)

    return Work((x, w), ours, eager, floor)


def _four_products(a: Tensor, b: Tensor) -> Callable[[], object]:
    """Similarities twice and both gradients in tiles of 512 x 512: what a loss without an N x N tensor needs."""
    tile = a.new_empty(512, 512)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)

    def floor() -> None:
        for i, j in itertools.product(range(0, len(a), 512), range(0, len(b), 512)):
            rows, columns = a[i : i + 512], b[j : j + 512]
            out = tile[: len(rows), : len(columns)]
            torch.mm(rows, columns.T, out=out)
            torch.mm(rows, columns.T, out=out)
            grad_a[i : i + 512].addmm_(out, columns)
            grad_b[j : j + 512].addmm_(out.T, rows)

    return floor


def info_nce(shape: Shape, cast: Cast) -> Work:
    rows, features = shape
    q, k = map(cast, _pairs(rows, features))
    y = torch.arange(rows)

    def eager(q: Tensor, k: Tensor) -> Tensor:
        logits = 14.3 * q @ k.T
        return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2

    def ours(q: Tensor, k: Tensor, impl: str = "auto") -> Tensor:
        return tlk.info_nce(q, k, logit_scale=14.3, symmetric=True, impl=impl)

    return Work((q, k), ours, eager, _four_products(q, k))


def nt_xent(shape: Shape, cast: Cast) -> Work:
    rows, features = shape  # of both views together
    z1, z2 = map(cast, _pairs(rows // 2, features))
    positive = torch.arange(rows).roll(rows // 2)

    def eager(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=-1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, positive)

    z = torch.cat([z1, z2])
    ours = lambda z1, z2, impl="auto": tlk.nt_xent(z1, z2, temperature=0.1, impl=impl)  # noqa: E731
    return Work((z1, z2), ours, eager, _four_products(z, z))


def sup_con(shape: Shape, cast: Cast) -> Work:
    rows, features = shape
    z = cast(normal(rows, features))
    labels = torch.arange(rows) % (rows // 8)

    def eager(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=-1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        positive = (labels[:, None] == labels).fill_diagonal_(False)
        rows = torch.where(positive, F.log_softmax(logits, -1), 0).sum(-1) / positive.sum(-1)
        return -rows.mean()

    ours = lambda z, impl="auto": tlk.sup_con(z, labels, temperature=0.1, impl=impl)  # noqa: E731
    return Work((z,), ours, eager, _four_products(z, z))


def sigmoid_contrastive(shape: Shape, cast: Cast) -> Work:
    rows, features = shape
    q, k = map(cast, _pairs(rows, features))

    def eager(q: Tensor, k: Tensor) -> Tensor:
        z = 2 * torch.eye(rows, dtype=q.dtype, device=q.device) - 1
        return -F.logsigmoid(z * (10.0 * q @ k.T - 10.0)).sum() / rows

    def ours(q: Tensor, k: Tensor, impl: str = "auto") -> Tensor:
        return tlk.sigmoid_contrastive(q, k, logit_scale=10.0, logit_bias=-10.0, impl=impl)

    return Work((q, k), ours, eager, _four_products(q, k))


def squared(function: Loss, eager: Loss) -> Make:
    def make(shape: Shape, cast: Cast) -> Work:
        x, y = cast(normal(*shape)), cast(normal(*shape, seed=1))
        out = torch.empty_like(x)
        ours = lambda x, impl="auto": function(x, y, impl=impl)  # noqa: E731
        return Work((x,), ours, lambda x: eager(x, y), lambda: torch.add(x, y, out=out))

    return make


LINEAR: tuple[tuple[Shape, float], ...] = (((2048, 384, 30522), 2.3), ((1024, 1024, 128256), 4.2))
DISTILLATION: tuple[tuple[Shape, float, float], ...] = (
    ((8192, 1000), 12, 4),
    ((2048, 32000), 20, 3.5),
    ((512, 128256), 20, 3.5),
)
SMALL: tuple[tuple[str, Shape, Make], ...] = (
    ("distillation", (32, 10), distillation("forward_kl")),
    ("info_nce", (64, 128), info_nce),
    ("mse", (32, 10), squared(tlk.mse, F.mse_loss)),
)


def _cases() -> Iterator[Case]:
    for (shape, chunked), dtype in itertools.product(LINEAR, (F32, BF16)):
        bars = {"eager": 1.0, "floor": 1 / 1.3}
        if dtype is F32:
            bars = {"eager": 1.12, "chunked": chunked, "floor": 1 / 1.15}
        yield Case("linear_cross_entropy", shape, dtype, linear_cross_entropy, bars, ("eager", "floor"), 20.0)
    both = ("eager", "compile", "floor")
    for shape, eager, compiled in DISTILLATION:
        bars = {"eager": eager, "compile": compiled, "floor": 0.5}
        yield Case("distillation", shape, F32, distillation("forward_kl"), bars, both)
        yield Case("distillation", shape, BF16, distillation("forward_kl"), {}, both)
    for divergence in ("reverse_kl", "js", "tv"):
        yield Case(f"distillation[{divergence}]", (2048, 32000), F32, distillation(divergence), {}, both)
    bars = {"floor": 1 / 1.15}
    yield Case("linear_distillation", (1024, 384, 384, 30522), F32, linear_distillation, bars, seconds=15.0)
    for rows, least in ((8192, 1.6), (16384, 2.0)):
        yield Case("info_nce", (rows, 384), F32, info_nce, {"eager": least, "floor": 1 / 1.2}, seconds=20.0)
    for make in (nt_xent, sup_con, sigmoid_contrastive):
        yield Case(make.__name__, (8192, 384), F32, make, seconds=20.0)
    yield Case("mse", (4096, 4096), F32, squared(tlk.mse, F.mse_loss), {}, both)
    yield Case("rmse", (4096, 4096), F32, squared(tlk.rmse, lambda x, y: F.mse_loss(x, y).sqrt()), {}, both)
    for name, shape, small in SMALL:
        yield Case(name, shape, F32, small, {"eager": 1 / 1.6}, ("eager",), quick=True)


CASES: tuple[Case, ...] = tuple(_cases())


ROWS = 1024  # for the error: eager in float64 needs the memory of several N x V or N x N tensors


def errors(case: Case, names: Sequence[str], draws: int) -> dict[str, dict[str, float]]:
    """Relative error, in the 2-norm, of loss and gradients, the worst of all, against the eager lines in float64."""
    shape = (min(ROWS, case.shape[0]), *case.shape[1:])
    found = {name: {"value": 0.0, "gradient": 0.0} for name in names}
    for number in range(draws):
        with drawn(number):
            work = case.make(shape, lambda tensor: tensor.to(case.dtype))
            wide = case.make(shape, lambda tensor: tensor.to(case.dtype).double())
        exact = WorkStep(wide.eager, wide.inputs).results()
        for name, worst in found.items():
            step = build(name, work)
            assert isinstance(step, WorkStep)
            parts = zip(step.results(), exact, strict=True)
            value, *grads = (float((got - right).norm() / right.norm()) for got, right in parts)
            worst["value"], worst["gradient"] = max(worst["value"], value), max(worst["gradient"], *grads)
    return found


def excess(case: Case, error: dict[str, dict[str, float]]) -> str:
    """What of ours is further off than twice eager and one rounding, or nothing."""
    return ", ".join(
        f"{name}, {part}: relative error {ours:.2e}, eager's {error['eager'][part]:.2e}"
        for name in error.keys() - {"eager"}
        for part, ours in error[name].items()
        if ours > error_bar(error["eager"][part], case.dtype)
    )
