"""Who is measured: our implementations, eager PyTorch, torch.compile, and the copy that is the floor."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Data

OURS = ("auto", "native", "triton", "reference")
NAMES = (*OURS, "eager", "compile", "copy")

Loss = Callable[[Tensor, Tensor], Tensor]


class Step:
    """One forward and backward per call; `prepare` before it and `release` after it are not timed."""

    repeatable = True  # many calls may stand between `prepare` and `release`

    def prepare(self) -> None: ...

    def release(self) -> None: ...

    def __call__(self) -> None:
        raise NotImplementedError


class LossStep(Step):
    """The logits are a leaf without a gradient yet."""

    value: Tensor | None = None
    gradient: Tensor | None = None

    def __init__(self, loss: Loss, data: Data) -> None:
        self.loss, self.target, self.upstream = loss, data.target, data.upstream
        self.leaf = data.logits.detach().requires_grad_()

    def release(self) -> None:
        self.value = self.gradient = self.leaf.grad = None

    def __call__(self) -> None:
        self.leaf.grad = None  # else the second call of a sample would add to the first one's
        self.value = self.loss(self.leaf, self.target)
        torch.autograd.backward(self.value, self.upstream)
        self.gradient = self.leaf.grad


class InplaceStep(LossStep):
    """The logits come out of another operation, as in a model; what is measured ends at their gradient."""

    repeatable = False
    logits: Tensor | None = None

    def prepare(self) -> None:
        self.logits = self.leaf.clone()

    def release(self) -> None:
        self.value = self.gradient = self.logits = None

    def __call__(self) -> None:
        assert self.logits is not None
        self.value = self.loss(self.logits, self.target)
        (self.gradient,) = torch.autograd.grad(self.value, self.logits, self.upstream)


class CopyStep(Step):
    """The logits into a buffer that is there already: one read, one write, and no page of it new."""

    def __init__(self, data: Data) -> None:
        self.source, self.destination = data.logits, torch.empty_like(data.logits)

    def __call__(self) -> None:
        self.destination.copy_(self.source)


def loss_of(name: str, case: Case) -> Loss:
    options = dict(case.options)

    def eager(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, **options)

    if name == "eager":
        return eager
    if name == "compile":
        torch.compiler.reset()  # else the shapes of earlier cases count towards the limit on recompilation
        return torch.compile(eager, dynamic=False)

    import tlkernels as tlk

    options |= {"impl": name} if name != "auto" else {}
    options |= {"inplace_grad": True} if case.inplace else {}
    return lambda logits, target: tlk.cross_entropy(logits, target, **options)


def build(name: str, case: Case, data: Data) -> Step:
    """Ready to be timed: what has to be compiled is."""
    if name not in NAMES:
        raise ValueError(f"contestant: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "copy":
        return CopyStep(data)
    step = (InplaceStep if case.inplace else LossStep)(loss_of(name, case), data)
    if name == "compile":
        step.prepare()
        step()
        step.release()
    return step
