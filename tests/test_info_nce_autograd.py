"""InfoNCE's derivatives: single ones, the scale's, second ones, torch.func, autocast."""

import harness
import helpers
import pytest
import torch
from info_nce_cases import CASES, pairs, pytorch

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("info_nce")


def test_autocast_gives_float32(impl):
    query, key = (t.bfloat16() for t in pairs(8, 4))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        loss = tlk.info_nce(query, key.float(), temperature=0.1, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), pytorch(query.double(), key.double(), temperature=0.1), rtol=1e-6, atol=0)


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    query, key = (t.half() for t in pairs(512, 16))
    upstream = torch.tensor(2.0**15).half()
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tlk.info_nce(leaf, key, impl=impl), leaf, upstream)
    wide = query.double().requires_grad_()
    (right,) = torch.autograd.grad(pytorch(wide, key.double()), wide, upstream.double())
    torch.testing.assert_close(grad.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wants", ["query", "key", "negatives", "logit_scale"])
def test_only_one_gradient(impl, wants):
    tensors = dict(zip(("query", "key"), pairs(6, 4), strict=True), negatives=torch.randn(3, 4),
                   logit_scale=torch.tensor(3.0))  # fmt: skip
    tensors[wants].requires_grad_()
    tlk.info_nce(**tensors, impl=impl).backward()
    right = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    pytorch(**right).backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name != wants)
    torch.testing.assert_close(tensors[wants].grad.double(), right[wants].grad, rtol=1e-5, atol=1e-6)


SCALED = [case for case in CASES if "-symmetric=" in case.id and case.dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", SCALED, ids=lambda case: case.id)
def test_gradient_of_the_scale(impl, case):
    """Many draws: for a single number, eager may be lucky in a few."""
    budget = harness.Budget(case.dtype)
    for seed in range(12):
        arguments = case.make(seed)

        def gradient(loss, arguments=arguments):
            scale = torch.tensor(16.0, dtype=arguments["query"].dtype, requires_grad=True)
            value = loss(**{**arguments, "temperature": None, "logit_scale": scale})
            return torch.autograd.grad(value, scale)[0]

        ours = gradient(lambda **kwargs: tlk.info_nce(**kwargs, impl=impl))
        budget.add(ours, gradient(pytorch), gradient(pytorch, harness.widened(arguments)))
    budget.check(case.id)


@pytest.mark.usefixtures("needs_native")
def test_transforms_take_the_reference():
    query, key = (t.double() for t in pairs(4, 3))
    with pytest.raises(NotImplementedError, match=r"native: does not support torch\.func transforms"):
        torch.func.grad(lambda q: tlk.info_nce(q, key, impl="native"))(query)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        tlk.info_nce(torch.autograd.forward_ad.make_dual(query, query), key, impl="native")
    assert "served by native" in tlk.explain(tlk.info_nce, query, key)
    right = torch.func.hessian(lambda q: pytorch(q, key, symmetric=True))(query)
    torch.testing.assert_close(torch.func.hessian(lambda q: tlk.info_nce(q, key, symmetric=True))(query), right)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(impl, reduction):
    """In others create_graph=True silently gives a part (Liger, CCE, QuACK, flash-attn)."""
    tensors = [t.double() for t in pairs(5, 3)] + [torch.tensor(3.0).double()]
    results = []
    for loss in (lambda *t, **o: tlk.info_nce(*t, impl=impl, **o), pytorch):
        q, k, s = (t.clone().requires_grad_() for t in tensors)
        value = loss(q, k, logit_scale=s, symmetric=True, normalize=True, reduction=reduction)
        grads = torch.autograd.grad(value.square().sum(), (q, k, s), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, s)))
    torch.testing.assert_close(*results)
