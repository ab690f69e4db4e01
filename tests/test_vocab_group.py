"""vocab_group=: classes split over ranks give the loss of the whole rows, the same bits on every rank."""

import math
import os
import sys
import traceback
from datetime import timedelta
from functools import partial

import cross_entropy_cases
import harness
import helpers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tlkernels as tlk

CLASSES = 23
PARTS = {1: (23,), 2: (9, 14), 4: (5, 1, 10, 7)}
IGNORED = -100


def inputs(shape, target, weighted, row_weighted, dtype=torch.float64):
    """Return the whole call: classes in axis 1 of `shape`."""
    generator = harness.generator(3)
    positions = (shape[0], *shape[2:])
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x[0, :9] = -math.inf  # all of the first rank's classes
    if target == "indices":
        y = torch.randint(0, shape[1], positions, generator=generator)
        y.view(-1)[:8] = torch.tensor([22, 5, 8, 9, 4, IGNORED, 15, 0])  # of every rank
    else:
        y = torch.randn(shape, generator=generator).softmax(1).to(dtype)
        x[0, :9] = -30  # 0 * -inf is NaN, as in PyTorch
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) if weighted else None
    row_weight = torch.randn(positions, generator=generator, dtype=torch.float64) if row_weighted else None
    return x.to(dtype), y, weight, row_weight


def right(x, y, weight, row_weight, reduction, **options):
    """Return the loss of the PyTorch lines."""
    rows = cross_entropy_cases.pytorch(x, y, weight, reduction="none", **options)
    rows = rows if row_weight is None else rows * row_weight
    if reduction == "none":
        return rows
    count = rows.numel()
    if not y.is_floating_point():
        counted = y != IGNORED
        count = counted.sum() if weight is None else weight[y[counted]].sum()
    return rows.sum() / (count if reduction == "mean" else 1)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 2.0, "temperature": 1.5},
    "z_loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.2, "softcap": 4.0, "temperature": 0.7, "z_loss": 0.1},
}
CASES = {
    f"{target}-{'x'.join(map(str, shape))}{'-weight' * weighted}{'-row_weight' * row_weighted}-{options}-{reduction}":
    (shape, target, weighted, row_weighted, OPTIONS[options], reduction)
    for shape, target, weighted, row_weighted, options, reduction in (
        ((11, CLASSES), "indices", False, False, "plain", "mean"),
        ((11, CLASSES), "indices", True, False, "plain", "mean"),
        ((11, CLASSES), "indices", True, True, "smoothing", "mean"),
        ((11, CLASSES), "indices", False, False, "smoothing", "sum"),
        ((3, CLASSES, 5), "indices", False, True, "z_loss", "none"),
        ((3, CLASSES, 5), "indices", True, False, "all", "none"),
        ((11, CLASSES), "indices", False, True, "softcap", "mean"),
        ((11, CLASSES), "probabilities", False, False, "plain", "mean"),
        ((3, CLASSES, 5), "probabilities", True, True, "all", "none"),
        ((11, CLASSES), "probabilities", True, False, "softcap", "sum"),
    )
}  # fmt: skip


def part(tensor, axis, ranks, rank):
    first = sum(PARTS[ranks][:rank])
    return tensor.narrow(axis, first, PARTS[ranks][rank]).clone()


def my_part(x, y, weight, ranks, rank):
    y = part(y, 1, ranks, rank) if y.is_floating_point() else y
    return part(x, 1, ranks, rank), y, None if weight is None else part(weight, 0, ranks, rank)


