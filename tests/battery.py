"""The battery that every loss goes through, without pytest: the losses, the call of a case, and checks for a GPU.

A loss joins by a `LOSS` in tests/<loss>_cases.py. The tests and scripts/gpu share this module.
"""

import importlib
import unittest
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

import tlkernels as tlk

_NAMES = [path.stem.removesuffix("_cases") for path in sorted(Path(__file__).parent.glob("*_cases.py"))]
LOSSES = {name: importlib.import_module(f"{name}_cases").LOSS for name in _NAMES if name in tlk.__all__}


def targets(name):
    """Return the targets of this machine for the loss of that name."""
    return harness.targets(loss=LOSSES[name].cuda or name)


class Call:
    """A case with its random numbers; `ours`, `eager` and `right` are functions of the tensors that get a gradient."""

    def __init__(self, loss, case, impl, seed=0):
        self.arguments = case.make(seed)
        if harness.too_large(impl, *self.arguments.values()):
            raise unittest.SkipTest("left out by the size rule of the interpreter")
        self.tensors, put = harness.split(self.arguments, case.wants_grad)
        self.wide_tensors, wide_put = harness.split(harness.widened(self.arguments), case.wants_grad)
        self.ours = lambda *tensors: loss.function(**put(*tensors), impl=impl)
        self.eager = lambda *tensors: loss.pytorch(**put(*tensors))
        self.right = lambda *tensors: loss.pytorch(**wide_put(*tensors))


def leaves(tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def upstream_of(value, seed=0):
    """Return upstream values that are not 1 and that every dtype represents exactly."""
    upstream = 0.5 + torch.rand(value.shape, generator=harness.generator(seed))
    return upstream.to(torch.bfloat16).to(value)


def gradients(function, tensors, seed=0):
    inputs = leaves(tensors)
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs, upstream_of(value, seed))


def draw(loss, case, target, seed):
    """Return a case's results from the target, eager and the oracle, for `harness.check_budgets`."""
    with harness.forced(target) as impl:
        call = Call(loss, case, impl, seed)
        before = [tensor.clone() for tensor in call.tensors]
        value, grads = gradients(call.ours, call.tensors, seed)
    assert all(map(torch.equal, call.tensors, before)), "an input was changed"
    assert value.dtype == case.dtype
    for name, grad, tensor in zip(case.wants_grad, grads, call.tensors, strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape), name
    eager_value, eager_grads = gradients(call.eager, call.tensors, seed)
    right_value, right_grads = gradients(call.right, call.wide_tensors, seed)
    triples = [("loss", value, eager_value, right_value)]
    triples += zip(case.wants_grad, grads, eager_grads, right_grads, strict=True)
    return triples


# Checks for a GPU. TLKERNELS_CHECK must not be set: with it the host waits for the device to read the class indices.


def _step(loss, case, impl):
    """Return a function from tensors to loss and gradients, and its tensors."""
    tensors, put = harness.split(case.make(0), case.wants_grad)

    def run(*tensors):
        value = loss.function(**put(*tensors), impl=impl)
        return value.detach(), *torch.autograd.grad(value.sum(), tensors)

    return run, leaves(tensors)


def check_same_bits(loss, case, impl):
    """Two runs give the same bits."""
    run, tensors = _step(loss, case, impl)
    assert all(map(torch.equal, run(*tensors), run(*tensors))), "two runs differ in their bits"


def check_no_wait(loss, case, impl):
    """The host never waits for the GPU."""
    run, tensors = _step(loss, case, impl)
    run(*tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph(loss, case, impl):
    """Another stream gives the same bits; a CUDA graph is captured with one batch and replayed with another."""
    run, tensors = _step(loss, case, impl)
    expected = run(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results = run(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, expected, results)), "another stream gives other bits"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors)
    others, _ = harness.split(case.make(1), case.wants_grad)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.detach().copy_(other)
    graph.replay()
    torch.testing.assert_close(captured, run(*tensors), rtol=0, atol=0)


CHECKS = {"same bits": check_same_bits, "no wait": check_no_wait, "graph": check_graph}


def check_2_31_logits(loss, impl):
    """With more than 2**31 logits, the last rows, whose offsets do not fit 32 bits, are right."""
    rows, classes = 17000, 131072
    last = slice(-8, None)
    input = torch.randn(rows, classes, dtype=torch.bfloat16).requires_grad_()
    few = input.detach()[last].double().requires_grad_()
    if loss == "cross_entropy":
        target = torch.randint(classes, (rows,))
        value = tlk.cross_entropy(input, target, reduction="none", impl=impl)
        expected = F.cross_entropy(few, target[last], reduction="none")
    else:
        teacher = input.detach().roll(1, 1)
        value = tlk.distillation(input, teacher, reduction="none", impl=impl)
        right = teacher[last].double().softmax(1)
        expected = F.kl_div(few.log_softmax(1), right, reduction="none").sum(1)
    torch.testing.assert_close(value[last].double(), expected, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(value.sum(), input)
    (by_few,) = torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(grad[last].double(), by_few, rtol=2e-2, atol=1e-6)


def check_2_31_similarities(loss, impl):
    """More than 2**31 similarities are right, and take no memory of their own."""
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


LARGE = {
    "cross_entropy": check_2_31_logits,
    "distillation": check_2_31_logits,
    "info_nce": check_2_31_similarities,
}
"""Loss -> a check at a size whose offsets do not fit 32 bits; it takes 20 GB of GPU memory."""
