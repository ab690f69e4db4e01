"""What is particular to InfoNCE: edge cases, errors, accuracy at large scales, memory, the module."""

import math
import subprocess
import sys

import harness
import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import CASES, pytorch

import tlkernels as tlk
from tlkernels.losses.info_nce import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN, INF = math.nan, math.inf


@pytest.fixture(params=harness.targets(loss="info_nce"), ids=str)
def impl(request):
    with harness.forced(request.param) as name:
        yield name


def both(impl, tensors, upstream=None, **options):
    """Loss and gradients, ours and PyTorch's in float64."""

    def run(loss, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]

    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    ours = run(lambda *t: tlk.info_nce(*t, impl=impl, **options), tensors)
    return ours, run(lambda *t: pytorch(*t, **wide), [t.double() for t in tensors])


def same(ours, right, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, equal_nan=True)


def pairs(n, d, k=None):
    query = F.normalize(torch.randn(n, d), dim=1)
    return query, F.normalize(torch.randn(k or n, d), dim=1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_rows(impl, symmetric, reduction):
    """NaN mean and no gradient, as F.cross_entropy."""
    query, key = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    loss = tlk.info_nce(query, key, symmetric=symmetric, reduction=reduction, impl=impl)
    torch.testing.assert_close(
        loss, F.cross_entropy(torch.zeros(0, 0), torch.arange(0), reduction=reduction), equal_nan=True
    )
    if reduction != "none":
        loss.backward()
        assert query.grad.shape == (0, 4)


def test_one_row(impl):
    ours, right = both(impl, pairs(1, 5), symmetric=True)
    assert ours[0] == 0
    assert not ours[1].any()
    same(ours, right)
    same(*both(impl, pairs(1, 1, 4), temperature=0.1, label_smoothing=0.2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_other_key_masked(impl, symmetric):
    """The positive is left, so the loss and its gradient are 0, not NaN."""
    query, key = pairs(6, 4)
    for mask in (torch.ones(6, 6, dtype=torch.bool), (torch.zeros(6, dtype=torch.long),) * 2):
        ours, _ = both(impl, (query, key), mask=mask, symmetric=symmetric, label_smoothing=0.1)
        assert ours[0] == 0
        assert not any(grad.any() for grad in ours[1:])


def test_mask_covers_keys_not_negatives(impl):
    query, key = pairs(5, 4)
    negatives = torch.randn(3, 4)
    ours, right = both(impl, (query, key), mask=torch.ones(5, 5, dtype=torch.bool), negatives=negatives)
    assert (ours[0] > 0).all()
    same(ours, right)


@pytest.mark.parametrize("own", [False, True])
def test_mask_of_all_columns_is_that_of_fewer_negatives(impl, own):
    """Whole columns out are as if they were not there, wherever they are."""
    query, key = pairs(5, 4)
    negatives = torch.randn(5, 6, 4) if own else torch.randn(6, 4)
    mask = torch.zeros(5, 11, dtype=torch.bool)
    mask[:, [5, 8, 10]] = True
    kept = negatives[..., [1, 2, 4], :].double()
    for view in (mask, mask.T.contiguous().T):
        ours, _ = both(impl, (query, key), negatives=negatives, mask=view, label_smoothing=0.1, symmetric=not own)
        tensors = [t.double().requires_grad_() for t in (query, key)]
        right = pytorch(*tensors, negatives=kept, label_smoothing=0.1, symmetric=not own)
        same(ours, [right.detach(), *torch.autograd.grad(right, tensors)])


@pytest.mark.parametrize("wide", [False, True])
def test_target_among_negatives(impl, wide):
    """Where its own entry is masked too."""
    query, key = pairs(4, 6)
    mask = torch.arange(7).expand(4, 7) > 2 if wide else None
    for negatives in (torch.randn(3, 6), torch.randn(4, 3, 6)):
        options = {"target": torch.tensor([0, 6, 4, 2]), "negatives": negatives, "mask": mask, "label_smoothing": 0.1}
        same(*both(impl, (query, key), **options))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_are_as_in_pytorch(impl, value):
    query, key = pairs(6, 3)
    query[2, 1] = value
    ours, right = both(impl, (query, key), reduction="none", upstream=torch.ones(6))
    torch.testing.assert_close(ours[0].double(), right[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    for a, b in zip(ours[1:], right[1:], strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("scale", [100.0, 1e4, -3.0, 0.0, 1e-30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales(impl, scale, symmetric):
    """Logits of 1e4 do not overflow; 0 and negative scales are numbers like others."""
    query, key = pairs(40, 8)
    key = F.normalize(query + key, dim=1)
    scale = torch.tensor(scale)
    mask = torch.eye(40).roll(1, 0) > 0
    budgets = [harness.Budget(torch.float32) for _ in range(4)]

    def run(loss, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, scale)]
        value = loss(leaves[0], leaves[1], logit_scale=leaves[2], symmetric=symmetric, mask=mask)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    ours = run(lambda *t, **o: tlk.info_nce(*t, impl=impl, **o), torch.float32)
    for budget, *values in zip(budgets, ours, run(pytorch, torch.float32), run(pytorch, torch.float64), strict=True):
        budget.add(*values)
    for name, budget in zip(("loss", "query", "key", "scale"), budgets, strict=True):
        budget.check(name)


def test_sure_rows_keep_their_small_gradient(impl):
    """Where the positive is far ahead, 1 - p in float32 would be 0."""
    query = torch.eye(4) * 5
    ours, right = both(impl, (query, query.clone()), symmetric=True)
    assert right[0] < 1e-9
    if impl == "native":  # PyTorch's log_softmax, and so the reference, gives 0
        same(ours, right, rtol=1e-5, atol=0)


def test_duplicates(impl):
    query, _ = pairs(5, 4)
    query = query[[0, 0, 1, 1, 1]]
    same(*both(impl, (query, query.clone()), symmetric=True, temperature=0.1))
    ids = torch.tensor([0, 0, 1, 1, 1])
    ours, right = both(impl, (query, query.clone()), symmetric=True, temperature=0.1, mask=(ids, ids))
    same(ours, right)


@pytest.fixture
def checked(monkeypatch):
    """CUDA kernels look at the targets only then."""
    monkeypatch.setenv("TLKERNELS_CHECK", "1")


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("bad", [6, -1, -100, 2**40])
def test_target_out_of_range(impl, bad):
    query, key = pairs(3, 4, 6)
    for reduction in ("mean", "none"):
        for wants in (False, True):
            query.requires_grad_(wants)
            with pytest.raises(IndexError, match=r"target: expected indices of keys in \[0, 6\), got .* position 1"):
                tlk.info_nce(query, key, torch.tensor([0, bad, 1]), reduction=reduction, impl=impl)


ON_GPU = [t for t in harness.targets(loss="info_nce") if t.isa in (harness.CUDA_HOST, "cuda") or t.impl == "triton"]


@pytest.mark.parametrize("target", ON_GPU, ids=str)
def test_target_out_of_range_on_a_gpu_gives_nan(target, monkeypatch):
    """Where the host does not look: NaN in that row, a gradient of 0 from it, and no memory out of range."""
    monkeypatch.delenv("TLKERNELS_CHECK", raising=False)
    used = ops.NATIVE if target.impl == "native" else ops.TRITON
    query, key = pairs(4, 5, 6)
    columns = torch.tensor([1, 2**40 + 1, -100, 5])
    call = query, key, None, torch.tensor(2.0), columns, *(None,) * 3, -1, False, False, False, 0.1
    with harness.forced(target):
        loss, state = used.forward(*call)
        by_query, by_key, _, by_scale = used.backward(torch.ones_like(loss), state, *call, [True] * 4)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert by_query.any(1).tolist() == [True, False, False, True]
    valid = [query[[0, 3]], key, torch.tensor(2.0)]
    leaves = [t.double().cpu().requires_grad_() for t in valid]
    right = pytorch(leaves[0], leaves[1], columns[[0, 3]].cpu(), logit_scale=leaves[2], label_smoothing=0.1,
                    reduction="sum")  # fmt: skip
    same([by_query[[0, 3]].cpu(), by_key.cpu(), by_scale.cpu()], torch.autograd.grad(right, leaves))


@pytest.mark.usefixtures("checked")
def test_more_queries_than_keys_by_default_target(impl):
    with pytest.raises(IndexError, match="target"):
        tlk.info_nce(*pairs(5, 4, 3), impl=impl)


def test_strides(impl):
    query, key = pairs(7, 6)
    expected = both(impl, (query, key))[1]
    for layout in ("transposed", "sliced"):
        leaves = [harness.lay_out(t, layout).requires_grad_() for t in (query, key)]
        loss = tlk.info_nce(*leaves, impl=impl)
        same([loss.detach(), *torch.autograd.grad(loss, leaves)], expected)
    mask = torch.rand(7, 7) < 0.3
    for view in (mask.T.contiguous().T, mask[:1].expand(7, 7)):
        same(*both(impl, (query, key), mask=view))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [13, 16])
def test_narrow_rows_of_any_alignment(impl, dtype, features):
    """Tensor cores want chunks of 16 bytes: what is not so gives what its copy gives."""
    query, key = (t.to(dtype) for t in pairs(9, features))

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = tlk.info_nce(*leaves, temperature=0.1, symmetric=True, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = run(query, key)
    views = [[harness.lay_out(t, layout) for t in (query, key)] for layout in ("transposed", "sliced")]
    views.append([torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (query, key)])
    for tensors in views:
        torch.testing.assert_close(run(*tensors), expected)


def test_no_negatives_and_no_keys(impl):
    """Sizes of 0 beside others."""
    query, key = pairs(4, 3)
    same(*both(impl, (query, key), negatives=torch.randn(0, 3)))
    same(*both(impl, (query, key), negatives=torch.randn(4, 0, 3)))
    same(*both(impl, (query, key[:0]), target=torch.tensor([0, 1, 1, 0]), negatives=torch.randn(2, 3)))


def test_zero_rows_normalized(impl):
    """F.normalize's floor under the norm."""
    query, key = pairs(5, 4)
    query[1] = 0
    query[2] *= 1e-20
    ours, right = both(impl, (query, key), normalize=True)
    same(ours[:1], right[:1])
    for row in range(5):
        same([ours[1][row]], [right[1][row]], rtol=1e-4, atol=1e-6 * float(right[1][row].abs().max()))


def test_autocast_gives_float32(impl):
    query, key = (t.bfloat16() for t in pairs(8, 4))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        loss = tlk.info_nce(query, key.float(), temperature=0.1, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), pytorch(query.double(), key.double(), temperature=0.1), rtol=1e-6, atol=0)


def test_loss_scale_in_half_precision(impl):
    """A gradient below the smallest float16 before the loss scale is not lost."""
    query, key = (t.half() for t in pairs(512, 16))
    upstream = torch.tensor(2.0**15).half()
    leaf = query.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tlk.info_nce(leaf, key, impl=impl), leaf, upstream)
    wide = query.double().requires_grad_()
    (right,) = torch.autograd.grad(pytorch(wide, key.double()), wide, upstream.double())
    torch.testing.assert_close(grad.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wants", ["query", "key", "negatives", "logit_scale"])
def test_only_one_gradient(impl, wants):
    tensors = dict(zip(("query", "key"), pairs(6, 4), strict=True), negatives=torch.randn(3, 4),
                   logit_scale=torch.tensor(3.0))  # fmt: skip
    tensors[wants].requires_grad_()
    tlk.info_nce(**tensors, impl=impl).backward()
    right = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    pytorch(**right).backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name != wants)
    torch.testing.assert_close(tensors[wants].grad.double(), right[wants].grad, rtol=1e-5, atol=1e-6)


def test_same_bits_run_after_run(impl):
    query, key = pairs(700, 30)
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (query, key)]
        loss = tlk.info_nce(*leaves, temperature=0.07, symmetric=True, impl=impl)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


SCALED = [case for case in CASES if "-symmetric=" in case.id and case.dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", SCALED, ids=lambda case: case.id)
def test_gradient_of_the_scale(impl, case):
    """Over many draws: of a single number, a few may all be lucky for eager."""
    budget = harness.Budget(case.dtype)
    for seed in range(12):
        arguments = case.make(seed)

        def gradient(loss, arguments=arguments):
            scale = torch.tensor(16.0, dtype=arguments["query"].dtype, requires_grad=True)
            value = loss(**{**arguments, "temperature": None, "logit_scale": scale})
            return torch.autograd.grad(value, scale)[0]

        ours = gradient(lambda **kwargs: tlk.info_nce(**kwargs, impl=impl))
        budget.add(ours, gradient(pytorch), gradient(pytorch, harness.widened(arguments)))
    budget.check(case.id)


X, Y = torch.randn(4, 5), torch.randn(4, 5)
ERRORS = [
    (TypeError, "query: expected a Tensor, got list", ([[1.0]], Y), {}),
    (TypeError, "query: expected float64, .* got torch.int64", (X.long(), Y), {}),
    (ValueError, r"query: expected shape \(N, D\), got \(5,\)", (X[0], Y), {}),
    (TypeError, "key: expected the dtype of query, torch.float32, got torch.float64", (X, Y.double()), {}),
    (ValueError, r"key: expected 5 features as query has, got shape \(4, 3\)", (X, Y[:, :3]), {}),
    (ValueError, "key: expected it on query's device cpu, got meta", (X, Y.to("meta")), {}),
    (ValueError, "temperature, logit_scale: expected at most one", (X, Y), {"temperature": 1.0, "logit_scale": 1.0}),
    (ValueError, "temperature: expected a number above 0, got 0", (X, Y), {"temperature": 0}),
    (ValueError, "temperature: expected a finite number, got nan", (X, Y), {"temperature": NAN}),
    (TypeError, "logit_scale: expected a number or a 0-d tensor, got str", (X, Y), {"logit_scale": "1"}),
    (ValueError, r"logit_scale: .* got shape \(2,\)", (X, Y), {"logit_scale": torch.ones(2)}),
    (TypeError, "logit_scale: .* got torch.int64", (X, Y), {"logit_scale": torch.tensor(1)}),
    (ValueError, r"negatives: expected shape \(M, D\) or \(N, M, D\), got \(5,\)", (X, Y), {"negatives": Y[0]}),
    (ValueError, r"negatives: .* N = 4 queries, got \(3, 2, 5\)", (X, Y), {"negatives": torch.randn(3, 2, 5)}),
    (ValueError, r"target: expected shape \(4,\), got \(3,\)", (X, Y, torch.arange(3)), {}),
    (TypeError, "target: expected an integer dtype, got torch.float32", (X, Y, torch.rand(4)), {}),
    (TypeError, "mask: expected bool, .* got torch.int64", (X, Y), {"mask": torch.zeros(4, 4).long()}),
    (ValueError, r"mask: expected shape \(4, 4\), got \(4, 3\)", (X, Y), {"mask": torch.zeros(4, 3) > 0}),
    (ValueError, r"mask: expected shape \(4, 4\) or \(4, 6\), got \(4, 5\)", (X, Y),
     {"mask": torch.zeros(4, 5) > 0, "negatives": Y[:2]}),
    (ValueError, r"mask\[1\]: expected shape \(4,\), got \(3,\)", (X, Y),
     {"mask": (torch.arange(4), torch.arange(3))}),
    (ValueError, r"mask: .* tuple of 1", (X, Y), {"mask": (torch.arange(4),)}),
    (TypeError, "mask: expected a bool tensor or .* got str", (X, Y), {"mask": "no"}),
    (ValueError, "symmetric: .* got 4 queries and 3 keys", (X, Y[:3]), {"symmetric": True}),
    (ValueError, "symmetric: .* got a target", (X, Y, torch.arange(4)), {"symmetric": True}),
    (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 2", (X, Y), {"label_smoothing": 2}),
    (TypeError, "label_smoothing: expected a number, got str", (X, Y), {"label_smoothing": "0"}),
    (ValueError, "reduction: expected one of .* got 'all'", (X, Y), {"reduction": "all"}),
    (TypeError, "group: expected a torch.distributed.ProcessGroup or None, got int", (X, Y), {"group": 1}),
    (ValueError, "impl: expected 'auto' or one of", (X, Y), {"impl": "cuda"}),
    (NotImplementedError, "triton: supports|triton is not", (X.to("meta"), Y.to("meta")), {"impl": "triton"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"), ERRORS, ids=[f"{e[0].__name__}-{e[1][:30]}" for e in ERRORS]
)
def test_bad_arguments(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        tlk.info_nce(*args, **kwargs)


@pytest.mark.usefixtures("needs_native")
def test_transforms_take_the_reference():
    query, key = (t.double() for t in pairs(4, 3))
    with pytest.raises(NotImplementedError, match=r"native: torch\.func transforms"):
        torch.func.grad(lambda q: tlk.info_nce(q, key, impl="native"))(query)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        tlk.info_nce(torch.autograd.forward_ad.make_dual(query, query), key, impl="native")
    assert "served by native" in tlk.explain(tlk.info_nce, query, key)
    right = torch.func.hessian(lambda q: pytorch(q, key, symmetric=True))(query)
    torch.testing.assert_close(torch.func.hessian(lambda q: tlk.info_nce(q, key, symmetric=True))(query), right)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(impl, reduction):
    """create_graph=True silently partial (Liger, CCE, QuACK, flash-attn)."""
    tensors = [t.double() for t in pairs(5, 3)] + [torch.tensor(3.0).double()]
    results = []
    for loss in (lambda *t, **o: tlk.info_nce(*t, impl=impl, **o), pytorch):
        q, k, s = (t.clone().requires_grad_() for t in tensors)
        value = loss(q, k, logit_scale=s, symmetric=True, normalize=True, reduction=reduction)
        grads = torch.autograd.grad(value.square().sum(), (q, k, s), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, s)))
    torch.testing.assert_close(*results)


class TestModule:
    def test_learnable_scale(self):
        query, key = pairs(6, 4)
        loss = tlk.InfoNCELoss(learnable=True, symmetric=True)
        assert [name for name, _ in loss.named_parameters()] == ["log_logit_scale"]
        assert loss.log_logit_scale.exp().item() == pytest.approx(1 / 0.07)
        value = loss(query, key)
        value.backward()
        torch.testing.assert_close(value, tlk.info_nce(query, key, temperature=0.07, symmetric=True))
        assert loss.log_logit_scale.grad is not None
        assert "learnable=True" in repr(loss)

    def test_scale_is_bounded_and_comes_back(self):
        """A gradient that vanishes above the bound would keep the scale there for ever."""
        query, key = pairs(6, 4)
        loss = tlk.InfoNCELoss(learnable=True, max_scale=50.0)
        with torch.no_grad():
            loss.log_logit_scale.fill_(9.0)
        loss(query, key).backward()
        assert loss.log_logit_scale.exp().item() == pytest.approx(50.0)
        assert loss.log_logit_scale.grad.abs() > 0

    def test_no_parameter_without_it(self):
        assert not list(tlk.InfoNCELoss(temperature=0.1).parameters())
        with pytest.raises(ValueError, match="learnable: expected neither"):
            tlk.InfoNCELoss(learnable=True, temperature=0.1)
        with pytest.raises(ValueError, match="init_temperature: expected"):
            tlk.InfoNCELoss(learnable=True, init_temperature=0.0)
        with pytest.raises(ValueError, match="max_scale: expected"):
            tlk.InfoNCELoss(learnable=True, max_scale=-1.0)

    def test_every_option_reaches_the_function(self):
        query, key = torch.randn(6, 4), torch.randn(6, 4)
        plain = tlk.InfoNCELoss()(query, key)
        for option in ({"temperature": 2.0}, {"logit_scale": 2.0}, {"symmetric": True}, {"normalize": True},
                       {"label_smoothing": 0.3}, {"reduction": "sum"}):  # fmt: skip
            for name in sorted({target.impl for target in harness.targets()}):
                assert not torch.allclose(tlk.InfoNCELoss(**option, impl=name)(query, key), plain)
        for option in ({"negatives": torch.randn(2, 4)}, {"mask": torch.rand(6, 6) < 0.5},
                       {"target": torch.tensor([1, 0, 3, 2, 5, 4])}):  # fmt: skip
            assert not torch.allclose(tlk.InfoNCELoss()(query, key, **option), plain)

    def test_compile(self):
        torch._dynamo.reset()
        loss = tlk.InfoNCELoss(learnable=True, symmetric=True, normalize=True)
        query, key = (t.requires_grad_() for t in pairs(6, 4))
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(query, key)
        torch.testing.assert_close(value, loss(query, key))
        torch.testing.assert_close(torch.autograd.grad(value, query), torch.autograd.grad(loss(query, key), query))


MEMORY = """
import sys, torch, tlkernels as tlk
name, n, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def run(n, d):
    x, y = (torch.randn(n, d).requires_grad_() for _ in range(2))
    ids = torch.arange(n) // 2
    loss = {
        "info_nce": lambda: tlk.info_nce(x, y, temperature=0.07, symmetric=True, normalize=True, mask=(ids, ids)),
        "none": lambda: tlk.info_nce(x, y, temperature=0.07, symmetric=True, reduction="none").sum(),
        "nt_xent": lambda: tlk.nt_xent(x[: n // 2], x[n // 2 :], temperature=0.07),
        "sup_con": lambda: tlk.sup_con(x, ids, temperature=0.07),
        "sigmoid_contrastive": lambda: tlk.sigmoid_contrastive(x, y, logit_scale=10.0, logit_bias=-10.0),
    }[name]()
    loss.backward()

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

run(600, 8)  # what a first call loads
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
run(n, d)
print(status("VmHWM") - before, status("VmHWM"))
"""


def peak_memory(name, n, d):
    command = [sys.executable, "-c", MEMORY, name, str(n), str(d)]
    above, whole = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(above), int(whole)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("name", [
    "info_nce", "sigmoid_contrastive",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("none", "nt_xent", "sup_con")),
])  # fmt: skip
def test_no_matrix_of_similarities(name):
    """6144 x 6144 floats are 151 MB, as bytes 38 MB; embeddings, gradients, statistics and a tile are under 16 MB."""
    above, _ = peak_memory(name, 6144, 16)
    assert above < 16e6


@pytest.mark.full
@pytest.mark.usefixtures("needs_native")
def test_65536_rows_within_one_and_a_half_gigabytes():
    _, whole = peak_memory("info_nce", 65536, 384)
    assert whole < 1.5e9
