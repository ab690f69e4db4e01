"""What the code of torch.compile keeps in memory, by a rule about its graphs. Nothing is compiled.

AOTAutograd splits a step into a forward and a backward graph, with tensors that are saved in between. `graph.py` has
the rule for a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from tlkernels.bench.work import Case, LossStep
from tlkernels.estimate.graph import Graph
from tlkernels.estimate.live import Parts


def parts(case: Case, on_gpu: bool) -> Parts:
    """Return the bytes at the peak of a case's eager lines as torch.compile runs them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compiler.reset()  # else the shapes of earlier calls count towards the limit on recompilation
    with FakeTensorMode():
        work = case.work()
        LossStep(torch.compile(work.eager, backend=backend, dynamic=False), work)()
    of_forward, of_backward = graphs
    forward = Graph(of_forward, on_gpu)
    backward = Graph(of_backward, on_gpu, saved=dict(forward.outputs()))
    return max((forward.peak(), backward.peak()), key=lambda found: sum(found.values()))