def check_value_and_gradient(rank, ranks, name, impl):
    shape, target, weighted, row_weighted, options, reduction = CASES[name]
    x, y, weight, row_weight = inputs(shape, target, weighted, row_weighted)
    if options.get("label_smoothing"):
        x = x.masked_fill(x == -math.inf, -20)  # smoothing gives every class a share: the loss is inf
    upstream = None
    if reduction == "none":
        positions = (shape[0], *shape[2:])
        upstream = torch.linspace(-1, 1, math.prod(positions), dtype=x.dtype).view(positions)
    x.requires_grad_()
    by_weight = None if row_weight is None else row_weight.clone().requires_grad_()
    expected = right(x, y, weight, by_weight, reduction, **options)
    grads = torch.autograd.grad(expected, [x] if by_weight is None else [x, by_weight], upstream)
    mine, target_part, weight_part = my_part(x.detach(), y, weight, ranks, rank)
    mine.requires_grad_()
    ours_weight = None if row_weight is None else row_weight.clone().requires_grad_()
    loss = tlk.cross_entropy(mine, target_part, weight_part, row_weight=ours_weight, reduction=reduction,
                             vocab_group=dist.group.WORLD, impl=impl, **options)  # fmt: skip
    ours = torch.autograd.grad(loss, [mine] if by_weight is None else [mine, ours_weight], upstream)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    expected_grad = part(grads[0], 1, ranks, rank)
    torch.testing.assert_close(ours[0], expected_grad, rtol=1e-10, atol=1e-12)
    if row_weight is not None:
        torch.testing.assert_close(ours[1], grads[1], rtol=1e-11, atol=1e-11)
    everyone = [torch.empty_like(loss) for _ in range(ranks)]
    dist.all_gather(everyone, loss.detach())
    assert all(torch.equal(each, loss) for each in everyone)


def check_statistics(rank, ranks, target, impl):
    shape = (11, CLASSES)
    x, y, weight, _ = inputs(shape, target, True, False)
    x[3] = x[3].round()  # several largest
    x[4, 4], x[4, 20] = 9.0, 9.0  # the target's is the first largest, but not the only one
    x[6, 15], x[6, 2] = 9.0, 9.0  # not the first
    x = x.masked_fill(x == -math.inf, -30).requires_grad_()
    whole = tlk.cross_entropy_stats(x, y, weight, label_smoothing=0.1, impl="reference")
    mine, target_part, weight_part = my_part(x.detach(), y, weight, ranks, rank)
    mine.requires_grad_()
    ours = tlk.cross_entropy_stats(
        mine, target_part, weight_part, label_smoothing=0.1, vocab_group=dist.group.WORLD, impl=impl
    )
    for name in ("loss", "lse", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=1e-11, atol=1e-11)
    assert torch.equal(ours.correct, whole.correct)
    if target == "indices":
        assert ours.correct[4] and not ours.correct[6] and not ours.correct[5]

    def total(output):
        slopes = torch.linspace(-1, 2, 11, dtype=torch.float64)
        return output.loss * 3 + (output.lse * slopes).sum() + (output.entropy * slopes.cos()).sum()

    (expected,) = torch.autograd.grad(total(whole), x)
    (gradient,) = torch.autograd.grad(total(ours), mine)
    torch.testing.assert_close(gradient, part(expected, 1, ranks, rank), rtol=1e-10, atol=1e-12)


FEATURES = 6


