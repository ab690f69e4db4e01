"""group=: every gradient, averaged over the ranks, is that of the whole batch on one process."""

import copy
import pickle
import sys
from functools import partial

import harness
import helpers
import pytest
import torch
import torch.distributed as dist
from ranks import failures_of
from torch.optim.swa_utils import AveragedModel

import tlkernels as tlk

RANKS, ROWS, D = 2, 5, 3
WHOLE = RANKS * ROWS


def inputs():
    """Return the whole batch: inputs of a linear encoder, whose weight is the parameter."""
    generator = harness.generator(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(WHOLE, 4), "y": normal(WHOLE, 4), "weight": normal(D, 4), "scale": torch.tensor(3.0).double(),
        "bias": torch.tensor(-1.0).double(), "shared": normal(RANKS * 2, 4), "each": normal(WHOLE, 2, 4),
        "target": torch.randint(0, WHOLE, (WHOLE,), generator=generator),
        "mask": torch.rand(WHOLE, WHOLE, generator=generator) < 0.4,
        "shared_mask": torch.rand(WHOLE, WHOLE + RANKS * 2, generator=generator) < 0.4,
        "each_mask": torch.rand(WHOLE, WHOLE + 2, generator=generator) < 0.4,
        "query_ids": torch.randint(0, 4, (WHOLE,), generator=generator),
        "key_ids": torch.randint(0, 4, (WHOLE,), generator=generator, dtype=torch.int32),
        "labels": torch.tensor([0, 1, 2, 3, 0, 4, 0, 1, 1, 5]),
    }  # fmt: skip


def encode(batch, name):
    return batch[name] @ batch["weight"].T


def info_nce(batch, *, negatives=None, mask=None, target=False, **options):
    if negatives:
        options["negatives"] = encode(batch, negatives)
    if mask:
        options["mask"] = (batch["query_ids"], batch["key_ids"]) if mask == "ids" else batch[mask]
    target = batch["target"] if target else None
    return tlk.info_nce(encode(batch, "x"), encode(batch, "y"), target, logit_scale=batch["scale"], **options)


def info_nce_more_keys(batch, **options):
    """Each rank has more keys than queries; by default a query's positive is its rank's own key of its number."""
    ranks = len(batch["y"]) // ROWS
    shares = zip(encode(batch, "y").chunk(ranks), encode(batch, "shared").chunk(ranks), strict=True)
    keys = [torch.cat(share) for share in shares]
    target = None if "group" in options else torch.cat([torch.arange(ROWS) + r * len(keys[0]) for r in range(ranks)])
    return tlk.info_nce(encode(batch, "x"), torch.cat(keys), target, logit_scale=batch["scale"], **options)


def nt_xent(batch, **options):
    return tlk.nt_xent(encode(batch, "x"), encode(batch, "y"), logit_scale=batch["scale"], **options)


def sup_con(batch, **options):
    return tlk.sup_con(encode(batch, "x"), batch["labels"], logit_scale=batch["scale"], **options)


def sup_con_views(batch, **options):
    """Two views of each sample; on one process the ranks' samples follow one another."""
    views = torch.stack([encode(batch, "x"), encode(batch, "y")], 1)
    return tlk.sup_con(views, batch["labels"], logit_scale=batch["scale"], **options)


def sigmoid(batch, **options):
    scale, bias = batch["scale"], batch["bias"]
    return tlk.sigmoid_contrastive(
        encode(batch, "x"), encode(batch, "y"), logit_scale=scale, logit_bias=bias, **options
    )


CASES = {
    "info_nce": info_nce,
    "info_nce-symmetric": partial(info_nce, symmetric=True, normalize=True),
    "info_nce-symmetric-bool": partial(info_nce, symmetric=True, mask="mask", label_smoothing=0.1),
    "info_nce-symmetric-ids": partial(info_nce, symmetric=True, mask="ids", reduction="sum", negatives="shared"),
    "info_nce-target-bool": partial(info_nce, target=True, mask="mask", negatives="each"),
    "info_nce-symmetric-wide": partial(info_nce, symmetric=True, mask="shared_mask", negatives="shared"),
    "info_nce-target-wide": partial(info_nce, target=True, mask="each_mask", negatives="each"),
    "info_nce-none": partial(info_nce, symmetric=True, reduction="none"),
    "info_nce-more_keys": info_nce_more_keys,
    "nt_xent": nt_xent,
    "nt_xent-sum": partial(nt_xent, reduction="sum", normalize=False),
    "sup_con": sup_con,
    "sup_con-sum": partial(sup_con, reduction="sum"),
    "sup_con-views": sup_con_views,
    "sup_con-views-none": partial(sup_con_views, reduction="none"),
    "sigmoid_contrastive": sigmoid,
}
PARAMETERS = ("weight", "scale", "bias")


def leaves(batch):
    return {k: v.clone().requires_grad_() if k in PARAMETERS else v for k, v in batch.items()}


def share(batch, rank):
    """Return the part of the batch that one rank has; parameters are whole."""

    def part(name, value):
        if name in PARAMETERS:
            return value
        size = value.shape[0] // RANKS
        return value[rank * size : (rank + 1) * size]

    return {name: part(name, value) for name, value in batch.items()}


def derivatives(loss, batch):
    """Return the loss and its gradients with respect to the parameters."""
    parameters = [batch[name] for name in PARAMETERS]
    total = loss.mean() if loss.dim() else loss
    grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [total.detach(), *(torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True))]


def average(tensor, group):
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor / RANKS


