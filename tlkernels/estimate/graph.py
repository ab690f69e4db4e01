"""Which results of a graph inductor stores, and how many bytes of them are live at once.

Stored are the results of reductions, of copies such as `cat`, and of calls of a library such as `mm`; the operands of
these calls; and the graph's outputs. All others are fused into the loops that use them. A loop writes over an input of
the same bytes that nothing reads later.

On a CPU, what has an exponential or a logarithm in it is not computed in two loops, one after the other. If both go
row by row, they are fused, and a row of it is kept; if one is a sum over all rows, the whole is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from tlkernels.bench.work import name_of
from tlkernels.estimate.live import GRADIENTS, Parts

_VIEWS = ("view", "permute", "expand", "squeeze", "unsqueeze", "slice", "select", "alias", "detach", "t", "getitem")
_REDUCTIONS = ("sum", "amax", "mean", "argmax", "any", "all")
_CALLS = ("mm", "addmm", "bmm", "topk", "sort")
_COPIES = ("cat", "scatter", "scatter_add", "index_put", "as_strided_scatter")
_HEAVY = ("exp", "log", "log1p", "sigmoid", "tanh")


@dataclass(eq=False)
class Buffer:
    """A stored tensor."""

    label: str
    bytes: int
    last: int = -1
    """Where the last node that reads it is."""


class Graph:
    """The stored tensors of a graph, and where they are made and read."""

    def __init__(self, graph: GraphModule, on_gpu: bool, saved: Mapping[str, Buffer] | None = None) -> None:
        """Apply the rule to a forward graph, or to a backward graph: `saved` are the forward's results by name."""
        self.nodes = list(graph.graph.nodes)
        self.on_gpu, self.backward = on_gpu, saved is not None
        self.buffers: dict[Node, Buffer] = {}
        """The stored nodes."""
        self.in_rows: set[Node] = set()
        """Nodes of which a loop keeps a row."""
        self.ancestors: dict[Node, set[Node]] = {}
        for node in self.nodes:
            self.ancestors[node] = {*_inputs(node)}.union(*(self.ancestors[one] for one in _inputs(node)))
            if node.op == "placeholder" and (buffer := (saved or {}).get(node.name)):
                self.buffers[node] = Buffer(buffer.label, buffer.bytes)
        self._store()
        for place, node in enumerate(self.nodes):
            if node in self.buffers or node.op == "output":
                for buffer in self._read(node):
                    buffer.last = len(self.nodes) if node.op == "output" else place

    def _store(self) -> None:
        """Find out which nodes are stored."""
        users = [node for node in self.nodes if _op(node) in (*_CALLS, "output")]
        needed = {_base(argument) for user in users for argument in _inputs(user)}
        for node in self.nodes:
            stored = node.op == "call_function" and node in needed
            if (stored or _op(node) in (*_REDUCTIONS, *_CALLS, *_COPIES)) and not _fills_a_constant(node):
                self.buffers[node] = Buffer(_label(node), _bytes(node))
        for node in reversed(self.nodes):
            if node.op == "call_function" and node not in self.buffers and self._reused(node):
                if any(_numbers(loop) == 1 for loop in self._loops(node)):
                    self.buffers[node] = Buffer(_label(node), _bytes(node))
                else:
                    self.in_rows.add(node)

    def _reused(self, node: Node) -> bool:
        """Return whether two loops, one after the other, would compute this node, which is slow."""
        if self.on_gpu or len(node.users) < 2 or not any(_op(one) in _HEAVY for one in self._fused(node)):
            return False
        loops = self._loops(node)
        return any(loop in self.ancestors[other] for loop in loops for other in loops)

    def _loops(self, node: Node) -> set[Node]:
        """Return the stored nodes whose loops compute this node."""
        found: set[Node] = set()
        for user in node.users:
            found |= {user} if user in self.buffers or user.op == "output" else self._loops(user)
        return found

    def _fused(self, node: Node) -> list[Node]:
        """Return the nodes that are computed in the loop of this one, which is the first."""
        found = [node]
        for one in found:
            inner = (argument for argument in _inputs(one) if argument.op == "call_function")
            found += [argument for argument in inner if argument not in self.buffers and argument not in found]
        return found

    def _read(self, node: Node) -> list[Buffer]:
        """Return the buffers that the loop of a node reads."""
        found = (self.buffers[one] for inner in self._fused(node) for one in _inputs(inner) if one in self.buffers)
        return list(dict.fromkeys(found))

    def outputs(self) -> Iterator[tuple[str, Buffer]]:
        """Yield the names and buffers of the results that are not inputs or views of them."""
        for node in _inputs(self.nodes[-1]):
            if (base := _base(node)) in self.buffers:
                yield node.name, self.buffers[base]

    def peak(self) -> Parts:
        """Return the bytes at the peak by label."""
        live = [buffer for node, buffer in self.buffers.items() if node.op == "placeholder"]
        gradients = {buffer for _, buffer in self.outputs()} if self.backward else set()
        most: list[Buffer] = []
        for place, node in enumerate(self.nodes):
            if node.op != "call_function" or node not in self.buffers:
                continue
            made = self.buffers[node]
            dying = [buffer for buffer in self._read(node) if buffer.last == place and buffer in live]
            over = self._overwritten(node, dying)
            live = [buffer for buffer in live if buffer is not over]
            live.append(made)
            now = live + self._within(node)
            if sum(buffer.bytes for buffer in now) > sum(buffer.bytes for buffer in most):
                most = now
            live = [buffer for buffer in live if buffer.last > place]
        found: Parts = defaultdict(int)
        for buffer in most:
            found[GRADIENTS if buffer in gradients else buffer.label] += buffer.bytes
        return dict(found)

    def _overwritten(self, node: Node, dying: list[Buffer]) -> Buffer | None:
        """Return which of the buffers that nothing reads after this node it is written over."""
        if _op(node) in (*_CALLS, *_COPIES, *_REDUCTIONS):
            return None
        if any(one in self.in_rows and _bytes(one) == _bytes(node) for one in self._fused(node)):
            return None  # inductor plans to write over that one, and then does not store it
        transposed = {self.buffers.get(_base(one)) for one in self._fused(node) if _op(one) in ("permute", "t")}
        mutated = {buffer for one, buffer in self.buffers.items() if _op(one) in _COPIES}
        same = (one for one in dying if one.bytes == _bytes(node) and one not in transposed | mutated)
        return next(same, None)

    def _within(self, node: Node) -> list[Buffer]:
        """Return what a node needs while it runs: PyTorch's scatter_reduce sums 16-bit numbers in float32."""
        if self.on_gpu or _op(node) != "scatter_add" or _tensors(node)[0].itemsize != 2:
            return []
        return [Buffer("sums of scatter_reduce in float32", 4 * _numbers(node))]


def _op(node: Node) -> str:
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "_schema", None)
    return name.name.split("::")[1].strip("_") if name is not None else str(getattr(node.target, "__name__", ""))


def _fills_a_constant(node: Node) -> bool:
    """Return whether a scatter writes one value into a constant: inductor makes it a comparison with the index."""
    return _op(node) == "scatter" and _op(_inputs(node)[0]) == "full" and not isinstance(node.args[-1], Node)


def _inputs(node: Node) -> list[Node]:
    return list(node.all_input_nodes)


def _base(node: Node) -> Node:
    """Return the node of which this one is a view."""
    while _op(node) in _VIEWS:
        node = _inputs(node)[0]
    return node


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, Tensor)]


def _numbers(node: Node) -> int:
    return sum(tensor.numel() for tensor in _tensors(node))


def _bytes(node: Node) -> int:
    return sum(tensor.nbytes for tensor in _tensors(node))


def _label(node: Node) -> str:
    tensor = _tensors(node)[0]
    op = _op(node) if _op(node) in (*_CALLS, *_COPIES, *_REDUCTIONS) else "fused loop"
    return f"{op} {'x'.join(map(str, tensor.shape)) or 'scalar'} {name_of(tensor.dtype)}"
