"""Numeric options take exactly what PyTorch's functions take as an int or a float."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tlkernels as tlk

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 1, 0])
A, B = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).unbind()


class Index:
    def __index__(self):
        return 1

    def __repr__(self):
        return "Index()"


def same_as_torch(function, **option):
    """Check that a function gives PyTorch's value with an option, or raises as PyTorch does."""
    try:
        right = F.cross_entropy(X, Y, **option)
    except (TypeError, ValueError, RuntimeError):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(option))}: expected"):
            function(**option)
    else:
        torch.testing.assert_close(function(**option), right)


LIKE_TORCHS = {
    "cross_entropy": lambda **option: tlk.cross_entropy(X, Y, **option),
    "module": lambda **option: tlk.CrossEntropyLoss(**option)(X, Y),
    "linear": lambda **option: tlk.linear_cross_entropy(X, torch.eye(5), Y, **option),
    "distillation": lambda **option: tlk.distillation(X, X, Y, hard_weight=1.0, **option),
    "linear_distillation": lambda **option: tlk.linear_distillation(
        X, torch.eye(5), X, torch.eye(5), Y, hard_weight=1.0, **option
    ),
}


@pytest.mark.parametrize("value", [
    1, np.int64(1), np.int8(1), np.uint16(1), np.array(1), torch.tensor(1), torch.tensor([1]), Index(), True,
    np.bool_(True), 1.0, np.float32(1), np.array([1]), torch.tensor(1.0), torch.tensor(True), None, "1", 2**70,
    -100, np.int32(-100), -100.0,
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("function", LIKE_TORCHS)
def test_ignore_index(function, value):
    same_as_torch(LIKE_TORCHS[function], ignore_index=value)


@pytest.mark.parametrize("value", [
    1, True, np.float32(0.25), np.float64(0.25), np.float16(0.25), np.int64(1), np.bool_(True),
    torch.tensor(0.25), torch.tensor(1), torch.tensor(True), torch.tensor([0.25]), Index(), np.array(0.25), None,
    "0.25", 1j, torch.tensor(0.25, requires_grad=True), 1.5,
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("function", [*LIKE_TORCHS, "info_nce"])
def test_label_smoothing(function, value):
    def info_nce(**option):
        return tlk.info_nce(X, torch.eye(5), Y, **option)

    same_as_torch(LIKE_TORCHS.get(function, info_nce), label_smoothing=value)


@pytest.mark.parametrize("name", ["symmetric", "normalize"])
def test_flags(name):
    torch.testing.assert_close(
        tlk.info_nce(A, B, **{name: np.bool_(True)}), tlk.info_nce(A, B, **{name: True}), rtol=0, atol=0
    )
    for bad in (1, "no", None):
        with pytest.raises(TypeError, match=f"{name}: expected a bool"):
            tlk.info_nce(A, B, **{name: bad})


def test_root_needs_a_number():
    """None must not mean the mean squared error without its root."""
    with pytest.raises(TypeError, match="eps: expected a number, got NoneType"):
        tlk.rmse(A, B, eps=None)