def check_gradients(rank, group, name, impl):
    right_batch = leaves(inputs())
    right = derivatives(CASES[name](right_batch, impl=impl), right_batch)
    batch = leaves(share(inputs(), rank))
    ours = derivatives(CASES[name](batch, group=group, impl=impl), batch)
    for what, mine, expected in zip(("loss", *PARAMETERS), ours, right, strict=True):
        difference = (average(mine, group) - expected).abs().max()
        assert difference < 1e-10, f"{what}: off by {difference:.3g}"


def check_double_backward(rank, group, impl):
    """The derivative of a function of the gradient, averaged over the ranks, is that of the whole batch."""

    def second(loss, batch, square):
        (grad,) = torch.autograd.grad(loss, batch["weight"], create_graph=True)
        return torch.autograd.grad(square(grad), batch["weight"])[0]

    whole = leaves(inputs())
    direction = torch.arange(12.0).view(3, 4).double().cos()
    right = second(info_nce(whole, symmetric=True, impl=impl), whole, lambda g: (g * direction).sum())
    batch = leaves(share(inputs(), rank))
    ours = second(info_nce(batch, symmetric=True, group=group, impl=impl), batch, lambda g: (g * direction).sum())
    torch.testing.assert_close(average(ours, group), right, rtol=1e-10, atol=1e-12)


def check_unequal(rank, group, impl):
    x = torch.randn(3 + rank, 4)
    labels = torch.zeros(3 + rank, dtype=torch.long)
    for loss in (
        lambda: tlk.info_nce(x, x, group=group, impl=impl), lambda: tlk.nt_xent(x, x, group=group, impl=impl),
        lambda: tlk.sup_con(x, labels, group=group, impl=impl),
        lambda: tlk.sigmoid_contrastive(x, x, logit_scale=1.0, logit_bias=0.0, group=group, impl=impl),
        lambda: tlk.info_nce(x[:3], x[:3], negatives=x if rank else None, group=group, impl=impl),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="group: expected the same shapes on every rank"):
            loss()


def check_explain(rank, group, impl):
    """Nothing is communicated, so a single rank may ask."""
    if rank == 0:
        x = torch.randn(3, 4)
        assert f"served by {impl}" in tlk.explain(tlk.info_nce, x, x, group=group, impl=impl)


def check_distributed_data_parallel(rank, group, impl):
    """The gradient is the whole batch's; open_clip's ClipLoss gave half of it by default."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, D)
    batch = {k: v.float() for k, v in inputs().items() if k in ("x", "y")}
    right = torch.autograd.grad(tlk.info_nce(model(batch["x"]), model(batch["y"]), symmetric=True), model.weight)[0]
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    mine = {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in batch.items()}
    features = parallel(torch.cat([mine["x"], mine["y"]]))
    tlk.info_nce(features[:ROWS], features[ROWS:], symmetric=True, group=group, impl=impl).backward()
    ratio = (model.weight.grad * right).sum() / right.square().sum()
    assert abs(float(ratio) - 1) < 1e-5
    torch.testing.assert_close(model.weight.grad, right, rtol=1e-4, atol=1e-6)


def check_module_copies(rank, group, name, group_of):
    """Deep copies share the group; a pickle finds it by its ranks, or by its name if several groups have them."""
    first, second = dist.new_group([1, 0]), dist.new_group([0, 1])
    group = {"world": group, "first": first, "second": second}[group_of]
    batch = share(inputs(), rank)
    tensors = encode(batch, "x"), batch["labels"] if name == "SupConLoss" else encode(batch, "y")
    module = getattr(tlk, name)(logit_scale=3.0, group=group, **({"logit_bias": -1.0} if "Sigmoid" in name else {}))
    expected = module(*tensors)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), AveragedModel(module).module):
        assert made.group is group
        torch.testing.assert_close(made(*tensors), expected, rtol=0, atol=0)
    alone = getattr(tlk, name)(logit_scale=3.0, **({"logit_bias": -1.0} if "Sigmoid" in name else {}))
    assert not torch.allclose(alone(*tensors), expected)


def check_pickle_of_another_rank(rank, group):
    """Rank 1 can load rank 0's module, whose group it is not in, but not call it."""
    groups = [dist.new_group([r]) for r in range(RANKS)]
    pickled = [pickle.dumps(tlk.NTXentLoss(group=groups[rank]))]
    dist.broadcast_object_list(pickled, src=0)
    module, x = pickle.loads(pickled[0]), torch.randn(3, 4)
    if rank == 0:
        assert module(x, x).isfinite() and module.group is groups[0]
    else:
        with pytest.raises(ValueError, match=r"group: expected a group of ranks \[0\]"):
            module(x, x)


def all_checks():
    for name in ("InfoNCELoss", "NTXentLoss", "SupConLoss", "SigmoidContrastiveLoss"):
        for group_of in ("world", "first", "second"):
            yield f"{name}-copies-{group_of}", partial(check_module_copies, name=name, group_of=group_of)
    yield "pickle-of-another-rank", check_pickle_of_another_rank
    for impl in helpers.IMPLEMENTATIONS:
        for name in CASES:
            yield f"{name}-{impl}", partial(check_gradients, name=name, impl=impl)
        for check in (check_double_backward, check_unequal, check_explain, check_distributed_data_parallel):
            yield f"{check.__name__.removeprefix('check_')}-{impl}", partial(check, impl=impl)


def in_the_world(rank, check):
    check(rank, dist.group.WORLD)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    if sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    checks = {name: (in_the_world, check) for name, check in all_checks()}
    return failures_of(checks, RANKS, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", [name for name, _ in all_checks()])
def test_two_processes(failures, name):
    assert not failures.get(name), "\n".join(failures[name])
