"""What "auto" takes on a GPU, with fake tensors: a row of the table decides, and without a row Triton serves."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tlkernels as tlk
from tlkernels._core import choice, dispatch, triton
from tlkernels._core.choice import BY_MODEL, MEASURED, Row
from tlkernels._core.dispatch import Implementation
from tlkernels._core.triton.launch import recorded

BF16, F32 = torch.bfloat16, torch.float32
CE = ("cross_entropy",)


def logits(*shape, dtype=BF16, device="cuda", stride=None):
    with FakeTensorMode():
        stride = stride or torch.empty(shape, device="meta").stride()
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def implementations(**refused):
    names = ("native", "triton", "reference")
    return tuple(Implementation(name, lambda call, name=name: refused.get(name), None) for name in names)


def taken(tensor, impl="auto", loss="cross_entropy", **refused):
    return dispatch.resolve(loss, implementations(**refused), (tensor,), impl).name


@pytest.fixture(autouse=True)
def _gpu():
    with recorded("sm_90"):
        yield


@pytest.fixture
def table(monkeypatch):
    """Replace the table's rows by these."""

    def use(*rows):
        monkeypatch.setattr(choice, "TABLE", rows)
        choice._rows_at.cache_clear()

    yield use
    choice._rows_at.cache_clear()


@pytest.fixture
def measured(table):
    sm_90 = {"architecture": "sm_9*", "dtypes": (BF16,)}
    table(
        Row(CE, "native", MEASURED, "2026-01-02: 3 us to 9", columns=64, **sm_90),
        Row(CE, "native", MEASURED, "2026-01-02", rows=100, columns=4096, **sm_90),
        Row(CE, "triton", BY_MODEL, "2026-01-02: 5 to 6", columns=4096, **sm_90),
    )


def test_without_a_row_triton_comes_first_on_a_gpu_and_native_on_a_cpu(table):
    table()
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
    assert taken(logits(8, 10, dtype=F32)) == "triton"
    with recorded("sm_80"):
        assert taken(small) == "triton"


def test_a_row_may_be_for_few_bytes(table):
    table(Row(CE, "native", BY_MODEL, "", nbytes=1 << 20))
    assert taken(logits(512, 1024)) == "native"
    assert taken(logits(513, 1024)) == "triton"
    assert taken(logits(512, 1024, dtype=F32)) == "triton"


def test_a_row_may_be_for_unaligned_rows(table):
    table(Row((*CE, "distillation"), "native", BY_MODEL, "", unaligned=True))
    assert taken(logits(4, 50257)) == "native"
    assert taken(logits(4, 50256)) == "triton"
    assert taken(logits(4, 50260, dtype=F32)) == "triton"
    assert taken(logits(1, 50257)) == "triton"  # it has no second row
    assert taken(logits(4, 50257, stride=(50264, 1))) == "triton"
    assert taken(logits(4, 50256, stride=(50257, 1))) == "native"
    assert taken(logits(2, 3, 50257), loss="distillation") == "native"
    assert taken(logits(2, 8, 50257)) == "triton"  # cross entropy's classes are axis 1
    assert taken(logits(2, 50257, 8, stride=(50257 * 8, 1, 50257))) == "native"
    assert taken(logits(2, 50256, 8, stride=(50256 * 8, 1, 50256))) == "triton"
    assert taken(logits(3)) == taken(logits()) == "triton"


def test_a_view_may_begin_at_an_odd_address():
    rows = torch.empty(4, 64, dtype=BF16)
    assert [choice._unaligned(rows[:, start:], 1) for start in (0, 1, 4, 8)] == [False, True, True, False]


def test_a_row_may_be_for_long_rows(table):
    table(Row((*CE, "distillation"), "native", BY_MODEL, "", row_bytes_over=64 << 10))
    assert taken(logits(4, 32768)) == "triton"
    assert taken(logits(4, 32776)) == "native"
    assert taken(logits(4, 16392, dtype=F32)) == "native"
    assert taken(logits(2, 4, 32776)) == "triton"
    assert taken(logits(2, 4, 32776), loss="distillation") == "native"


