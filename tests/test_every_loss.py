"""The battery that every loss goes through: it takes part by a `LOSS` in tests/<loss>_cases.py."""

import importlib
from pathlib import Path

import pytest
import torch

from tlkernels import testing

LOSSES = {}
for path in sorted(Path(__file__).parent.glob("*_cases.py")):
    module = importlib.import_module(path.stem)
    if hasattr(module, "LOSS"):
        LOSSES[path.stem.removesuffix("_cases")] = module.LOSS

TARGETS = testing.targets()
IMPLEMENTATIONS = sorted({target.impl for target in TARGETS})


def cases(small=False):
    return [
        pytest.param(loss, case, id=f"{name}-{case.id}")
        for name, loss in LOSSES.items()
        for case in loss.cases
        if case.small or not small
    ]


@pytest.mark.core
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("loss", "case"), cases())
def test_value_and_gradients(loss, case, target):
    budgets = {}
    for seed in range(3):
        arguments = case.make(seed)
        tensors, put = testing.split(arguments, case.wants_grad)
        wide_tensors, wide_put = testing.split(testing.widened(arguments), case.wants_grad)
        with testing.forced(target) as impl:
            value, grads = run(lambda *t: loss.function(**put(*t), impl=impl), tensors, seed)
        assert value.dtype == case.dtype
        for name, grad, tensor in zip(case.wants_grad, grads, tensors, strict=True):
            assert grad.dtype == tensor.dtype, name
        eager = run(lambda *t: loss.pytorch(**put(*t)), tensors, seed)
        right = run(lambda *t: loss.pytorch(**wide_put(*t)), wide_tensors, seed)
        triples = [("loss", value, eager[0], right[0])]
        triples += zip(case.wants_grad, grads, eager[1], right[1], strict=True)
        for name, *values in triples:
            budgets.setdefault(name, testing.Budget(case.dtype)).add(*values)
    for name, budget in budgets.items():
        budget.check(name)


def run(function, tensors, seed, create_graph=False):
    """Return the value and the gradients for an upstream that is not 1."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    upstream = 0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))
    upstream = upstream.to(torch.bfloat16).to(value.dtype)  # the same number in every dtype
    return value.detach(), torch.autograd.grad(value, leaves, upstream, create_graph=create_graph)
