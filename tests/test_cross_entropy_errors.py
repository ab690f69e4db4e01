"""Bad input of cross entropy raises before any work, naming argument, expectation and value; and the module."""

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F

import tlkernels as tlk

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
ERRORS = [
    (TypeError, "input: expected a Tensor, got list", ([[1.0]], Y), {}),
    (TypeError, "target: expected a Tensor, got int", (X, 3), {}),
    (TypeError, "input: expected float64, .* got torch.int64", (Y, Y), {}),
    (TypeError, "input: expected float64, .* got torch.complex64", (X.to(torch.complex64), Y), {}),
    (ValueError, "input: expected shape .* got a 0-d", (torch.tensor(1.0), Y), {}),
    (ValueError, r"target: .* shape \(4,\) for an input of shape \(4, 5\), got \(3,\)", (X, Y[:3]), {}),
    (ValueError, r"target: expected class indices of shape \(\)", (X[0], Y), {}),
    (ValueError, r"target: expected probabilities .* \(4, 5\), got \(4,\); class indices", (X, Y.float()), {}),
    (TypeError, "target: expected class indices or floating-point probabilities, got torch.bool", (X, X > 0), {}),
    (ValueError, "target: expected it on the input's device cpu, got meta", (X, Y.to("meta")), {}),
    (TypeError, "weight: expected a Tensor or None, got list", (X, Y, [1.0] * 5), {}),
    (ValueError, r"weight: expected shape \(5,\), .* got \(4,\)", (X, Y, torch.ones(4)), {}),
    (TypeError, "weight: expected a floating-point dtype, got torch.int64", (X, Y, torch.ones(5).long()), {}),
    (TypeError, "row_weight: expected a Tensor or None, got list", (X, Y), {"row_weight": [1.0] * 4}),
    (TypeError, "row_weight: expected float64, .* got torch.int64", (X, Y), {"row_weight": Y}),
    (ValueError, r"row_weight: expected shape \(4,\), .* got \(4, 1\)", (X, Y), {"row_weight": torch.ones(4, 1)}),
    (ValueError, "row_weight: .* device cpu, got meta", (X, Y), {"row_weight": torch.ones(4, device="meta")}),
    (ValueError, "reduction: expected one of .* got 'batchmean'", (X, Y), {"reduction": "batchmean"}),
    (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5", (X, Y), {"label_smoothing": 1.5}),
    (ValueError, "label_smoothing: .* got nan", (X, Y), {"label_smoothing": float("nan")}),
    (TypeError, "label_smoothing: expected a number, got str", (X, Y), {"label_smoothing": "0.1"}),
    (ValueError, "temperature: expected a finite number above 0, got 0", (X, Y), {"temperature": 0}),
    (ValueError, "softcap: expected None or a finite number above 0, got -1", (X, Y), {"softcap": -1}),
    (ValueError, "z_loss: expected a finite number of at least 0, got -0.1", (X, Y), {"z_loss": -0.1}),
    (TypeError, "ignore_index: expected an int, got float", (X, Y), {"ignore_index": 1.0}),
    (ValueError, "ignore_index: .* probabilities", (X, X.softmax(1)), {"ignore_index": 2}),
    (ValueError, "impl: expected 'auto' or one of .* got 'cuda'", (X, Y), {"impl": "cuda"}),
    (NotImplementedError, "triton", (X.to("meta"), Y.to("meta")), {"impl": "triton"}),
]


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"), ERRORS, ids=[f"{e[0].__name__}-{e[1][:24]}" for e in ERRORS]
)
@pytest.mark.parametrize("function", [tlk.cross_entropy, tlk.cross_entropy_stats])
def test_bad_arguments(function, error, message, args, kwargs):
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


@pytest.mark.parametrize("target", harness.targets(loss="cross_entropy"), ids=str)
@pytest.mark.parametrize("bad", [5, -1, 2**40])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_class_index_out_of_range(target, bad, shape, monkeypatch):
    monkeypatch.setenv("TLKERNELS_CHECK", "1")  # for CUDA's kernels
    x, y = torch.randn(shape, requires_grad=True), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    y.view(-1)[2] = bad
    with harness.forced(target) as impl, pytest.raises(IndexError):
        tlk.cross_entropy(x, y, impl=impl)
    with harness.forced(target) as impl, pytest.raises(IndexError):
        tlk.cross_entropy(x, y, impl=impl, reduction="none")
    assert tlk.cross_entropy(x, y, ignore_index=bad).isfinite()


def test_pytorch_error_inputs():
    """What torch.nn.functional.cross_entropy refuses raises here too."""
    for input, target, kwargs in (
        (torch.randn(3, 5), torch.zeros(4, dtype=torch.long), {}),
        (torch.randn(3, 5), torch.randn(3, 4).softmax(1), {}),
        (torch.randn(3, 5, 2), torch.zeros(3, 3, dtype=torch.long), {}),
        (torch.randn(3, 5), torch.zeros(3, dtype=torch.long), {"weight": torch.ones(4)}),
        (torch.randn(3, 5), torch.zeros(3, dtype=torch.long), {"label_smoothing": 1.1}),
        (torch.randn(3, 5), torch.zeros(3, dtype=torch.long), {"reduction": "median"}),
        (torch.randn(3, 5), torch.randn(3, 5).softmax(1), {"ignore_index": 1}),
    ):
        for function in (F.cross_entropy, tlk.cross_entropy):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                function(input, target, **kwargs)
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    for case in op.error_inputs("cpu") if op.error_inputs_func else ():
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
            tlk.cross_entropy(case.sample_input.input, *case.sample_input.args, **case.sample_input.kwargs)


class TestModule:
    def test_takes_the_place_of_torchs(self):
        weight = torch.rand(5)
        kwargs = {"weight": weight, "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
        ours, torchs = tlk.CrossEntropyLoss(**kwargs), torch.nn.CrossEntropyLoss(**kwargs)
        torch.testing.assert_close(ours(X, Y), torchs(X, Y))
        assert list(ours.state_dict()) == list(torchs.state_dict())
        ours.load_state_dict(torchs.state_dict())
        assert ours.double().weight.dtype == torch.float64
        assert "label_smoothing=0.1" in repr(ours)

    @pytest.mark.parametrize("name", ["size_average", "reduce"])
    def test_deprecated_arguments_raise(self, name):
        with pytest.raises(TypeError, match=name):
            tlk.CrossEntropyLoss(**{name: True})

    def test_every_option_reaches_the_function(self):
        """An option that is accepted and ignored would leave the loss unchanged."""
        plain = tlk.CrossEntropyLoss()(X, Y)
        for option in ({"ignore_index": 1}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"temperature": 2.0},
                       {"softcap": 1.0}, {"z_loss": 0.1}, {"weight": torch.rand(5)}):  # fmt: skip
            for impl in helpers.IMPLEMENTATIONS:
                assert not torch.allclose(tlk.CrossEntropyLoss(**option, impl=impl)(X, Y).sum(), plain)
        assert not torch.allclose(tlk.CrossEntropyLoss()(X, Y, row_weight=torch.rand(4)), plain)
        with pytest.raises(NotImplementedError):
            tlk.CrossEntropyLoss(impl="triton")(X.to("meta"), Y.to("meta"))
        with pytest.raises(ValueError, match="inplace_grad"):
            tlk.CrossEntropyLoss(inplace_grad=True)(X.clone().requires_grad_(), Y)