@pytest.mark.parametrize(
    ("loss", "shape", "dtype", "expected"),
    [
        ("cross_entropy", (256, 1000), BF16, "native"),
        ("cross_entropy", (256, 1000), F32, "native"),
        ("cross_entropy_stats", (32768, 4096), BF16, "native"),
        ("cross_entropy", (32768, 4096), F32, "triton"),
        ("cross_entropy", (32768, 4097), F32, "native"),
        ("cross_entropy", (8192, 50257), BF16, "native"),
        ("cross_entropy", (16384, 131072), F32, "native"),
        ("distillation", (256, 1000), BF16, "native"),
        ("distillation", (16384, 32000), BF16, "triton"),
        ("distillation", (8192, 128256), BF16, "triton"),
        ("selective_log_softmax", (8192, 151936), BF16, "native"),
        ("linear_selective_log_softmax", (4096, 4096), BF16, "native"),
        ("linear_cross_entropy", (4096, 4096), BF16, "native"),
        ("linear_cross_entropy", (4096, 256), BF16, "triton"),
        ("linear_cross_entropy", (4096, 4096), F32, "triton"),
        ("linear_distillation", (1024, 256), BF16, "native"),
        ("linear_distillation", (4096, 4096), BF16, "triton"),
        ("info_nce", (65536, 1024), BF16, "triton"),
        ("sup_con", (2048, 128), BF16, "triton"),
        ("nt_xent", (2048, 128), F32, "triton"),
        ("mse", (8, 8), F32, "triton"),
    ],
)
def test_the_table(loss, shape, dtype, expected):
    assert taken(logits(*shape, dtype=dtype), loss=loss) == expected


def test_what_is_measured_stands_before_what_is_not():
    bases = [row.basis for row in choice.TABLE]
    assert set(bases) <= {MEASURED, BY_MODEL}
    for k, row in enumerate(choice.TABLE):  # a row by model before a measured one is for smaller sizes
        later = {loss for after in choice.TABLE[k:] if after.basis == MEASURED for loss in after.losses}
        if row.basis == BY_MODEL and later & {*row.losses}:
            assert row.rows or row.columns or row.nbytes
    assert all(row.figures and row.faster in ("native", "triton") for row in choice.TABLE)


def reasons(tensor, **refused):
    return dispatch._report("cross_entropy", implementations(**refused), (tensor,), "auto").splitlines()


def test_explain_says_that_there_are_no_figures(table):
    table()
    assert reasons(logits(8, 10)) == [
        "cross_entropy(impl='auto'): served by triton",
        "  native: could serve it; neither measured nor modelled for this call: Triton comes first",
        "  reference: could serve it; triton comes first",
    ]
    assert reasons(logits(8, 10), triton="too old")[1:] == [
        "  triton: too old",
        "  reference: could serve it; native comes first",
    ]


@pytest.mark.usefixtures("measured")
def test_explain_says_whether_it_was_measured():
    assert reasons(logits(8, 10))[:2] == [
        "cross_entropy(impl='auto'): served by native",
        "  triton: could serve it; native is measured to be faster (2026-01-02: 3 us to 9)",
    ]
    assert reasons(logits(200, 100))[:2] == [
        "cross_entropy(impl='auto'): served by triton",
        "  native: could serve it; triton is expected to be faster by model, not measured (2026-01-02: 5 to 6)",
    ]


def test_the_first_tensor_of_every_call_is_found():
    """The first field of a call is a tensor, or a tuple whose first field is one."""
    fake = logits(2, 3)
    assert choice.on_gpu((fake, None)) is fake
    assert choice.on_gpu(((fake, None), 1)) is fake
    assert choice.on_gpu((logits(2, 3, device="cpu"),)) is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_under_compile_and_vmap(monkeypatch, table, dynamic):
    """The table decides there too. The tensors are on the CPU, since there may be no GPU."""
    table(*(Row(CE, "native", BY_MODEL, "", **at) for at in ({"rows": 1, "columns": 1}, {"unaligned": True})))
    asked = []

    def on_gpu(call):
        return call[0]

    def architecture(device):
        torch._dynamo.graph_break()  # raises where the compiler traces it
        asked.append(device)
        return "sm_90"

    monkeypatch.setattr(choice, "on_gpu", on_gpu)
    monkeypatch.setattr(triton, "architecture", architecture)
    x, y = torch.randn(4, 1001), torch.randint(0, 1001, (4,))
    expected = torch.nn.functional.cross_entropy(x, y)
    compiled = torch.compile(tlk.cross_entropy, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x[:, 1:], y.clamp(max=999)), tlk.cross_entropy(x[:, 1:], y.clamp(max=999)))
    batched = torch.func.vmap(tlk.cross_entropy)(x.view(2, 2, 1001), y.view(2, 2))
    torch.testing.assert_close(batched.mean(), expected)
    assert len(asked) >= 2
