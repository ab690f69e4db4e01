"""With `auto`, tensor subclasses that have operators of their own, such as DTensor, get PyTorch's results."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import tlkernels as tlk

TARGET = torch.tensor([0, 3, 8, 2, 2, -100])
PAIRS = {
    "cross_entropy": (
        lambda kind, x, y, h, w, **how: tlk.cross_entropy(x, kind(TARGET), **how),
        lambda kind, x, y, h, w: F.cross_entropy(x, kind(TARGET)),
    ),
    "linear_cross_entropy": (
        lambda kind, x, y, h, w, **how: tlk.linear_cross_entropy(h, w, kind(TARGET), **how),
        lambda kind, x, y, h, w: F.cross_entropy(F.linear(h, w), kind(TARGET)),
    ),
    "distillation": (
        lambda kind, x, y, h, w, **how: tlk.distillation(x, y, **how),
        lambda kind, x, y, h, w: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
    ),
    "linear_distillation": (
        lambda kind, x, y, h, w, **how: tlk.linear_distillation(h, w, h.cos(), w, **how),
        lambda kind, x, y, h, w: F.kl_div(
            F.linear(h, w).log_softmax(1), F.linear(h.cos(), w).softmax(1), reduction="batchmean"
        ),
    ),
    "info_nce": (
        lambda kind, x, y, h, w, **how: tlk.info_nce(x, y, **how),
        lambda kind, x, y, h, w: F.cross_entropy(x @ y.T, kind(torch.arange(6))),
    ),
    "sup_con": (
        lambda kind, x, y, h, w, **how: tlk.sup_con(x, kind(torch.arange(6) // 2), normalize=False, **how),
        lambda kind, x, y, h, w: F.cross_entropy(  # each row's one positive
            (x @ x.T).masked_fill(kind(torch.eye(6).bool()), -torch.inf), kind(torch.arange(6) ^ 1)
        ),
    ),
    "nt_xent": (
        lambda kind, x, y, h, w, **how: tlk.nt_xent(x, y, normalize=False, **how),
        lambda kind, x, y, h, w: F.cross_entropy(
            (torch.cat([x, y]) @ torch.cat([x, y]).T).masked_fill(kind(torch.eye(12).bool()), -torch.inf),
            kind(torch.arange(12).roll(6)),
        ),
    ),
    "mse": (lambda kind, x, y, h, w, **how: tlk.mse(x, y, **how), lambda kind, x, y, h, w: F.mse_loss(x, y)),
    "rmse": (lambda kind, x, y, h, w, **how: tlk.rmse(x, y, **how), lambda kind, x, y, h, w: F.mse_loss(x, y).sqrt()),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def whole(tensor):
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor.a if isinstance(tensor, TwoTensor) else tensor


@pytest.mark.parametrize("kind", ["DTensor", "TwoTensor"])
@pytest.mark.parametrize("name", PAIRS)
def test_auto_gives_pytorchs_result(mesh, name, kind):
    """Once `auto` raised "no sharding strategy" where F.cross_entropy works (pytorch #119877)."""

    def put(tensor):
        return distribute_tensor(tensor, mesh, [Replicate()]) if kind == "DTensor" else TwoTensor(tensor, tensor)

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((6, 9), (6, 9), (6, 5), (9, 5))]
    results = []
    for function in PAIRS[name]:
        inputs = [put(tensor.clone()).requires_grad_() for tensor in tensors]
        value = function(put, *inputs)
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
        results.append([whole(tensor) for tensor in (value.detach(), *grads)])
    torch.testing.assert_close(*results)
    for impl in ("native", "triton"):
        with pytest.raises(NotImplementedError, match=f"{kind} has no implementation|no GPU|triton|extension"):
            PAIRS[name][0](put, *map(put, tensors), impl=impl)


def test_a_subclass_without_operators_of_its_own():
    """A subclass without operators, such as torchvision's, takes the kernels."""

    class Labelled(torch.Tensor):
        pass

    x, y = torch.randn(6, 9), TARGET
    labelled = x.as_subclass(Labelled).requires_grad_()
    assert "served by native" in tlk.explain(tlk.cross_entropy, labelled, y) or not tlk._core.native.available()
    value = tlk.cross_entropy(labelled, y)
    torch.testing.assert_close(value.as_subclass(torch.Tensor), F.cross_entropy(x, y))
    (grad,) = torch.autograd.grad(value, labelled)
    right = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(right, y), right)[0])
