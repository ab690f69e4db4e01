"""Bad input of distillation raises before any work; and the module."""

import helpers
import pytest
import torch

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("distillation")
S, T, Y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


ERRORS = [
    (TypeError, "student_logits: expected a Tensor, got list", ([[1.0]], T), {}),
    (TypeError, "teacher_logits: expected float64, .* got torch.int64", (S, Y), {}),
    (ValueError, r"student_logits: expected shape \(..., C\) .* got \(\)", (S[0, 0], T[0, 0]), {}),
    (ValueError, r"student_logits: .* C above 0, got \(4, 0\)", (S[:, :0], T[:, :0]), {}),
    (ValueError, r"teacher_logits: .* student_logits \(4, 5\), got \(4, 3\)", (S, T[:, :3]), {}),
    (ValueError, "teacher_logits: .* device cpu, got meta", (S, T.to("meta")), {}),
    (TypeError, "target: expected a Tensor or None, got list", (S, T, [1]), {}),
    (TypeError, "target: expected class indices of an integer dtype, got torch.float32", (S, T, T), {}),
    (ValueError, r"target: expected class indices of shape \(4,\), got \(3,\)", (S, T, Y[:3]), {}),
    (ValueError, "target: expected class indices, since hard_weight is 0.5, got None", (S, T), {"hard_weight": 0.5}),
    (TypeError, "row_weight: expected a Tensor, got list", (S, T), {"row_weight": [1.0]}),
    (TypeError, "row_weight: expected float64, .* got torch.int64", (S, T), {"row_weight": Y}),
    (ValueError, r"row_weight: expected shape \(4,\), .* got \(1,\)", (S, T), {"row_weight": torch.ones(1)}),
    (ValueError, "temperature: expected a finite number above 0, got 0", (S, T), {"temperature": 0}),
    (TypeError, "temperature: expected a number, got str", (S, T), {"temperature": "2"}),
    (ValueError, "divergence: expected one of .* got 'kl'", (S, T), {"divergence": "kl"}),
    (ValueError, "beta: expected a number between 0 and 1, .* got 1.0", (S, T), {"beta": 1.0}),
    (ValueError, r"hard_weight: expected a number in \[0, 1\], got -0.1", (S, T, Y), {"hard_weight": -0.1}),
    (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 2", (S, T, Y), {"label_smoothing": 2}),
    (TypeError, "softcap: expected a number, got str", (S, T), {"softcap": "30"}),
    (TypeError, "softcap: expected a number, got bool", (S, T), {"softcap": True}),
    (ValueError, "softcap: expected None or a finite number above 0, got 0", (S, T), {"softcap": 0}),
    (ValueError, "softcap: expected None or a finite number above 0, got -1", (S, T), {"softcap": -1.0}),
    (ValueError, "softcap: expected None or a finite number above 0, got inf", (S, T), {"softcap": float("inf")}),
    (ValueError, "softcap: expected None or a finite number above 0, got nan", (S, T), {"softcap": float("nan")}),
    (ValueError, "softcap: expected one number or a pair .* got 3 values", (S, T), {"softcap": (1.0, 2.0, 3.0)}),
    (ValueError, "softcap: expected one number or a pair .* got 0 values", (S, T), {"softcap": []}),
    (TypeError, r"softcap\[1\]: expected a number, got str", (S, T), {"softcap": (1.0, "2")}),
    (ValueError, r"softcap\[0\]: expected None or a finite number above 0, got 0", (S, T), {"softcap": (0, None)}),
    (TypeError, "ignore_index: expected an int, got float", (S, T), {"ignore_index": 1.0}),
    (ValueError, "reduction: expected one of .* got 'median'", (S, T), {"reduction": "median"}),
    (ValueError, "impl: expected 'auto' or one of .* got 'cuda'", (S, T), {"impl": "cuda"}),
    (NotImplementedError, "triton", (S.to("meta"), T.to("meta")), {"impl": "triton"}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), ERRORS, ids=[e[1][:30] for e in ERRORS])
def test_bad_arguments(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        tlk.distillation(*args, **kwargs)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_index_out_of_range(impl, bad, hard_weight, reduction, monkeypatch):
    target = Y.clone()
    target[2] = bad
    monkeypatch.setenv("TLKERNELS_CHECK", "1")  # else CUDA kernels give NaN
    with pytest.raises(IndexError):
        tlk.distillation(S, T, target, hard_weight=hard_weight, reduction=reduction, impl=impl)
    loss = tlk.distillation(S, T, target, hard_weight=hard_weight, reduction=reduction, ignore_index=bad, impl=impl)
    assert loss.isfinite().all()


def test_every_option_reaches_the_module():
    """An option that is accepted and ignored would leave the loss unchanged."""
    plain = {"hard_weight": 0.5, "divergence": "js"}
    target = torch.tensor([0, 1, 2, 3])
    before = tlk.DistillationLoss(**plain)(S, T, target)
    for option in ({"temperature": 2.0}, {"divergence": "tv"}, {"beta": 0.2}, {"hard_weight": 0.1}, {"ignore_index": 1},
                   {"label_smoothing": 0.2}, {"softcap": (None, 0.5)}, {"reduction": "sum"}):  # fmt: skip
        for name in helpers.IMPLEMENTATIONS:
            module = tlk.DistillationLoss(**{**plain, **option}, impl=name)
            assert not torch.allclose(module(S, T, target), before)
            assert str(next(iter(option))) in repr(module)
    assert not torch.allclose(tlk.DistillationLoss(**plain)(S, T, target, row_weight=torch.rand(4)), before)
    with pytest.raises(NotImplementedError):
        tlk.DistillationLoss(impl="triton")(S.to("meta"), T.to("meta"))
