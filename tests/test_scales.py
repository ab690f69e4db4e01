"""Temperature, scale and bias of the contrastive losses: numbers, or tensors of shape () or (1,), as FSDP needs."""

import harness
import helpers
import info_nce_cases
import nt_xent_cases
import pytest
import sigmoid_contrastive_cases
import sup_con_cases
import torch

import tlkernels as tlk

LOSSES = {
    "info_nce": (tlk.info_nce, tlk.InfoNCELoss, info_nce_cases.pytorch, {"symmetric": True}, {}),
    "nt_xent": (tlk.nt_xent, tlk.NTXentLoss, nt_xent_cases.pytorch, {}, {}),
    "sup_con": (tlk.sup_con, tlk.SupConLoss, sup_con_cases.pytorch, {}, {}),
    "sigmoid_contrastive": (tlk.sigmoid_contrastive, tlk.SigmoidContrastiveLoss, sigmoid_contrastive_cases.pytorch, {},
                            {"logit_scale": 3.0, "logit_bias": -1.0}),
}  # fmt: skip
ARGUMENTS = [(loss, name) for loss in LOSSES for name in (
    ("logit_scale", "logit_bias") if loss == "sigmoid_contrastive" else ("temperature", "logit_scale")
)]  # fmt: skip
each_argument = pytest.mark.parametrize(("loss", "name"), ARGUMENTS)


def tensors(loss):
    generator = harness.generator(3)
    x, y = (torch.randn(6, 4, generator=generator) for _ in range(2))
    return x, torch.tensor([0, 1, 0, 1, 2, 0]) if loss == "sup_con" else y


@pytest.mark.parametrize("impl", helpers.IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@each_argument
def test_gradient_has_the_tensors_shape(loss, name, shape, impl):
    function, make, pytorch, options, others = LOSSES[loss]
    value = torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True)
    x, y = (t.double() if t.is_floating_point() else t for t in tensors(loss))
    right = pytorch(x, y, **{**options, **others, name: value})
    (expected,) = torch.autograd.grad(right, value)
    scale = torch.nn.Parameter(torch.full(shape, 0.7))
    for ours in (lambda x, y, **more: function(x, y, **options, **more),
                 lambda x, y, **more: make(**options, **more)(x, y)):  # fmt: skip
        made = ours(*tensors(loss), **{**others, name: scale}, impl=impl)
        torch.testing.assert_close(made, right.float())
        (grad,) = torch.autograd.grad(made, scale)
        assert grad.shape == shape
        torch.testing.assert_close(grad, expected.float())


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 1)], ids=str)
@each_argument
def test_larger_shapes_raise(loss, name, shape):
    function, _, _, _, others = LOSSES[loss]
    with pytest.raises(ValueError, match=f"^{name}: expected a number or a 0-d tensor, .* got shape"):
        function(*tensors(loss), **{**others, name: torch.ones(shape)})


@each_argument
def test_a_parameter_of_shape_1_is_trained(loss, name):
    _, make, _, options, others = LOSSES[loss]
    module = make(**options, **{**others, name: torch.nn.Parameter(torch.full((1,), 0.7))})
    assert [parameter for parameter, _ in module.named_parameters()] == [name]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    before = module(*tensors(loss))
    before.backward()
    optimizer.step()
    assert module(*tensors(loss)) < before
    assert list(module.state_dict()) == [name]