def linear_inputs():
    generator = harness.generator(5)
    features = torch.randn(3, 4, FEATURES, generator=generator, dtype=torch.float64)
    layer = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    _, y, weight, _ = inputs((12, CLASSES), "indices", True, False)
    row_weight = torch.rand(12, generator=generator, dtype=torch.float64)
    return features, layer, bias, y.view(3, 4), weight, row_weight.view(3, 4)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def check_linear(rank, ranks, impl, probabilities, stats):
    """The gradient of `input` is the sum over the ranks; those of the layer are of the rank's own classes."""
    features, layer, bias, y, weight, row_weight = linear_inputs()
    if probabilities:
        y = torch.randn(3, 4, CLASSES, generator=harness.generator(7), dtype=torch.float64).softmax(-1)
    options = {"label_smoothing": 0.1, "softcap": 5.0, "temperature": 1.3, "z_loss": 0.01}
    row_weight[0, 1] = row_weight[2, 2] = 0
    slopes = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)

    def total(output):
        return output.loss + (output.lse * slopes).sum() + (output.entropy * slopes.cos()).sum() if stats else output

    whole = leaves(features, layer, bias)
    if stats:
        expected = tlk.linear_cross_entropy_stats(
            whole[0], whole[1], y, linear_bias=whole[2], weight=weight, row_weight=row_weight, impl="reference",
            **options,
        )  # fmt: skip
    else:
        logits = torch.nn.functional.linear(*whole).view(12, CLASSES)
        flat = y.view(12, CLASSES) if probabilities else y.view(12)
        expected = right(logits, flat, weight, row_weight.view(12), "mean", **options)
    right_grads = torch.autograd.grad(total(expected), whole)
    y_part = part(y, 2, ranks, rank) if probabilities else y
    mine = leaves(features, part(layer, 0, ranks, rank), part(bias, 0, ranks, rank))
    mine[0].data[0, 1] = math.nan  # a row of weight 0
    function = tlk.linear_cross_entropy_stats if stats else tlk.linear_cross_entropy
    valid = {} if probabilities else {"num_valid": int((y != IGNORED).sum())}
    ours = function(
        mine[0], mine[1], y_part, linear_bias=mine[2], weight=part(weight, 0, ranks, rank), row_weight=row_weight,
        vocab_group=dist.group.WORLD, impl=impl, **valid, **options,
    )  # fmt: skip
    loss = ours.loss if stats else ours
    torch.testing.assert_close(loss, expected.loss if stats else expected, rtol=1e-11, atol=1e-11)
    if stats:
        assert torch.equal(ours.correct, expected.correct) and ours.correct.shape == (3, 4)
    everyone = [torch.empty_like(loss) for _ in range(ranks)]
    dist.all_gather(everyone, loss.detach())
    assert all(torch.equal(each, loss) for each in everyone)
    grads = torch.autograd.grad(total(ours), mine)
    for name, gradient, truth in zip(("input", "weight", "bias"), grads, right_grads, strict=True):
        truth = truth if name == "input" else part(truth, 0, ranks, rank)
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def check_linear_module(rank, ranks):
    features, layer, bias, y, _, _ = linear_inputs()
    module = tlk.LinearCrossEntropyLoss(FEATURES, PARTS[ranks][rank], bias=True, dtype=torch.float64,
                                        vocab_group=dist.group.WORLD)  # fmt: skip
    module.linear.weight.data, module.linear.bias.data = part(layer, 0, ranks, rank), part(bias, 0, ranks, rank)
    logits = torch.nn.functional.linear(features, layer, bias).view(12, CLASSES)
    expected = torch.nn.functional.cross_entropy(logits, y.view(12))
    torch.testing.assert_close(module(features, y), expected, rtol=1e-11, atol=1e-11)


def check_narrow_dtypes(rank, ranks, dtype, impl):
    """The error against float64 is at most twice that of PyTorch on the whole, plus a rounding."""
    x, y, _, _ = inputs((11, CLASSES), "indices", False, False, dtype)
    exact, whole = x.double().requires_grad_(), x.clone().requires_grad_()
    mine = part(x, 1, ranks, rank).requires_grad_()
    values = []
    for tensor, loss in (
        (exact, torch.nn.functional.cross_entropy(exact, y)), (whole, torch.nn.functional.cross_entropy(whole, y)),
        (mine, tlk.cross_entropy(mine, y, vocab_group=dist.group.WORLD, impl=impl)),
    ):  # fmt: skip
        loss.backward()
        gradient = tensor.grad.double()
        values.append((loss.double(), gradient if tensor is mine else part(gradient, 1, ranks, rank)))
    for truth, eager, ours in zip(*values, strict=True):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max() + rounding


def check_edges(rank, ranks, impl):
    x, y, _, _ = inputs((11, CLASSES), "indices", False, False)
    x[1] = -math.inf  # a whole row: NaN in it alone
    x[2, 8] = -math.inf  # the target's logit: inf
    mine = part(x, 1, ranks, rank).requires_grad_()
    loss = tlk.cross_entropy(mine, y, reduction="none", vocab_group=dist.group.WORLD, impl=impl)
    assert loss[1].isnan() and loss[2] == math.inf and loss[3:].isfinite().all() and loss[0].isfinite()
    (gradient,) = torch.autograd.grad(loss[3:].sum(), mine)
    assert gradient[3:].isfinite().all() and gradient[3:].any()
    ignored = torch.full_like(y, IGNORED)
    mean = tlk.cross_entropy(mine, ignored, vocab_group=dist.group.WORLD, impl=impl)
    (gradient,) = torch.autograd.grad(mean, mine)
    assert mean.isnan() and not gradient.any()


