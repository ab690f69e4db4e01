"""What "auto" takes on a GPU, told of fake tensors: a row of the table decides, and without one it is Triton."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tlkernels._core import choice, dispatch, triton
from tlkernels._core.choice import Measured
from tlkernels._core.dispatch import Implementation

BF16, F32 = torch.bfloat16, torch.float32


def logits(rows, columns, dtype=BF16, device="cuda"):
    with FakeTensorMode():
        return torch.empty((rows, columns), dtype=dtype, device=device)


def implementations(**refused):
    names = ("native", "triton", "reference")
    return tuple(Implementation(name, lambda call, name=name: refused.get(name), None) for name in names)


def taken(tensor, impl="auto", loss="cross_entropy", **refused):
    return dispatch.resolve(loss, implementations(**refused), (tensor,), impl).name


@pytest.fixture
def measured(monkeypatch):
    rows = (
        Measured("cross_entropy", "sm_9*", BF16, None, 64, "native", "2026-01-02: 3 us to 9"),
        Measured("cross_entropy", "sm_9*", BF16, 100, 4096, "native", "2026-01-02"),
        Measured("cross_entropy", "sm_9*", BF16, None, 4096, "triton", "2026-01-02"),
    )
    monkeypatch.setattr(choice, "MEASURED", rows)
    with triton.recorded("sm_90"):
        yield


def test_without_a_measurement_triton_comes_first_on_a_gpu_and_native_on_a_cpu():
    assert not choice.MEASURED
    assert taken(logits(8, 100)) == "triton"
    assert taken(logits(8, 100), triton="not here") == "native"
    assert taken(logits(8, 100), triton="not here", native="not built") == "reference"
    assert taken(logits(8, 100, device="cpu")) == "native"
    assert taken(logits(8, 100), impl="native") == "native"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(10**6, 64, "native"), (100, 65, "native"), (101, 65, "triton"), (100, 4097, "triton")],
)
def test_the_first_row_that_fits_decides(rows, columns, expected):
    assert taken(logits(rows, columns)) == expected


@pytest.mark.usefixtures("measured")
def test_a_row_is_for_its_loss_dtype_and_architecture():
    small = logits(8, 10)
    assert taken(small) == "native"
    assert taken(small, native="no") == "triton"
    assert taken(small, loss="distillation") == "triton"
    assert taken(logits(8, 10, F32)) == "triton"
    with triton.recorded("sm_80"):
        assert taken(small) == "triton"


def reasons(tensor, **refused):
    return dispatch._report("cross_entropy", implementations(**refused), (tensor,), "auto").splitlines()


def test_explain_says_that_nothing_was_measured():
    assert reasons(logits(8, 10)) == [
        "cross_entropy(impl='auto'): served by triton",
        "  native: could serve it; no measurement on this device: Triton",
        "  reference: could serve it; triton comes first",
    ]
    assert reasons(logits(8, 10), triton="too old")[1:] == [
        "  triton: too old",
        "  reference: could serve it; native comes first",
    ]


@pytest.mark.usefixtures("measured")
def test_explain_gives_the_measurement():
    assert reasons(logits(8, 10))[:2] == [
        "cross_entropy(impl='auto'): served by native",
        "  triton: could serve it; measured to be faster on this device: native (2026-01-02: 3 us to 9)",
    ]


def test_the_first_tensor_of_every_call_is_found():
    """A call is a tuple whose first field is a tensor, or a tuple of which that is so."""
    fake = logits(2, 3)
    assert choice.on_gpu((fake, None)) is fake
    assert choice.on_gpu(((fake, None), 1)) is fake
    assert choice.on_gpu((logits(2, 3, device="cpu"),)) is None
