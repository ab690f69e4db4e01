"""The memory of a step, traced on fake tensors: the step runs, but no operation computes or allocates anything."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlkernels.bench.work import Case, LossStep, build, name_of

Parts = dict[str, int]
"""Bytes by what they are."""
Inside = Callable[[str, Mapping[str, Any]], Parts]
"""inside(name of one of our ops, its arguments by name) -> what it allocates while it runs, without its results."""
GRADIENTS = "gradients of the inputs"


@dataclass(eq=False)
class _Buffer:
    """One storage."""

    label: str
    bytes: int


class _Live(TorchDispatchMode):
    """Follows the storages that operations make until they are freed, and remembers those at the peak."""

    def __init__(self, inside: Inside, on_gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside, self.on_gpu = inside, on_gpu
        self.live: dict[int, _Buffer] = {}
        self.now = self.peak = 0
        self.at_peak: list[_Buffer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        namespace, op = func._schema.name.split("::")
        made = _tensors(out)
        if self.on_gpu and op == "log_sigmoid_forward":
            made = made[:1]  # the fake tensors are a CPU's, where it also returns a buffer
        for tensor in made:
            if (key := _key(tensor)) not in given and key not in self.live:
                storage = tensor.untyped_storage()
                size = "x".join(map(str, tensor.shape)) or "scalar"
                self.live[key] = _Buffer(f"{op.strip('_')} {size} {name_of(tensor.dtype)}", storage.nbytes())
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        within = self._within(op, made, args)
        if namespace == "tlkernels":
            names = (argument.name for argument in func._schema.arguments)
            within = self.inside(op, dict(zip(names, args, strict=False)))
        if (most := self.now + sum(within.values())) > self.peak:
            self.peak = most
            self.at_peak = [*self.live.values(), *(_Buffer(label, size) for label, size in within.items())]
        return out

    def _within(self, op: str, made: list[Tensor], args: Any) -> Parts:
        """Return what PyTorch's `mse_loss` and `sum` allocate while they run.

        `sum` copies its argument if the result has another dtype. `mse_loss` keeps the errors, and on a CPU sums those
        of 16 bits in such a copy; on an H200 its peak was twice the errors (recorded in bfloat16).
        """
        if op == "mse_loss":
            numel, size = args[0].numel(), args[0].itemsize
            return {"squared errors": numel * (2 * size if self.on_gpu else size + (4 if size == 2 else 0))}
        if op != "sum" or made[0].dtype == args[0].dtype or (self.on_gpu and args[0].is_floating_point()):
            return {}
        return {f"copy for a sum {name_of(made[0].dtype)}": args[0].numel() * made[0].itemsize}

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key).bytes

    def relabel(self, tensors: tuple[Tensor, ...], label: str) -> None:
        """Change the label of the storages of these tensors."""
        for tensor in tensors:
            if buffer := self.live.get(_key(tensor)):
                buffer.label = label

    def parts(self) -> Parts:
        """Return the bytes at the peak by label."""
        found: Parts = defaultdict(int)
        for buffer in self.at_peak:
            found[buffer.label] += buffer.bytes
        return found


def traced(case: Case, name: str, inside: Inside, on_gpu: bool) -> Parts:
    """Return what one forward and backward of a contestant have allocated at their peak, above the inputs.

    Operations of PyTorch need nothing but their results, except `sum` and `mse_loss`; `inside` tells what our ops need.
    """
    with FakeTensorMode():
        step = build(name, case.work())
        assert isinstance(step, LossStep)
        live = _Live(inside, on_gpu)
        with live:
            step()
        live.relabel(step.grads, GRADIENTS)
    return live.parts()


def input_bytes(case: Case) -> int:
    """Return the bytes of the inputs of a case, and of its other tensors such as targets."""
    with FakeTensorMode():
        work = case.work()
        tensors = _tensors((work.inputs, dict(work.data)))
        return sum(tensor.nbytes for tensor in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
