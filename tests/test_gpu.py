"""What only a GPU shows: no host synchronisation, CUDA graphs, offsets beyond 2**31, memory."""

import pytest
import torch
import torch.nn.functional as F
from test_every_loss import leaves, one_each, over

import tlkernels as tlk
from tlkernels import testing
from tlkernels._core import triton

ON_GPU = [target.impl for target in testing.targets() if testing.device(target) == "cuda"]
pytestmark = pytest.mark.parametrize("impl", ON_GPU)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Class indices are not looked at, as by default: the host would wait for them."""
    monkeypatch.setattr(triton, "CHECK", False)


def step(loss, put, impl):
    """Loss and gradients, as a function of the tensors that get one."""

    def run(*tensors):
        value = loss.function(**put(*tensors), impl=impl)
        return value.detach(), *torch.autograd.grad(value.sum(), tensors)

    return run


@over(one_each)
def test_the_host_waits_for_nothing(loss, case, impl):
    tensors, put = testing.split(case.make(0), case.wants_grad)
    run, tensors = step(loss, put, impl), leaves(tensors)
    run(*tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@over(one_each)
def test_in_a_cuda_graph(loss, case, impl):
    """Captured with one batch, replayed with another."""
    tensors, put = testing.split(case.make(0), case.wants_grad)
    run, tensors = step(loss, put, impl), leaves(tensors)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run(*tensors)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors)
    others, _ = testing.split(case.make(1), case.wants_grad)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.detach().copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, run(*tensors), rtol=0, atol=0)


def test_more_than_2_31_logits(impl):
    rows, classes = 17000, 131072
    student = torch.randn(rows, classes, dtype=torch.bfloat16).requires_grad_()
    target, last = torch.randint(classes, (rows,)), slice(-8, None)
    few = student.detach()[last].double().requires_grad_()
    for ours, right in (
        (lambda x: tlk.cross_entropy(x, target, reduction="none", impl=impl),
         lambda x: F.cross_entropy(x, target[last], reduction="none")),
        (lambda x: tlk.distillation(x, x.detach().roll(1, 1), reduction="none", impl=impl),
         lambda x: F.kl_div(x.log_softmax(1), x.detach().roll(1, 1).softmax(1), reduction="none").sum(1)),
    ):  # fmt: skip
        value, expected = ours(student), right(few)
        torch.testing.assert_close(value[last].double(), expected, rtol=1e-2, atol=1e-2)
        (grad,), (by_few,) = torch.autograd.grad(value.sum(), student), torch.autograd.grad(expected.sum(), few)
        torch.testing.assert_close(grad[last].double(), by_few, rtol=2e-2, atol=1e-6)


def test_more_than_2_31_similarities_in_the_memory_of_their_operands(impl):
    rows, features = 65536, 64
    query, key = (F.normalize(torch.randn(rows, features), dim=1).bfloat16().requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = tlk.info_nce(query, key, logit_scale=20.0, reduction="none", impl=impl)
    by_query, _ = torch.autograd.grad(value.sum(), (query, key))
    assert torch.cuda.max_memory_allocated() - before < 2 << 30
    few = query.detach()[-8:].double().requires_grad_()
    expected = F.cross_entropy(20 * few @ key.detach().double().T, torch.arange(rows)[-8:], reduction="none")
    torch.testing.assert_close(value[-8:].double(), expected, rtol=1e-2, atol=1e-2)
    (by_few,) = torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(by_query[-8:].double(), by_few, rtol=2e-2, atol=1e-2)