def check_errors(rank, ranks, impl):
    x = torch.randn(2, PARTS[ranks][rank])
    with pytest.raises(IndexError, match=r"[Tt]arget"):
        tlk.cross_entropy(x, torch.tensor([0, CLASSES]), vocab_group=dist.group.WORLD, impl=impl)
    with pytest.raises(IndexError, match=r"[Tt]arget"):
        tlk.cross_entropy(x, torch.tensor([0, -1]), vocab_group=dist.group.WORLD, impl=impl)
    with pytest.raises(
        TypeError, match="vocab_group: expected a torch.distributed.ProcessGroup or None, got str".replace(".", r"\.")
    ):
        tlk.cross_entropy(x, torch.tensor([0, 1]), vocab_group="world", impl=impl)
    x.requires_grad_()
    loss = tlk.cross_entropy(x, torch.tensor([0, 1]), vocab_group=dist.group.WORLD, impl=impl)
    with pytest.raises(RuntimeError, match=r"vocab_group|once_differentiable"):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.sum().backward()


def check_inplace(rank, ranks):
    x, y, _, _ = inputs((11, CLASSES), "indices", False, False)
    whole = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(whole, y).backward()
    leaf = part(x, 1, ranks, rank).requires_grad_()
    logits = leaf * 1
    loss = tlk.cross_entropy(logits, y, vocab_group=dist.group.WORLD, inplace_grad=True, impl="native")
    loss.backward()
    torch.testing.assert_close(leaf.grad, part(whole.grad, 1, ranks, rank), rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError):
        logits.sum()


def check_module(rank, ranks):
    x, y, weight, _ = inputs((11, CLASSES), "indices", True, False)
    mine, _, weight_part = my_part(x, y, weight, ranks, rank)
    module = tlk.CrossEntropyLoss(weight_part, vocab_group=dist.group.WORLD)
    expected = torch.nn.functional.cross_entropy(x, y, weight)
    torch.testing.assert_close(module(mine, y), expected, rtol=1e-11, atol=1e-11)


def all_checks():
    yield "inplace", check_inplace
    yield "module", check_module
    yield "linear-module", check_linear_module
    for impl in helpers.IMPLEMENTATIONS:
        for name in CASES:
            yield f"{name}-{impl}", partial(check_value_and_gradient, name=name, impl=impl)
        for target in ("indices", "probabilities"):
            yield f"statistics-{target}-{impl}", partial(check_statistics, target=target, impl=impl)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{dtype}-{impl}", partial(check_narrow_dtypes, dtype=dtype, impl=impl)
        for probabilities in (False, True):
            for stats in (False, True):
                words = f"{'probabilities' if probabilities else 'indices'}{'-stats' * stats}-{impl}"
                yield f"linear-{words}", partial(check_linear, impl=impl, probabilities=probabilities, stats=stats)
        yield f"edges-{impl}", partial(check_edges, impl=impl)
        yield f"errors-{impl}", partial(check_errors, impl=impl)


def process(rank, ranks, path, failures):
    """Run every check on one rank, and report the failures to the test."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    for name, check in all_checks():
        try:
            check(rank, ranks)
        except BaseException:
            failures.put((name, rank, traceback.format_exc()[-1500:]))  # the pipe's buffer is small
        dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (1, 4))])
def test_split_vocabulary(ranks, tmp_path):
    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (ranks, os.fspath(tmp_path / "store"), failures), nprocs=ranks)
    found = []
    while not failures.empty():
        found.append("\n".join(map(str, failures.get())))
    assert not found, f"{len(found)} failures:\n" + "\n\n".join(found[:4])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
