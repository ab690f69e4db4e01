"""NT-Xent: edge cases, relations to other losses, errors, the module."""

import helpers
import pytest
import torch
import torch.nn.functional as F
from nt_xent_cases import pytorch

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("info_nce")


def test_no_examples(impl):
    z = torch.randn(0, 4, requires_grad=True)
    assert tlk.nt_xent(z, z, impl=impl).isnan()
    assert tlk.nt_xent(z, z, reduction="sum", impl=impl) == 0
    assert tlk.nt_xent(z, z, reduction="none", impl=impl).shape == (0,)


def test_one_example_has_no_negative(impl):
    z1, z2 = (torch.randn(1, 4, requires_grad=True) for _ in range(2))
    loss = tlk.nt_xent(z1, z2, temperature=0.1, impl=impl)
    loss.backward()
    assert loss == 0
    assert not z1.grad.any()


def test_is_info_nce_without_itself(impl):
    """Each view against all others, as a call of info_nce."""
    z1, z2 = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    z = torch.cat([z1, z2])
    other = tlk.info_nce(z, z, torch.arange(12).roll(6), mask=torch.eye(12) > 0, temperature=0.2, impl=impl)
    torch.testing.assert_close(tlk.nt_xent(z1, z2, temperature=0.2, impl=impl), other)


def test_identical_views(impl):
    z = torch.randn(9, 5)
    for scale in (1.0, 100.0):
        ours = tlk.nt_xent(z, z.clone(), logit_scale=scale, impl=impl)
        right = pytorch(z.double(), z.double(), logit_scale=scale)
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("error", "message", "z2", "options"), [
    (ValueError, r"z2: expected z1's shape \(4, 5\), got \(3, 5\)", torch.randn(3, 5), {}),
    (TypeError, "z2: expected the dtype of z1", torch.randn(4, 5).double(), {}),
    (TypeError, "z2: expected a Tensor, got NoneType", None, {}),
    (ValueError, "reduction", torch.randn(4, 5), {"reduction": "median"}),
    (ValueError, "temperature, logit_scale", torch.randn(4, 5), {"temperature": 1.0, "logit_scale": 1.0}),
])  # fmt: skip
def test_bad_arguments(error, message, z2, options):
    with pytest.raises(error, match=message):
        tlk.nt_xent(torch.randn(4, 5), z2, **options)


def test_triton_serves_where_it_runs():
    z = torch.empty(4, 5, device="meta")
    with pytest.raises(NotImplementedError, match=r"triton: supports|triton is not"):
        tlk.nt_xent(z, z, impl="triton")


def test_module():
    z1, z2 = torch.randn(6, 4), torch.randn(6, 4)
    temperature = torch.nn.Parameter(torch.tensor(0.2))
    module = tlk.NTXentLoss(temperature=temperature, normalize=False, reduction="sum")
    assert [parameter is temperature for parameter in module.parameters()] == [True]
    torch.testing.assert_close(module(z1, z2), pytorch(z1, z2, temperature=0.2, normalize=False, reduction="sum"))
    assert "reduction='sum'" in repr(module)
