"""Small calls of every kernel, for compute-sanitizer; no result is checked.

    python -m scripts.gpu.kernels native|triton [GROUP ...]     the groups of calls named (all without a name)

Random numbers come from the CPU, so that few of torch's kernels run.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import harness
import torch
from cross_entropy_cases import COLUMN_STRATEGIES, ROW_STRATEGIES
from torch import Tensor

import tlkernels as tlk

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# The logits are a view of wider ones, and begin at this column: unaligned rows take another code path.
STARTS = (0, 1)


def cuda(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return random numbers on the GPU, drawn on the CPU."""
    return torch.randn(*shape).to(dtype).cuda()


def step(loss: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Run a loss forward and backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    loss(*inputs).sum().backward()
    torch.cuda.synchronize()


def cross_entropy_of_rows(impl: str, classes: int) -> None:
    """Class indices, one of them ignored: without options, and with options and a loss for each row."""
    y = torch.tensor([classes - 1, -100, 0]).cuda()
    for dtype, start in itertools.product((BF16, F32), STARTS):
        x = cuda(3, classes + 3, dtype=dtype)[:, start : start + classes]
        step(lambda x: tlk.cross_entropy(x, y, impl=impl), x)
        step(lambda x: tlk.cross_entropy(x, y, label_smoothing=0.1, softcap=9.0, reduction="none", impl=impl), x)


def cross_entropy_of_columns(impl: str, classes: int) -> None:
    """The class axis is not the last one."""
    x, y = cuda(2, classes, 35), torch.randint(classes, (2, 35)).cuda()
    step(lambda x: tlk.cross_entropy(x, y, impl=impl), x)


def cross_entropy(impl: str) -> None:
    """Cross entropy, for native with every row strategy."""
    if impl != "native":
        for classes in (45, 5003):
            cross_entropy_of_rows(impl, classes)
        cross_entropy_of_columns(impl, 9)
        return
    for strategies, run in ((ROW_STRATEGIES, cross_entropy_of_rows), (COLUMN_STRATEGIES, cross_entropy_of_columns)):
        for name, sizes in strategies.items():
            for classes in sizes[-2:]:
                with harness.cross_entropy_strategy(name):
                    run(impl, classes)


def distillation(impl: str) -> None:
    """Rows that fit a warp, a block, the shared memory of a block and of a cluster, and no on-chip memory."""
    target = torch.tensor([0, 5]).cuda()
    for divergence, dtype in itertools.product(("forward_kl", "js", "tv"), (BF16, F32)):
        for classes in (40, 999, 3001, 17001, 66001):
            loss = partial(tlk.distillation, target=target, divergence=divergence, hard_weight=0.3, impl=impl)
            step(loss, cuda(2, classes, dtype=dtype), cuda(2, classes, dtype=dtype))


def selective(impl: str) -> None:
    """Selected classes, one of them twice, and the entropy; a capped distillation."""
    index = torch.tensor([[0, 5, 0], [3, 1, 2]]).cuda()

    def loss(x: Tensor, softcap: float | None) -> Tensor:
        results = tlk.selective_log_softmax(x, index, softcap=softcap, return_entropy=True, impl=impl)
        return sum((result.sum() for result in results), x.new_zeros(()))

    for dtype, classes in itertools.product((BF16, F32), (45, 5003, 66001)):
        for softcap in (None, 9.0):
            step(partial(loss, softcap=softcap), cuda(2, classes, dtype=dtype))
        capped = partial(tlk.distillation, softcap=(9.0, None), impl=impl)
        step(capped, cuda(2, classes, dtype=dtype), cuda(2, classes, dtype=dtype))


def info_nce(impl: str) -> None:
    """InfoNCE, NT-Xent and SupCon; features that are no multiple of a tile, and more rows than a block of columns."""
    for rows, features, dtype in ((70, 40, BF16), (2200, 40, BF16), (70, 33, F16), (70, 40, F32)):
        q, k = cuda(rows, features, dtype=dtype), cuda(rows, features, dtype=dtype)
        labels = torch.arange(rows).cuda() % 7
        step(lambda q, k: tlk.info_nce(q, k, logit_scale=9.0, symmetric=True, normalize=True, impl=impl), q, k)
        step(lambda q, k: tlk.nt_xent(q, k, temperature=0.2, impl=impl), q[:90], k[:90])
        step(lambda q, labels=labels: tlk.sup_con(q, labels, temperature=0.2, impl=impl), q)
    q, negatives = cuda(20, 40), cuda(20, 5, 40)
    step(lambda q, n: tlk.info_nce(q, q.detach(), negatives=n, label_smoothing=0.1, impl=impl), q, negatives)


def linear(impl: str) -> None:
    """The losses with a linear layer."""
    x, w, y = cuda(40, 32), cuda(300, 32), torch.randint(300, (40,)).cuda()
    teacher, teacher_weight = cuda(40, 24), cuda(300, 24)
    step(lambda x, w: tlk.linear_cross_entropy(x, w, y, impl=impl), x, w)
    step(lambda x, w: tlk.linear_distillation(x, w, teacher, teacher_weight, impl=impl), x, w)
    y[::2] = -100
    step(lambda x, w: tlk.linear_cross_entropy(x, w, y, num_valid=20, impl=impl), x, w)
    index = y.clamp(min=0)
    step(lambda x, w: torch.as_tensor(tlk.linear_selective_log_softmax(x, w, index, impl=impl)), x, w)


def only_triton(impl: str) -> None:
    """The losses without CUDA C++."""
    if impl == "triton":
        x, y = cuda(33, 40), cuda(33, 40)
        for loss in (tlk.mse, tlk.rmse):
            step(lambda x, y, loss=loss: loss(x, y, impl=impl), x, y)
        step(lambda q, k: tlk.sigmoid_contrastive(q, k, logit_scale=9.0, logit_bias=-9.0, impl=impl), x, y)


def main(impl: str, *names: str) -> None:
    """Run the groups with these names, or all."""
    torch.manual_seed(0)
    for group in (cross_entropy, distillation, selective, info_nce, linear, only_triton):
        if not names or group.__name__ in names:
            group(impl)
            print(f"{group.__name__}: ran", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
