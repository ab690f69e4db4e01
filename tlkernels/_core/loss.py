"""What the `ops.py` of every loss shares: definition of its ops, one sweep or two, list of its implementations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tlkernels._core.autograd import (
    PLAIN,
    Args,
    Needs,
    Tensors,
    in_pytorch,
    needs_grad,
    plain,
    refuse_native,
    refuse_triton,
    where_needed,
)
from tlkernels._core.dispatch import Implementation
from tlkernels._core.flops import Formula, count_by
from tlkernels._core.ops import define
from tlkernels._core.triton import INTERPRETED
from tlkernels._core.triton import define as define_triton

Ops = TypeVar("Ops")
Group = TypeVar("Group", bound=NamedTuple)


class Op(NamedTuple):
    """The definition of an op."""

    schema: str
    """`name(arguments) -> results`; the loss's name is put in front of the op's."""
    fake: Callable[..., Any]
    """Returns empty results of the right shapes, dtypes and strides."""
    differentiable: bool = False
    """Whether `differentiable` registers a rule for the op."""


def define_ops(
    kind: Callable[..., Ops],
    loss: str,
    ops: Mapping[str, Op],
    *,
    only_native: Mapping[str, Op] | None = None,
    only_triton: Mapping[str, Op] | None = None,
    flops: Formula | None = None,
) -> tuple[Ops, Ops]:
    """Define the ops of a loss and return those of the extension and those of Triton, each as a `kind`.

    The keys of the mappings are fields of `kind`, a NamedTuple. The extension implements `tlkernels::<loss>_<name>`.
    `tlkernels::<loss>_<name>_triton` calls the function of the field's name in `tlkernels/losses/<loss>/triton.py`.

    `flops` is the number of operations of each of the ops, if they multiply.
    """
    kernels = f"tlkernels.losses.{loss}.triton"
    by_extension = {
        field: define(f"{loss}_{op.schema}", op.fake, op.differentiable)
        for field, op in {**ops, **(only_native or {})}.items()
    }
    by_triton = {
        field: define_triton(
            f"{loss}_{op.schema.replace('(', '_triton(', 1)}", op.fake, kernels, field, op.differentiable
        )
        for field, op in {**ops, **(only_triton or {})}.items()
    }
    if flops is not None:
        for op in (*by_extension.values(), *by_triton.values()):
            count_by(op, flops)
    return kind(**by_extension), kind(**by_triton)


def take(group: type[Group], args: Sequence[Any]) -> tuple[Group, list[Any]]:
    """Return the first of `args` as a `group`, a NamedTuple, and the remaining ones."""
    count = len(group._fields)
    return group(*args[:count]), [*args[count:]]


def gradients_by(backward: Any) -> Callable[[Tensors, Args, Needs], Tensors]:
    """Return the backward of a rule whose op computes backward(*upstreams, *args, needs)."""

    def gradients(upstreams: Tensors, args: Args, needs: Needs) -> Tensors:
        return where_needed(backward(*upstreams, *args, needs), needs)

    return gradients


def in_one_sweep(inputs: Tensors, args: Sequence[Any], reduction: str) -> bool:
    """Return whether a reduced loss of `args` is computed along with the gradients of its `inputs`.

    A float16 gradient waits for the loss scale, which comes with the upstream gradient: without it small values would
    become 0.
    """
    if reduction == "none" or not plain(*args):
        return False
    for tensor in inputs:
        if tensor is not None and tensor.dtype == torch.float16:
            return not needs_grad(inputs)
    return True


class Rows(NamedTuple):
    """Which tensors of a call have rows, for DTensors whose rows are sharded; see `dtensor.py`.

    The first tensor of a call has rows. All others have them too, in the same dimensions, unless they are `shared`.
    """

    axis: int | None
    """The dimension of classes or features, the last if it has fewer; None if every dimension has rows. Tensors that
    have a dimension less than the first one do not have it."""
    shared: tuple[str, ...] = ()
    """The names of the fields of tensors without rows."""
    local: Callable[[Any], Any] = lambda call: call
    """Returns the call on a rank's rows, without what holds for all rows."""
    finished: Callable[[Any, Tensor], Tensor] = lambda call, loss: loss.to(call.dtype)
    """Returns the loss from the reduced value, in the dtype of the computation."""

    def axis_of(self, tensor: Tensor) -> int | None:
        """Return the dimension of classes or features of the first tensor."""
        return None if self.axis is None else min(self.axis % max(tensor.dim(), 1), tensor.dim() - 1)


def _is_dtensor(tensor: Tensor | None) -> bool:
    """Return whether this is a DTensor, without importing its module."""
    return type(tensor) not in PLAIN and any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


def _on_dtensors(rows: Rows | None, tensors: Callable[[Any], Tensors], by: Implementation) -> Implementation:
    """Return the implementation that also serves DTensors whose rows are sharded."""
    if rows is None:
        return by

    def refuse(call: Any) -> str | None:
        reason = by.refuse(call)
        if reason is None or torch.compiler.is_compiling() or not any(map(_is_dtensor, tensors(call))):
            return reason
        from tlkernels._core import dtensor

        return dtensor.refuse(call, rows, by.refuse)

    def run(call: Any) -> Any:
        if not _is_dtensor(tensors(call)[0]):
            return by.run(call)
        from tlkernels._core import dtensor

        return dtensor.run(call, rows, by.run)

    def how(call: Any) -> str:
        if _is_dtensor(tensors(call)[0]):
            return "each rank its own rows"
        return by.how(call) if by.how else ""

    return by._replace(refuse=refuse, run=run, how=how)


def implementations(
    *,
    native: Callable[[Any], Any],
    triton: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    served: tuple[str, ...],
    tensors: Callable[[Any], Tensors],
    refuse: Callable[[Any], str | None],
    refuse_reference: Callable[[Any], str | None] = lambda call: None,
    strategy: Callable[[Any], str] | None = None,
    native_strategy: Callable[[Any], str] | None = None,
    rows: Rows | None = None,
) -> tuple[Implementation, ...]:
    """Return the implementations of a loss, in the order in which `auto` tries them.

    Args:
        native: computes a call with the extension's ops.
        triton: computes it with Triton's.
        reference: computes it in plain PyTorch.
        served: the types of devices that the extension has kernels for.
        tensors: returns the tensors of a call that the kernels read.
        refuse: returns why neither kernel can serve a call, or None.
        refuse_reference: returns why the reference cannot, or None.
        strategy: says in which way Triton serves a call.
        native_strategy: says in which way the extension does.
        rows: which tensors have rows; without it kernels do not serve DTensors.
    """
    kernels = (
        Implementation(
            "native",
            lambda call: refuse_native(*tensors(call), served=served) or refuse(call),
            native,
            how=native_strategy,
        ),
        Implementation(
            "triton",
            lambda call: refuse_triton(*tensors(call)) or refuse(call),
            triton,
            by_name_only=INTERPRETED,
            how=strategy,
        ),
    )
    return (
        *(_on_dtensors(rows, tensors, each) for each in kernels),
        Implementation("reference", refuse_reference, in_pytorch(reference)),
    )
