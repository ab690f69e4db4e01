"""SupCon: edge cases, several views, relations to other losses, errors, the module."""

import harness
import helpers
import pytest
import torch
from sup_con_cases import pytorch

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("info_nce")


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_row_with_a_positive(impl, n):
    """The mean is NaN and the gradients are 0, as F.cross_entropy's if every row is ignored."""
    features = torch.randn(n, 4, requires_grad=True)
    loss = tlk.sup_con(features, torch.arange(n), temperature=0.001, impl=impl)
    loss.backward()
    assert loss.isnan()
    assert torch.equal(features.grad, torch.zeros(n, 4))
    assert tlk.sup_con(features, torch.arange(n), reduction="sum", impl=impl) == 0
    assert torch.equal(tlk.sup_con(features, torch.arange(n), reduction="none", impl=impl), torch.zeros(n))


def test_rows_without_a_positive_are_out_of_the_mean(impl):
    features = torch.randn(5, 4)
    labels = torch.tensor([7, 3, 7, 4, 5])
    rows = tlk.sup_con(features, labels, reduction="none", impl=impl)
    assert rows[[1, 3, 4]].tolist() == [0, 0, 0]
    torch.testing.assert_close(tlk.sup_con(features, labels, impl=impl), rows[[0, 2]].mean())


def test_one_label(impl):
    features = torch.randn(6, 4)
    ours = tlk.sup_con(features, torch.zeros(6, dtype=torch.int32), temperature=0.1, impl=impl)
    torch.testing.assert_close(ours, pytorch(features.double(), torch.zeros(6), temperature=0.1).float())


def test_labels_far_apart(impl):
    """Labels that differ only above 32 bits are different."""
    features = torch.randn(6, 4)
    labels = torch.tensor([0, 2**32, 0, 2**32, -(2**62), 1])
    ours = tlk.sup_con(features, labels, temperature=0.1, impl=impl)
    torch.testing.assert_close(ours, pytorch(features.double(), labels, temperature=0.1).float())


def test_two_views_of_each_is_nt_xent(impl):
    z1, z2 = torch.randn(600, 8), torch.randn(600, 8)
    labels = torch.arange(600).repeat(2)
    torch.testing.assert_close(
        tlk.sup_con(torch.cat([z1, z2]), labels, temperature=0.1, impl=impl),
        tlk.nt_xent(z1, z2, temperature=0.1, impl=impl),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_of_each_sample(impl, views, reduction):
    """The convention of the paper's authors: features (batch, views, D), one label for all views of a sample."""
    generator = harness.generator(views)
    features = torch.randn(5, views, 4, generator=generator)
    labels = torch.tensor([3, 0, 3, 1, 0], dtype=torch.uint16)
    rows = torch.cat(features.double().unbind(1)).requires_grad_()  # the first views, then the second ones, and so on
    right = pytorch(rows, labels.long().repeat(views), temperature=0.5, reduction=reduction)
    (expected,) = torch.autograd.grad(right.sum(), rows)
    ours = tlk.sup_con(features.requires_grad_(), labels, temperature=0.5, reduction=reduction, impl=impl)
    (grad,) = torch.autograd.grad(ours.sum(), features)
    right = torch.stack(right.chunk(views), 1) if reduction == "none" else right
    torch.testing.assert_close(ours, right.float())
    torch.testing.assert_close(grad, torch.stack(expected.chunk(views), 1).float())


def test_views_of_strided_features(impl):
    features = torch.randn(4, 5, 2).permute(1, 2, 0)
    labels = torch.tensor([0, 1, 0, 1, 2])
    right = pytorch(features.double().flatten(0, 1), labels.repeat_interleave(2), temperature=0.5)
    torch.testing.assert_close(tlk.sup_con(features, labels, temperature=0.5, impl=impl), right.float())


@pytest.mark.parametrize(("error", "message", "features", "labels"), [
    (ValueError, r"labels: expected shape \(4,\), got \(8,\)", torch.randn(4, 2, 3), torch.arange(8)),
    (TypeError, "labels: expected a Tensor, got NoneType", torch.randn(4, 2, 3), None),
    (ValueError, r"features: expected shape \(N, D\) or \(batch, views, D\), got \(4, 2, 3, 3\)",
     torch.randn(4, 2, 3, 3), torch.arange(4)),
])  # fmt: skip
def test_bad_views(error, message, features, labels):
    with pytest.raises(error, match=message):
        tlk.sup_con(features, labels)


@pytest.mark.parametrize(("error", "message", "labels", "options"), [
    (ValueError, r"labels: expected shape \(4,\), got \(3,\)", torch.arange(3), {}),
    (TypeError, "labels: expected an integer dtype, got torch.float32", torch.rand(4), {}),
    (TypeError, "labels: expected a Tensor, got list", [0, 1, 2, 3], {}),
    (ValueError, "reduction", torch.arange(4), {"reduction": "median"}),
])  # fmt: skip
def test_bad_arguments(error, message, labels, options):
    with pytest.raises(error, match=message):
        tlk.sup_con(torch.randn(4, 5), labels, **options)


def test_triton_serves_where_it_runs():
    z = torch.empty(4, 5, device="meta")
    with pytest.raises(NotImplementedError, match=r"triton: supports|triton is not"):
        tlk.sup_con(z, torch.arange(4, device="meta"), impl="triton")


def test_module():
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 2])
    module = tlk.SupConLoss(logit_scale=3.0, normalize=False, reduction="sum")
    expected = pytorch(features, labels, logit_scale=3.0, normalize=False, reduction="sum")
    torch.testing.assert_close(module(features, labels), expected)
    assert "logit_scale=3.0" in repr(module)
