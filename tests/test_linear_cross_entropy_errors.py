"""Bad input of linear cross entropy raises before any work; and the module."""

import helpers
import pytest
import torch
from linear_cross_entropy_cases import call

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("linear_cross_entropy")


@pytest.mark.parametrize("bad", [37, -1, 2**40])
def test_class_index_out_of_range(impl, bad, monkeypatch):
    monkeypatch.setenv("TLKERNELS_CHECK", "1")  # for CUDA's kernels
    for reduction in ("mean", "none"):
        arguments = call(reduction=reduction)
        arguments["target"] = torch.tensor([0, 1, bad, 3, 4, 5])
        with pytest.raises(IndexError):
            tlk.linear_cross_entropy(**arguments, impl=impl)
    assert tlk.linear_cross_entropy(**arguments | {"ignore_index": bad, "reduction": "mean"}, impl=impl).isfinite()


X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])


ERRORS = [
    (TypeError, "input: expected a Tensor, got list", ([[1.0]], W, Y), {}),
    (TypeError, "linear_weight: expected a Tensor, got NoneType", (X, None, Y), {}),
    (TypeError, "linear_bias: expected a Tensor, got float", (X, W, Y), {"linear_bias": 1.0}),
    (TypeError, "target: expected a Tensor, got int", (X, W, 3), {}),
    (TypeError, "input: expected float64, .* got torch.int64", (X.long(), W, Y), {}),
    (ValueError, "input: expected shape .* got a 0-d", (torch.tensor(1.0), W, Y), {}),
    (TypeError, "linear_weight: expected the input's dtype torch.float32, got torch.float64", (X, W.double(), Y), {}),
    (TypeError, "linear_bias: expected the input's dtype", (X, W, Y), {"linear_bias": torch.ones(5).double()}),
    (ValueError, "linear_weight: expected it on the input's device cpu, got meta", (X, W.to("meta"), Y), {}),
    (ValueError, r"linear_weight: .* in_features 3 .* got \(5, 4\)", (X, torch.randn(5, 4), Y), {}),
    (ValueError, r"linear_weight: .* got \(5, 2, 3\)", (X, torch.randn(5, 2, 3), Y), {}),
    (ValueError, r"linear_weight: .* at least one class, got \(0, 3\)", (X, torch.randn(0, 3), Y), {}),
    (ValueError, r"linear_bias: expected shape \(5,\), .* got \(4,\)", (X, W, Y), {"linear_bias": torch.ones(4)}),
    (ValueError, r"target: expected class indices of shape \(4,\), .* got \(3,\)", (X, W, Y[:3]), {}),
    (ValueError, r"target: .* logits' shape \(4, 5\), got \(4, 3\)", (X, W, X), {}),
    (TypeError, "target: expected class indices or floating-point probabilities, got torch.bool", (X, W, Y > 0), {}),
    (ValueError, "target: expected it on the input's device cpu, got meta", (X, W, Y.to("meta")), {}),
    (ValueError, r"weight: expected shape \(5,\)", (X, W, Y), {"weight": torch.ones(4)}),
    (ValueError, "reduction: expected one of .* got 'batchmean'", (X, W, Y), {"reduction": "batchmean"}),
    (ValueError, r"label_smoothing: expected a number in \[0, 1\]", (X, W, Y), {"label_smoothing": 1.5}),
    (ValueError, "temperature: expected a finite number above 0", (X, W, Y), {"temperature": 0}),
    (ValueError, "softcap: expected None or", (X, W, Y), {"softcap": -1}),
    (ValueError, "z_loss: expected", (X, W, Y), {"z_loss": -0.1}),
    (TypeError, "ignore_index: expected an int", (X, W, Y), {"ignore_index": 1.0}),
    (ValueError, "ignore_index: .* probabilities", (X, W, torch.ones(4, 5)), {"ignore_index": 2}),
    (TypeError, "row_weight: expected a Tensor or None, got list", (X, W, Y), {"row_weight": [1.0] * 4}),
    (TypeError, "row_weight: expected float64, .* got torch.int64", (X, W, Y), {"row_weight": Y}),
    (ValueError, r"row_weight: expected shape \(4,\), .* got \(3,\)", (X, W, Y), {"row_weight": torch.ones(3)}),
    (ValueError, "row_weight: expected it on", (X, W, Y), {"row_weight": torch.ones(4, device="meta")}),
    (TypeError, "num_valid: expected an int, got float", (X, W, Y), {"num_valid": 4.0}),
    (ValueError, r"num_valid: expected a number of rows in \[0, 4\], got 5", (X, W, Y), {"num_valid": 5}),
    (ValueError, r"num_valid: expected a number of rows in \[0, 4\], got -1", (X, W, Y), {"num_valid": -1}),
    (ValueError, "num_valid: expected 4, .* with probabilities, got 3", (X, W, torch.ones(4, 5)), {"num_valid": 3}),
    (ValueError, "num_valid: expected 4, the number of rows that are not ignored, got 3", (X, W, Y), {"num_valid": 3}),
    (ValueError, "impl: expected 'auto' or one of", (X, W, Y), {"impl": "cuda"}),
    (NotImplementedError, "triton", (X.to("meta"), W.to("meta"), Y.to("meta")), {"impl": "triton"}),
]


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"), ERRORS, ids=[f"{e[0].__name__}-{e[1][:24]}" for e in ERRORS]
)
@pytest.mark.parametrize("function", [tlk.linear_cross_entropy, tlk.linear_cross_entropy_stats])
def test_bad_arguments(function, error, message, args, kwargs):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


class TestModule:
    def test_takes_the_place_of_torchs(self):
        kwargs = {"bias": True, "weight": torch.rand(5), "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
        ours, torchs = tlk.LinearCrossEntropyLoss(3, 5, **kwargs), torch.nn.LinearCrossEntropyLoss(3, 5, **kwargs)
        assert list(ours.state_dict()) == list(torchs.state_dict()) == ["weight", "linear.weight", "linear.bias"]
        ours.load_state_dict(torchs.state_dict())
        torch.testing.assert_close(ours(X, Y), torchs(X, Y))
        ours(X, Y).backward()
        assert ours.linear.weight.grad.shape == (5, 3) and ours.linear.bias.grad.shape == (5,)
        assert "label_smoothing=0.1" in repr(ours)

    def test_device_and_dtype(self):
        made = tlk.LinearCrossEntropyLoss(3, 5, dtype=torch.float64, device="cpu")
        assert made.linear.weight.dtype == torch.float64 and made.linear.bias is None

    def test_every_option_reaches_the_function(self):
        """An option that is accepted and ignored would leave the loss unchanged."""
        made = {}
        for option in ({}, {"ignore_index": 1}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"temperature": 2.0},
                       {"softcap": 1.0}, {"z_loss": 0.1}, {"weight": torch.rand(5)}, {"bias": True}):  # fmt: skip
            for impl in helpers.IMPLEMENTATIONS:
                torch.manual_seed(1)
                loss = tlk.LinearCrossEntropyLoss(3, 5, **option, impl=impl)(X, Y)
                assert not option or not torch.allclose(loss, made[impl])
                made.setdefault(impl, loss)
        with pytest.raises(NotImplementedError):
            tlk.LinearCrossEntropyLoss(3, 5, impl="triton", device="meta")(X.to("meta"), Y.to("meta"))

    @pytest.mark.parametrize("name", ["size_average", "reduce", "out_features", "options"])
    def test_what_is_not_taken_raises(self, name):
        with pytest.raises(TypeError, match=name):
            tlk.LinearCrossEntropyLoss(3, 5, **{name: None})
