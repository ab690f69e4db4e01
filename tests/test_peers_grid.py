"""Launch grids with 65536 rows and more (Liger #1294): CUDA allows 65535 blocks along the second and third axis.

Triton's launches are recorded for tensors without values, which any size of a GPU's takes no memory. The host run of
the CUDA kernels refuses a grid as a GPU does (tests/cuda_host/cuda_runtime.cpp).
"""

from functools import partial

import harness
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import pytorch as divergence_of
from peers import over, running

import tlkernels as tlk
from tlkernels._core import triton
from tlkernels._core.triton import linear
from tlkernels._core.triton.launch import Launch, recorded

interpreted = pytest.mark.skipif(not triton.INTERPRETED or not triton.available(), reason="needs TRITON_INTERPRET=1")
ROWS = 65537
LIMITS = (2**31 - 1, 65535, 65535)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.fixture
def on_meta(monkeypatch):
    """Let Triton's implementations serve tensors on the meta device, on which their launches are recorded."""
    monkeypatch.setattr(triton, "DEVICE", "meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    with torch.library._scoped_library("tlkernels", "IMPL") as library:
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("tlkernels::") and name.endswith("_triton"):
                op = getattr(torch.ops.tlkernels, name.removeprefix("tlkernels::")).default
                library.impl(op, partial(op.redispatch, CPU), "Meta", allow_override=True)
        yield


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def indices(*shape):
    return empty(*shape, dtype=torch.int64)


CALLS = {
    "rows": (tlk.cross_entropy, lambda n: (empty(n, 3), indices(n)), {}),
    "probabilities": (tlk.cross_entropy, lambda n: (empty(n, 3), empty(n, 3).detach()), {"label_smoothing": 0.1}),
    "positions": (tlk.cross_entropy, lambda n: (empty(2, 3, n), indices(2, n)), {"softcap": 3.0}),
    "images": (tlk.cross_entropy, lambda n: (empty(n, 3, 5), indices(n, 5)), {}),
    "classes": (tlk.cross_entropy, lambda n: (empty(5, 64 * n), indices(5)), {}),
    "linear": (tlk.linear_cross_entropy, lambda n: (empty(n, 8), empty(9, 8), indices(n)), {}),
    "linear of classes": (tlk.linear_cross_entropy, lambda n: (empty(5, 8), empty(64 * n, 8), indices(5)), {}),
    **{
        f"{divergence} {rows} rows": (
            tlk.distillation,
            lambda n, rows=rows: (empty(n, 3), empty(n, 3)) if rows == "many" else (empty(5, 9 * n), empty(5, 9 * n)),
            {"divergence": divergence, "temperature": 2.0},
        )
        for divergence in ("forward_kl", "reverse_kl", "js", "tv")
        for rows in ("many", "few")
    },
    "hard": (tlk.distillation, lambda n: (empty(n, 3), empty(n, 3), indices(n)), {"hard_weight": 0.5}),
    "linear distillation": (
        tlk.linear_distillation,
        lambda n: (empty(n, 8), empty(9, 8), empty(n, 4), empty(9, 4)),
        {"divergence": "js"},
    ),
    "linear distillation of classes": (
        tlk.linear_distillation,
        lambda n: (empty(5, 8), empty(9 * n, 8), empty(5, 4), empty(9 * n, 4)),
        {"divergence": "js"},
    ),
    "info_nce": (tlk.info_nce, lambda n: (empty(n, 8), empty(n, 8)), {"normalize": True}),
    "symmetric": (tlk.info_nce, lambda n: (empty(n, 8), empty(n, 8)), {"symmetric": True}),
    "keys": (tlk.info_nce, lambda n: (empty(5, 8), empty(16 * n, 8), indices(5)), {}),
    "negatives": (tlk.info_nce, lambda n: (empty(n, 8), empty(n, 8)), {"negatives": (9, 8)}),
    "negatives of each": (tlk.info_nce, lambda n: (empty(n, 8), empty(n, 8)), {"negatives": (ROWS, 3, 8)}),
    "features": (tlk.info_nce, lambda n: (empty(4, 9 * n), empty(4, 9 * n)), {"negatives": (4, 3, 9 * ROWS)}),
    "nt_xent": (tlk.nt_xent, lambda n: (empty(n, 8), empty(n, 8)), {}),
    "sup_con": (tlk.sup_con, lambda n: (empty(n, 8), indices(n)), {}),
    "sigmoid": (tlk.sigmoid_contrastive, lambda n: (empty(n, 8), empty(n, 8)), {"logit_scale": 3.0, "logit_bias": 0.0}),
    "mse": (tlk.mse, lambda n: (empty(n, 130), empty(n, 130)), {}),
    "rmse": (tlk.rmse, lambda n: (empty(n, 130), empty(n, 130)), {}),
}


def check(launches):
    """Raise AssertionError if a grid is larger than a GPU allows."""
    assert launches
    for kernel, grid, *_ in launches:
        inside = all(size <= most for size, most in zip(grid, LIMITS, strict=False))
        assert inside, f"{kernel.__name__}: a grid of {grid}"


@interpreted
@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("strategy", linear.STRATEGIES)
@pytest.mark.parametrize("name", CALLS)
def test_grids_of_triton(name, strategy, architecture):
    function, make, options = CALLS[name]
    if strategy != "lean" and not function.__name__.startswith("linear_"):
        return
    for reduction in [{"reduction": "mean"}, {"reduction": "none"}] if name != "sigmoid" else [{}]:
        given = dict(options)
        if "negatives" in given:
            given["negatives"] = empty(*given["negatives"])
        tensors = make(ROWS)
        with recorded(architecture) as launches, linear.forced(strategy):
            loss = function(*tensors, **given, **reduction, impl="triton")
            forward = len(launches)
            inputs = [tensor for tensor in (*tensors, *given.values()) if getattr(tensor, "requires_grad", False)]
            torch.autograd.grad(loss, inputs, torch.empty_like(loss))
        check(launches)
        assert len(launches) > forward or reduction.get("reduction") == "mean"


@interpreted
@pytest.mark.usefixtures("on_meta")
def test_grids_of_second_derivatives():
    for function, tensors in (
        (tlk.cross_entropy, (empty(ROWS, 3), indices(ROWS))),
        (tlk.distillation, (empty(ROWS, 3), empty(ROWS, 3))),
    ):
        with recorded("sm_90") as launches:
            loss = function(*tensors, reduction="none", impl="triton")
            (grad,) = torch.autograd.grad(loss, tensors[0], torch.empty_like(loss), create_graph=True)
            torch.autograd.grad(grad, tensors[0], torch.empty_like(grad))
        check(launches)


def test_the_check_sees_a_grid_over_the_limit():
    check([Launch(check, (ROWS, 65535), {}, {})])
    with pytest.raises(AssertionError, match="65537"):
        check([Launch(check, (3, ROWS), {}, {})])


LOSSES = {
    "cross_entropy": (tlk.cross_entropy, F.cross_entropy),
    "linear_cross_entropy": (
        lambda x, y, impl: tlk.linear_cross_entropy(x, torch.eye(3), y, impl=impl),
        F.cross_entropy,
    ),
    "distillation": (
        lambda x, y, impl: tlk.distillation(x, x.detach().flip(0), y, impl=impl),
        lambda x, y: divergence_of(x, x.detach().flip(0), y),
    ),
    "linear_distillation": (
        lambda x, y, impl: tlk.linear_distillation(x, torch.eye(3), x.detach().flip(0), torch.eye(3), y, impl=impl),
        lambda x, y: divergence_of(x, x.detach().flip(0), y),
    ),
    "mse": (
        lambda x, y, impl: tlk.mse(x, x.detach().flip(0), impl=impl),
        lambda x, y: F.mse_loss(x, x.detach().flip(0)),
    ),
}


def slow(loss, run):
    """A hundred seconds: these kernels have a block for each row."""
    return run.target.isa == harness.CUDA_HOST and "distillation" in loss


@over(LOSSES, lambda run: run.target.impl != "triton", slow)
def test_rows_past_65536(loss, run):
    """By the CPU's kernels, and by CUDA's on the host: also the last rows have a loss and a gradient."""
    x, y = torch.randn(ROWS, 3), torch.randint(3, (ROWS,))
    results = []
    with running(run) as impl:
        for function, dtype in ((partial(LOSSES[loss][0], impl=impl), torch.float32), (LOSSES[loss][1], torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            value = function(leaf, y)
            results.append([value.detach().double(), torch.autograd.grad(value, leaf)[0].double() * ROWS])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
