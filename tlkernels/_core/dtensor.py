"""Kernels for losses on DTensors: each rank computes the loss of its own rows.

`loss.py` imports this module when a DTensor comes, since it imports torch.distributed.tensor. What a loss says about
its tensors is a `Rows`. A reduced loss is the sum of the ranks' sums, over the denominator of all ranks' rows. PyTorch
averages the ranks' means, or refuses uneven shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tlkernels._core.dtypes import wide_losses

if TYPE_CHECKING:
    from tlkernels._core.loss import Rows

Placements = Sequence[Placement]


def refuse(call: Any, rows: Rows, kernels: Callable[[Any], str | None]) -> str | None:
    """Return why `kernels`, the refusal of an implementation, cannot serve the call on DTensors, or None."""
    named = _tensors(call)
    if not all(isinstance(tensor, DTensor) for _, tensor in named):
        return "some of the tensors are DTensors, and some are not"
    (first, leader), *others = named
    if any(tensor.device_mesh != leader.device_mesh for _, tensor in others):
        return "the DTensors are on different meshes"
    if torch._C._are_functorch_transforms_active() or getattr(call, "inplace_grad", False):
        return "does not support DTensors with torch.func transforms or inplace_grad=True"
    axis = rows.axis_of(leader)
    for placement in leader.placements:
        if type(placement) not in (Shard, Replicate):
            return f"{first} is a DTensor placed as {placement}"
        if isinstance(placement, Shard) and placement.dim == axis:
            return f"{first} is a DTensor sharded along dimension {axis}, which is no dimension of rows"
    for name, tensor in others:
        if name in rows.shared and not all(placement.is_replicate() for placement in tensor.placements):
            return f"{name} is a DTensor that is not replicated"
        if name not in rows.shared and axis is None and tensor.shape != leader.shape:
            return f"{name} is a DTensor of another shape than {first}"
    return kernels(_mapped(call, lambda _, tensor: tensor._local_tensor.detach().requires_grad_(tensor.requires_grad)))


def run(call: Any, rows: Rows, kernels: Callable[[Any], Any]) -> Any:
    """Return the result of `kernels`, an implementation that has not refused the call on DTensors."""
    leader = _tensors(call)[0][1]
    mesh, axis = leader.device_mesh, rows.axis_of(leader)
    # A sum over rows is a part of the whole sum on mesh dimensions that shard the rows.
    summed = [Partial() if placement.is_shard() else Replicate() for placement in leader.placements]
    replicated = [Replicate()] * mesh.ndim

    def placements(of: int) -> Any:
        """Return how a tensor with so many dimensions is placed if its rows are those of the leader."""
        if axis is None or of == leader.dim():
            return leader.placements
        return [Shard(p.dim - (p.dim > axis)) if isinstance(p, Shard) else p for p in leader.placements]

    def local(name: str, tensor: DTensor) -> Any:
        if name in rows.shared:
            return _to_local(tensor, summed)
        placed = placements(tensor.dim())
        return _to_local(_placed(tensor, placed), placed)

    given = rows.local(_mapped(call, local))
    shape = [size for k, size in enumerate(leader.shape) if k != axis]
    placed = placements(len(shape))

    def whole(value: Tensor) -> Any:
        return _from_local(value, mesh, placed, shape)

    if call.reduction == "none":
        output = kernels(given)
        return whole(output) if isinstance(output, Tensor) else type(output)(*map(whole, output))
    with wide_losses():
        output = kernels(given._replace(reduction="sum"))
    loss, *statistics = (output,) if isinstance(output, Tensor) else output
    parts = [loss]
    if call.reduction != "sum":
        total = torch.as_tensor(given.denominator(), dtype=loss.dtype, device=loss.device)
        parts.append(total.nan_to_num())  # of no weight; the other ranks may have some
    sums = _from_local(torch.stack(parts), mesh, summed, [len(parts)])
    loss, *totals = _to_local(_placed(sums, replicated), replicated)
    for total in totals:  # the gradient of a mean over nothing is 0
        loss = torch.where(total == 0, torch.nan, loss / torch.where(total == 0, 1, total))
    reduced = _from_local(rows.finished(call, loss), mesh, replicated, [])
    return type(output)(reduced, *map(whole, statistics)) if statistics else reduced


def _tensors(call: Any) -> list[tuple[str, Any]]:
    """Return the tensors of a call with the names of their fields; the first one is the leader."""
    found: list[tuple[str, Any]] = []
    _mapped(call, lambda name, tensor: found.append((name, tensor)))
    return found


def _mapped(call: Any, function: Callable[[str, Any], Any], name: str = "") -> Any:
    """Return the call with function(name of the field, tensor) in place of each tensor."""
    if isinstance(call, Tensor):
        return function(name, call)
    if isinstance(call, tuple) and hasattr(call, "_fields"):
        values = zip(call._fields, call, strict=True)
        return type(call)(*(_mapped(value, function, field) for field, value in values))
    return call


def _placed(tensor: DTensor, placements: Placements) -> Any:
    """Return the tensor with these placements."""
    if list(tensor.placements) == list(placements):
        return tensor
    return tensor.redistribute(placements=placements)


def _from_local(local: Tensor, mesh: Any, placements: Placements, shape: Sequence[int]) -> Any:
    return _FromLocal.apply(local, mesh, placements, shape)  # type: ignore[no-untyped-call]


def _to_local(tensor: DTensor, gradient: Placements) -> Any:
    """Return the local part; the parts' gradients together are a DTensor placed as `gradient`."""
    return _ToLocal.apply(tensor, gradient)  # type: ignore[no-untyped-call]


# DTensor's own functions of these names cut the graph of a second derivative without an error.


class _FromLocal(Function):
    """The DTensor of the local parts. Each part of a sum has the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: Any, placements: Placements, shape: Sequence[int]) -> DTensor:
        ctx.placements = placements
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> Any:
        placed = [Replicate() if placement.is_partial() else placement for placement in ctx.placements]
        return _to_local(_placed(grad, placed), ctx.placements), None, None, None


class _ToLocal(Function):
    """The local part of a DTensor."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, gradient: Placements) -> Tensor:
        ctx.mesh, ctx.placements, ctx.shape, ctx.gradient = (
            tensor.device_mesh,
            tensor.placements,
            tensor.shape,
            gradient,
        )
        return tensor._local_tensor.view_as(tensor._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _placed(_from_local(grad, ctx.mesh, ctx.gradient, ctx.shape), ctx.placements), None
