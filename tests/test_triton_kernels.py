"""What Triton kernels do on a GPU, and the tests of the losses do not check on a CPU."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import harness
import pytest
import torch
import torch.nn.functional as F

import tlkernels as tlk
from tlkernels._core import triton as core
from tlkernels._core.triton import launch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (core.INTERPRETED and core.available()), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("classes", [7, 3000], ids=["whole", "swept"])
@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_a_class_index_out_of_range_is_nan_and_touches_no_memory(monkeypatch, loss, classes, bad):
    """As on a GPU, where the host does not check the targets; an access so far out of range would end the process."""
    monkeypatch.setattr(import_module(f"tlkernels.losses.{loss}.triton"), "check_classes", lambda *_: None)
    bad = classes if bad == 7 else bad
    input, target = torch.randn(4, classes), torch.tensor([0, 1, bad, 3])
    leaf = input.clone().requires_grad_()
    if loss == "cross_entropy":
        rows = tlk.cross_entropy(leaf, target, torch.rand(classes), reduction="none", impl="triton")
    else:
        rows = tlk.distillation(leaf, -input, target, hard_weight=0.5, reduction="none", impl="triton")
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    assert rows.isnan().tolist() == [False, False, True, False]
    assert grad.isnan().all(1).tolist() == [False, False, True, False]
    assert not grad[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("bad", [-2, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("classes", [7, 3000], ids=["whole", "swept"])
def test_a_selected_class_out_of_range_makes_its_row_nan(monkeypatch, classes, bad):
    """As above; a row without a class beside it has zeros."""
    from tlkernels.losses.cross_entropy import triton as rows
    from tlkernels.losses.linear_selective_log_softmax import triton as linear
    from tlkernels.losses.selective_log_softmax import triton as dense

    for module in (rows, dense):
        monkeypatch.setattr(module, "check_classes", lambda *_, **__: None)
    monkeypatch.setattr(import_module("tlkernels.losses.linear_cross_entropy.triton"), "check_classes", lambda *_: None)
    index = torch.tensor([[0, 1], [classes if bad == 7 else bad, 2], [-1, -1], [3, -1]])
    logits, g = torch.randn(4, classes), torch.randn(4, 2)
    layer = torch.eye(4), logits.t().contiguous(), None
    log_probs, entropy, peak, log_sum = dense.forward(logits, index, 1.0, None, True)
    by_layer = linear.forward(*layer, index, 1.0, None, True)
    for values in (log_probs, by_layer[0]):
        assert values.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
        assert values[2].tolist() == [-torch.inf] * 2
    grad = dense.backward(g, None, logits, index, peak, log_sum, entropy, 1.0, None)
    _, by_weight, _ = linear.backward(
        g, None, *layer, index, *by_layer[2:], by_layer[1], 1.0, None, (False, True, False)
    )
    assert grad.isnan().all(1).tolist() == [False, True, False, False]
    assert not grad[[0, 2, 3]].isnan().any() and not grad[2].any()
    assert by_weight.isnan().all()  # row 1 reaches every class


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_tf32_only_where_torch_is_allowed_to(setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert core.tf32() == (setting == "high")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.full
def test_every_loss_without_the_extension():
    """With TLKERNELS_BUILD=0 Triton still works: the battery again in a process that cannot load the extension."""
    code = """
import sys
import pytest
sys.modules["tlkernels._C"] = None
names = "(value_and_gradients or only_the_gradients or two_backwards or second_gradient) and triton and small"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_every_loss.py", "-k", names]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed >= 25, run.stdout


@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("upstream_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gradient_is_scaled_in_place(dtype, upstream_dtype, upstream, monkeypatch):
    """Each program takes several blocks; the upstream is read in its own dtype."""
    from tlkernels._core.triton import kernels as triton_kernels

    monkeypatch.setattr(triton_kernels, "_SCALE_PROGRAMS", 2)
    values, factor = torch.randn(5, 1001).to(dtype), torch.tensor(upstream, dtype=upstream_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (values.to(wide) * factor.to(wide)).to(dtype)
    assert triton_kernels.scale_(values, factor) is values
    assert torch.equal(values, expected)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 5000])
def test_sums_and_counts(n):
    from tlkernels._core.triton.kernels import count, sum_of

    values, target, weight = torch.randn(n), torch.randint(-1, 9, (n,)), torch.rand(9)
    total = sum_of(values, torch.empty((), dtype=torch.float64), 0.5, torch.tensor(3.0))
    torch.testing.assert_close(total, values.double().sum() * 0.5 / 3)
    assert count(target, 9, None, -1) == (target >= 0).sum()
    torch.testing.assert_close(count(target, 9, weight, -1), weight.double()[target[target >= 0]].sum())


@pytest.mark.parametrize("layout", harness.LAYOUTS)
def test_in_place_gradients(layout):
    input, target = torch.randn(3, 5, 4, 18), torch.randint(0, 5, (3, 4, 18))
    leaf = input.clone().requires_grad_()
    overwritten = harness.lay_out(leaf * 1, layout)
    (grad,) = torch.autograd.grad(tlk.cross_entropy(overwritten, target, inplace_grad=True, impl="triton"), leaf)
    wide = input.double().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(wide, target), wide)
    torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-7)


def test_the_table_is_tuned_on_request(monkeypatch, capsys):
    """The fastest row that fits is used, remembered, and printed as a row for the table."""
    import triton.testing

    rows = [launch.Config("interp*", 4, None, {"BLOCK": block}, 1) for block in (64, 256, 1024)]
    table, tried = launch.Table("test", *rows, launch.Config("sm_*", 0, None, {"BLOCK": 1}, 1)), []
    times = {64: 3.0, 256: 1.0, 1024: 2.0}

    def do_bench(run, return_mode):
        run()
        return times[tried[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    launches = lambda config: tried.append(config.meta["BLOCK"])  # noqa: E731
    table.run(torch.device("cpu"), 4, 1000, launches)
    assert tried == [64]
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    for _ in range(2):
        table.run(torch.device("cpu"), 4, 1000, launches)
    assert tried == [64, 64, 256, 1024, 256, 256]
    assert "Config(architecture='interpreter', itemsize=4, up_to=1023, meta={'BLOCK': 256}" in capsys.readouterr().out
    table.run(torch.device("cpu"), 4, 1000, launches, repeatable=False)
    assert tried[-1] == 64
