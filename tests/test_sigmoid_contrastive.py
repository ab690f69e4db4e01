"""The sigmoid contrastive loss: edge cases, double backward, errors, the module."""

import helpers
import pytest
import torch
from sigmoid_contrastive_cases import pytorch

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture()


def test_no_rows(impl):
    x = torch.randn(0, 4, requires_grad=True)
    assert tlk.sigmoid_contrastive(x, x, logit_scale=1.0, logit_bias=0.0, impl=impl).isnan()


@pytest.mark.parametrize("bias", [-100.0, -30.0, 0.0, 30.0, 100.0])
def test_far_logits(impl, bias):
    """No overflow, and no loss of 0 where it is e^-30 per pair."""
    query, key = torch.randn(20, 4), torch.randn(20, 4)

    def run(loss, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = loss(*leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3])
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    tensors = query, key, torch.tensor(0.5), torch.tensor(bias)
    ours = run(lambda *t, **o: tlk.sigmoid_contrastive(*t, **o, impl=impl), *tensors)
    right = run(pytorch, *(t.double() for t in tensors))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5 * float(b.abs().max()))


def test_small_losses_are_relatively_right(impl):
    """log(1 + exp(x)) with a rounded 1 + exp(x) would be 0 for x below -17."""
    query = torch.zeros(2, 1)
    loss = tlk.sigmoid_contrastive(query, query, logit_scale=1.0, logit_bias=-20.0, impl=impl)
    right = torch.nn.functional.softplus(torch.tensor([20.0, -20.0]).double()).sum()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_as_in_pytorch(impl, value):
    query, key = torch.rand(5, 3), torch.rand(5, 3)
    query[1, 1] = value
    ours = tlk.sigmoid_contrastive(query, key, logit_scale=1.0, logit_bias=-1.0, impl=impl)
    right = pytorch(query, key, logit_scale=1.0, logit_bias=-1.0)
    torch.testing.assert_close(ours, right, equal_nan=True)


def test_double_backward(impl):
    tensors = [t.double() for t in (torch.randn(4, 3), torch.randn(4, 3), torch.tensor(2.0), torch.tensor(-1.0))]
    results = []
    for loss in (lambda *t, **o: tlk.sigmoid_contrastive(*t, **o, impl=impl), pytorch):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = loss(*leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3])
        grads = torch.autograd.grad(value.square(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("error", "message", "key", "options"), [
    (ValueError, r"key: expected the query's shape \(4, 5\), got \(3, 5\)", torch.randn(3, 5), {}),
    (TypeError, "logit_bias: expected a number or a 0-d tensor, got NoneType", torch.randn(4, 5), {"logit_bias": None}),
    (ValueError, "logit_scale: expected a finite number, got inf", torch.randn(4, 5), {"logit_scale": float("inf")}),
])  # fmt: skip
def test_bad_arguments(error, message, key, options):
    with pytest.raises(error, match=message):
        tlk.sigmoid_contrastive(torch.randn(4, 5), key, **{"logit_scale": 1.0, "logit_bias": 0.0, **options})


def test_triton_serves_where_it_runs():
    z = torch.empty(4, 5, device="meta")
    with pytest.raises(NotImplementedError, match=r"triton: supports|triton is not"):
        tlk.sigmoid_contrastive(z, z, logit_scale=1.0, logit_bias=0.0, impl="triton")


def test_module_trains_its_scale_and_bias():
    query, key = torch.randn(6, 4), torch.randn(6, 4)
    scale, bias = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(-1.0))
    module = tlk.SigmoidContrastiveLoss(logit_scale=scale, logit_bias=bias)
    assert len(list(module.parameters())) == 2
    value = module(query, key)
    value.backward()
    torch.testing.assert_close(value, pytorch(query, key, logit_scale=scale, logit_bias=bias))
    assert scale.grad is not None and bias.grad is not None
    assert "logit_bias" in repr(module)
