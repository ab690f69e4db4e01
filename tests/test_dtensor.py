"""Tensor subclasses that have operators of their own, such as DTensor, get PyTorch's results.

The kernels serve DTensors in the losses on rows, unless classes or features are sharded.
"""

import itertools
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
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


ON_ROWS = ("cross_entropy", "linear_cross_entropy", "distillation", "linear_distillation", "mse", "rmse")
"""The losses whose kernels serve DTensors."""


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
    if kind == "DTensor" and name in ON_ROWS:
        assert "each rank its own rows" in tlk.explain(PAIRS[name][0], put, *map(put, tensors))
        return
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


# On several processes: rows are sharded, unevenly, and one rank of four has none.

ROWS, CLASSES, FEATURES = 5, 9, 4
Y = torch.tensor([0, -100, 8, 2, -100])


def shares(dtype):
    """Return the tensors of the calls below, for all ranks."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    rows = {"x": (ROWS, CLASSES), "t": (ROWS, CLASSES), "image": (ROWS, CLASSES, 3), "h": (ROWS, 2, FEATURES)}
    shared = {"w": (CLASSES, FEATURES), "b": (CLASSES,), "v": (CLASSES, FEATURES)}
    given = {name: draw(shape).to(dtype) for name, shape in (rows | shared).items()}
    given |= {"by_row": draw(ROWS).abs().to(dtype), "by_class": draw(CLASSES).abs().to(dtype), "y": Y}
    given |= {"pixels": Y[:, None].repeat(1, 3), "tokens": Y[:, None].repeat(1, 2), "q": given["t"].softmax(1)}
    return given | {"valid": 6}, {*shared, "by_class"}


CALLS = {
    "cross_entropy": (lambda g, **o: tlk.cross_entropy(g["x"], g["y"], **o), ("x",)),
    "weights": (
        lambda g, **o: tlk.cross_entropy(
            g["x"], g["y"], g["by_class"], row_weight=g["by_row"], label_smoothing=0.1, z_loss=0.01, **o
        ),
        ("x",),
    ),
    "probabilities": (lambda g, **o: tlk.cross_entropy(g["x"], g["q"], softcap=3.0, **o), ("x",)),
    "image": (lambda g, **o: tlk.cross_entropy(g["image"], g["pixels"], **o), ("image",)),
    "linear": (
        lambda g, **o: tlk.linear_cross_entropy(
            g["h"], g["w"], g["tokens"], linear_bias=g["b"], num_valid=g["valid"], **o
        ),
        ("h", "w", "b"),
    ),
    "distillation": (
        lambda g, **o: tlk.distillation(g["x"], g["t"], g["y"], hard_weight=0.3, row_weight=g["by_row"], **o),
        ("x", "t"),
    ),
    "linear_distillation": (
        lambda g, **o: tlk.linear_distillation(
            g["h"], g["w"], g["h"].cos(), g["v"], g["tokens"], student_bias=g["b"], divergence="js", **o
        ),
        ("h", "w", "b", "v"),
    ),
    "mse": (lambda g, **o: tlk.mse(g["x"], g["t"], **o), ("x", "t")),
    "rmse": (lambda g, **o: tlk.rmse(g["x"], g["t"], weight=g["q"], eps=0.1, **o), ("x", "t")),
}
KERNELS = "native" if tlk._core.native.available() else "auto"
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def result_of(call, given, wanted, **options):
    """Return loss, gradients, and in float64 the gradients of the gradients."""
    leaves = [given[name].detach().requires_grad_() for name in wanted]
    value = call({**given, **dict(zip(wanted, leaves, strict=True))}, **options)
    total = value.sum()
    grads = torch.autograd.grad(total, leaves, create_graph=value.dtype == torch.float64)
    seconds = []
    if value.dtype == torch.float64:
        seconds = torch.autograd.grad(sum((grad * grad).sum() for grad in grads), leaves)
    return value, *grads, *seconds


def check_call(name, mesh, dtype, reduction, impl, dim=0, masked=False):
    call, wanted = CALLS[name]
    given, shared = shares(dtype)
    if masked:
        given |= {key: torch.full_like(given[key], -100) for key in ("y", "pixels", "tokens")} | {"valid": 0}
    options = {"reduction": reduction}
    expected = result_of(call, given, wanted, impl="reference", **options)
    placed = {
        key: distribute_tensor(
            tensor, mesh, [Replicate() if key in shared or tensor.dim() <= dim else Shard(dim)] * mesh.ndim
        )
        for key, tensor in given.items()
        if isinstance(tensor, torch.Tensor)
    }
    found = result_of(call, {**given, **placed}, wanted, impl=impl, **options)
    assert found[0].dtype == dtype
    assert all(isinstance(value, DTensor) for value in found)
    tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype], "equal_nan": True}
    torch.testing.assert_close([value.full_tensor() for value in found], list(expected), **tolerance)
    for leaf, grad in zip(wanted, found[1:], strict=False):
        assert grad.placements == placed[leaf].placements, leaf


def check_refusals(mesh):
    """Sharded classes and mixed placements: `auto` gives PyTorch's result, and `explain` says why."""
    given, _ = shares(torch.float32)
    x, y = (distribute_tensor(given["x"], mesh, [Shard(1)]), distribute_tensor(given["y"], mesh, [Replicate()]))
    assert "input is a DTensor sharded along dimension 1" in tlk.explain(tlk.cross_entropy, x, y)
    found = tlk.cross_entropy(x.requires_grad_(), y)
    torch.testing.assert_close(found.full_tensor(), F.cross_entropy(given["x"], given["y"]))
    h, w = distribute_tensor(given["h"], mesh, [Replicate()]), distribute_tensor(given["w"], mesh, [Shard(0)])
    tokens = distribute_tensor(given["tokens"], mesh, [Replicate()])
    assert "linear_weight is a DTensor that is not replicated" in tlk.explain(tlk.linear_cross_entropy, h, w, tokens)
    with pytest.raises(NotImplementedError, match="sharded along dimension 1"):
        tlk.cross_entropy(x, y, impl="native")
    x = distribute_tensor(given["x"], mesh, [Shard(0)])  # with a target that every rank has whole
    torch.testing.assert_close(tlk.cross_entropy(x, y).full_tensor(), F.cross_entropy(given["x"], given["y"]))


