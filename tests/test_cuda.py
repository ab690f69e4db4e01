"""The native implementation on CUDA tensors. Needs a GPU and an extension with CUDA kernels; else all is skipped."""

from pathlib import Path

import pytest
import torch
from test_every_loss import LOSSES, gradients

from tlkernels import testing
from tlkernels._core import native

KERNELS = Path(__file__).parents[1] / "csrc" / "cuda"
HERE = torch.cuda.is_available() and bool(native.build_info().get("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="no GPU, or an extension without CUDA kernels")]

CASES = [
    (name, loss, case) for name, loss in LOSSES.items() if (KERNELS / f"{name}.cu").exists() for case in loss.cases
]
SMALL = 4096  # numbers: the sanitizers take their time


def elements(case):
    return max(x.numel() for x in case.make(0).values() if isinstance(x, torch.Tensor))


def over(which):
    chosen = [pytest.param(loss, case, id=f"{name}-{case.id}") for name, loss, case in CASES if HERE and which(case)]
    return pytest.mark.parametrize(("loss", "case"), chosen)


def on_gpu(arguments):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def check(loss, case):
    def draw(seed):
        arguments = on_gpu(case.make(seed))
        results = []
        for function, given in (
            (lambda **call: loss.function(**call, impl="native"), arguments),
            (loss.pytorch, arguments),
            (loss.pytorch, testing.widened(arguments)),
        ):
            tensors, put = testing.split(given, case.wants_grad)
            value, grads = gradients(lambda *t, put=put, function=function: function(**put(*t)), tensors, seed)
            results.append((value, *grads))
        return zip(("loss", *case.wants_grad), *results, strict=True)

    testing.check_budgets(case.dtype, draw)


@over(lambda case: elements(case) <= SMALL)
def test_small_grid(loss, case):
    check(loss, case)


@over(lambda case: elements(case) > SMALL)
def test_large_grid(loss, case):
    check(loss, case)


def step(loss, case, arguments):
    tensors, put = testing.split(arguments, case.wants_grad)
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    value = loss.function(**put(*inputs), impl="native")
    return value, torch.autograd.grad(value, inputs, torch.ones_like(value))


ONE_EACH = over(lambda case: any(case is loss.cases[0] for loss in LOSSES.values()))


@ONE_EACH
def test_the_host_never_waits(loss, case):
    arguments = on_gpu(case.make(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, case, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ONE_EACH
def test_in_a_cuda_graph(loss, case):
    arguments = on_gpu(case.make(0))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step(loss, case, arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grads = step(loss, case, arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(value, expected[0])
    assert all(map(torch.equal, grads, expected[1]))


@ONE_EACH
def test_same_bits_run_after_run(loss, case):
    arguments = on_gpu(case.make(0))
    first, second = (step(loss, case, arguments) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))
