"""Collectives of a torch.distributed process group that are differentiable to any order.

Let W ranks hold equal shares of a batch, and rank r the loss L_r of its own rows against the keys of all ranks, where
the loss of the whole batch is L = sum_r L_r / W. With k_r the keys that rank r computed from the parameters w,

    dL/dw = 1/W sum_s dL_s/dw = 1/W sum_s (dL_s/dw directly + sum_r dL_s/dk_r dk_r/dw)
          = 1/W sum_r (dL_r/dw directly + (sum_s dL_s/dk_r) dk_r/dw).

The backward of `gather` gives rank r the inner sum over s; data parallelism takes the outer mean of the gradients of
parameters. Without the inner sum, rank r would miss the effect of its keys on the losses of the other ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class SavedGroup(NamedTuple):
    """The process group of a pickled module, in a process that loads the module before it creates the group."""

    ranks: list[int] | None
    """Global ranks in the group's order; None for the default group, whatever its size."""
    name: str

    def find(self, argument: str = "group") -> Any:
        """Return this process's group of these ranks; of several, the one with this name if there is one.

        Raises:
            ValueError: this process has no such group.
        """
        if dist.is_available() and dist.is_initialized():
            if self.ranks is None:
                return dist.group.WORLD
            groups = [g for g in dist.distributed_c10d._world.pg_map if dist.get_process_group_ranks(g) == self.ranks]
            # All ranks create their groups in the same order, so all find the same one.
            groups.sort(key=lambda group: group.group_name != self.name)
            if groups:
                return groups[0]
            why = "this process has no such group"
        else:
            why = "torch.distributed is not initialized"
        which = "the default group" if self.ranks is None else f"a group of ranks {self.ranks}"
        raise ValueError(
            f"{argument}: expected {which}, as when the module was pickled, but {why}; or set `{argument}`"
        )


def check_group(group: Any, argument: str = "group") -> Any:
    """Return `group`, or for a `SavedGroup` the process group that it names.

    Raises:
        TypeError, ValueError: it is neither None nor a process group that includes this process.
    """
    if isinstance(group, SavedGroup):
        group = group.find(argument)
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{argument}: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{argument}: expected a process group that includes this process")
    return group


def check_equal_shares(group: Any, **tensors: Tensor | None) -> None:
    """Raise ValueError on every rank unless each tensor has the same shape on all of them."""
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    shapes = [
        0 if tensor is None else size
        for tensor in tensors.values()
        for size in (tensor.shape if tensor is not None else (0,))
    ]
    mine = torch.tensor(shapes, device=device)
    count = torch.tensor([len(shapes)], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    if len({int(each) for each in counts}) == 1:
        everyone = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(everyone, mine, group=group)
        if all(torch.equal(each, mine) for each in everyone):
            return
    own = {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}
    raise ValueError(f"group: expected the same shapes on every rank, got {own} on this one")


def gather(tensor: Tensor, group: Any) -> Tensor:
    """Return the tensors of all ranks, concatenated along the first axis."""
    gathered: Tensor = _Gather.apply(tensor, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _ReduceScatter.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(Function):
    """The sum over ranks of this rank's part of `gathered`; the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = gathered.to(torch.promote_types(gathered.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=group)
        share = total.shape[0] // dist.get_world_size(group)
        return total.narrow(0, dist.get_rank(group) * share, share).to(gathered.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return gather(grad, ctx.group), None


def exchange(rows: Tensor, group: Any) -> Tensor:
    """Transpose over ranks: each rank passes rows of a bool matrix and gets as many of its columns, as rows."""
    ranks = dist.get_world_size(group)
    parts = rows.to(torch.uint8).unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()  # each rank's columns
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.flatten(0, 1).T.bool()