def check_stats(mesh):
    given, _ = shares(torch.float64)
    x, y = (distribute_tensor(given[name], mesh, [Shard(0)]) for name in ("x", "y"))
    x.requires_grad_()
    found = tlk.cross_entropy_stats(x, y)
    expected = tlk.cross_entropy_stats(given["x"].requires_grad_(), given["y"])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.full_tensor(), right)
    totals = [output.loss + (output.lse.sin() * output.entropy).sum() for output in (found, expected)]
    grads = torch.autograd.grad(totals[0], x)[0].full_tensor(), torch.autograd.grad(totals[1], given["x"])[0]
    torch.testing.assert_close(*grads)


def work(rank, ranks, store, errors):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for name, reduction in itertools.product(CALLS, ("mean", "sum", "none")):
            check_call(name, mesh, torch.float64, reduction, KERNELS)
        for name in ("cross_entropy", "distillation", "mse"):
            check_call(name, mesh, torch.float64, "mean", "reference")
        for name, dtype in itertools.product(CALLS, (torch.float32, torch.bfloat16, torch.float16)):
            check_call(name, mesh, dtype, "mean", "auto")
        for name in ("cross_entropy", "weights", "linear", "distillation"):
            check_call(name, mesh, torch.float64, "mean", "auto", masked=True)
        check_call("image", mesh, torch.float64, "mean", "auto", dim=2)
        if ranks == 4:
            check_call("linear", init_device_mesh("cpu", (2, 2)), torch.float32, "mean", "auto")
        check_refusals(mesh)
        check_stats(mesh)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 4))])
def test_rows_sharded_over_ranks(ranks, tmp_path):
    """As the whole batch on one process, by the kernels on each rank's own rows."""
    context = mp.get_context("spawn")
    errors = context.SimpleQueue()
    workers = [context.Process(target=work, args=(rank, ranks, tmp_path / "store", errors)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors.empty(), errors.get()
    assert all(worker.exitcode == 0 for worker in workers)
