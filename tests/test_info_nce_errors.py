"""Bad input of InfoNCE, a target out of range, and the module."""

import harness
import helpers
import pytest
import torch
from info_nce_cases import pairs, pytorch, same

import tlkernels as tlk
from tlkernels.losses.info_nce import ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("info_nce")


@pytest.fixture
def checked(monkeypatch):
    """With it CUDA kernels check the targets too."""
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
    """Without the check the row is NaN and has gradient 0, and no memory out of range is accessed."""
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


X, Y = torch.randn(4, 5), torch.randn(4, 5)


ERRORS = [
    (TypeError, "query: expected a Tensor, got list", ([[1.0]], Y), {}),
    (TypeError, "query: expected float64, .* got torch.int64", (X.long(), Y), {}),
    (ValueError, r"query: expected shape \(N, D\), got \(5,\)", (X[0], Y), {}),
    (TypeError, "key: expected the dtype of query, torch.float32, got torch.float64", (X, Y.double()), {}),
    (ValueError, r"key: expected 5 features as in query, got shape \(4, 3\)", (X, Y[:, :3]), {}),
    (ValueError, "key: expected it on query's device cpu, got meta", (X, Y.to("meta")), {}),
    (ValueError, "temperature, logit_scale: expected at most one", (X, Y), {"temperature": 1.0, "logit_scale": 1.0}),
    (ValueError, "temperature: expected a number above 0, got 0", (X, Y), {"temperature": 0}),
    (ValueError, "temperature: expected a finite number, got nan", (X, Y), {"temperature": float("nan")}),
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
        """A zero gradient above the bound would never let the scale return."""
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
            for name in helpers.IMPLEMENTATIONS:
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
