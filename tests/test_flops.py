"""`FlopCounterMode` counts the products of the losses. The figures here are counted by hand."""

import subprocess
import sys

import pytest
import torch
from helpers import IMPLEMENTATIONS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import tlkernels as tlk
from tlkernels._core.flops import of_linear_layer

N, D, C, K, M = 12, 8, 20, 16, 5
LOGITS = 2 * 12 * 8 * 20
"""One product of linear cross entropy: 12 rows, 8 features, 20 classes."""
PAIRS, NEGATIVES, SQUARE = 2 * 12 * 8 * 16, 2 * 12 * 8 * 5, 2 * 12 * 8 * 12
"""One product of 12 queries of 8 features with 16 keys, with 5 negatives, and with themselves."""


KERNELS = [impl for impl in IMPLEMENTATIONS if impl != "reference"]
needs_triton = pytest.mark.skipif("triton" not in KERNELS, reason="Triton does not run here")


def normal(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def labels(count=C):
    return torch.arange(N) % count


def counted(run):
    """Return the operations of a call, and those of its backward."""
    with FlopCounterMode(display=False) as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.sum().backward()
    return forward, counter.get_total_flops() - forward


def expected(impl, reduced, *, one, gradients):
    """Return the operations of forward and backward: `one` for logits or similarities, `gradients` for those.

    Kernels compute the gradients of a reduced loss along with it. Otherwise their backward computes `one` again.
    """
    if impl == "reference":
        return one, gradients
    return (one + gradients, 0) if reduced else (one, one + gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("needs", "gradients"), [((True, True), 2), ((True, False), 1), ((False, True), 1)])
def test_linear_cross_entropy(any_impl, reduction, needs, gradients):
    input, weight = normal(N, D, grad=needs[0]), normal(C, D, grad=needs[1])
    count = counted(lambda: tlk.linear_cross_entropy(input, weight, labels(), reduction=reduction, impl=any_impl))
    assert count == expected(any_impl, reduction != "none", one=LOGITS, gradients=gradients * LOGITS)


@needs_triton
@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("strategy", ["chunks", "lean"])
def test_both_strategies_of_triton_count_the_same(impl, strategy, monkeypatch):
    monkeypatch.setenv("TLKERNELS_LINEAR", strategy)
    test_linear_cross_entropy(impl, "mean", (True, True), 2)
    test_linear_cross_entropy(impl, "none", (True, True), 2)


def test_leading_dimensions_and_bias(any_impl):
    input, weight, bias = normal(3, 4, D), normal(C, D), normal(C)
    count = counted(
        lambda: tlk.linear_cross_entropy(input, weight, labels().view(3, 4), linear_bias=bias, impl=any_impl)
    )
    assert count == expected(any_impl, True, one=LOGITS, gradients=2 * LOGITS)


def test_a_call_without_gradients(any_impl):
    input, weight = normal(N, D), normal(C, D)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tlk.linear_cross_entropy(input, weight, labels(), impl=any_impl)
    assert counter.get_total_flops() == LOGITS


def test_float16_computes_the_logits_again(any_impl):
    input, weight = normal(N, D, dtype=torch.float16), normal(C, D, dtype=torch.float16)
    count = counted(lambda: tlk.linear_cross_entropy(input, weight, labels(), impl=any_impl))
    assert count == expected(any_impl, False, one=LOGITS, gradients=2 * LOGITS)


@pytest.mark.parametrize("impl", KERNELS)
def test_statistics(impl):
    input, weight = normal(N, D), normal(C, D)
    count = counted(lambda: tlk.linear_cross_entropy_stats(input, weight, labels(), impl=impl).loss)
    assert count == (LOGITS, 3 * LOGITS)


@pytest.mark.usefixtures("needs_native")
def test_a_second_backward_computes_the_loss_again():
    input, weight = normal(N, D), normal(C, D)
    with FlopCounterMode(display=False) as counter:
        loss = tlk.linear_cross_entropy(input, weight, labels(), impl="native")
        loss.backward(retain_graph=True)
        loss.backward()
    assert counter.get_total_flops() == 6 * LOGITS


def test_rows_known_to_count():
    shapes = {"input": (N, D), "linear_weight": (C, D), "num_valid": 3}
    assert of_linear_layer(**shapes) == 2 * 3 * D * C
    assert of_linear_layer(**shapes, needs=[True, True, True]) == 3 * 2 * 3 * D * C


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_distillation(any_impl, reduction):
    student, weight = normal(N, D), normal(C, D)
    teacher, teacher_weight = normal(N, 2 * D, grad=False), normal(C, 2 * D, grad=False)
    count = counted(
        lambda: tlk.linear_distillation(student, weight, teacher, teacher_weight, reduction=reduction, impl=any_impl)
    )
    assert count == expected(any_impl, reduction != "none", one=3 * LOGITS, gradients=2 * LOGITS)


def test_linear_distillation_of_both_layers(any_impl):
    student, weight, teacher, teacher_weight = normal(N, D), normal(C, D), normal(N, 2 * D), normal(C, 2 * D)
    count = counted(lambda: tlk.linear_distillation(student, weight, teacher, teacher_weight, impl=any_impl))
    assert count == expected(any_impl, True, one=3 * LOGITS, gradients=2 * LOGITS + 4 * LOGITS)


# InfoNCE's kernels in Triton have no op that computes loss and gradients together.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(any_impl, reduction, symmetric):
    query, key = normal(N, D), normal(N if symmetric else K, D)
    product = SQUARE if symmetric else PAIRS
    count = counted(lambda: tlk.info_nce(query, key, symmetric=symmetric, reduction=reduction, impl=any_impl))
    together = reduction != "none" and any_impl != "triton"
    assert count == expected(any_impl, together, one=product, gradients=2 * product)


@pytest.mark.parametrize("negatives", [(M, D), (N, M, D)], ids=["shared", "of each query"])
def test_info_nce_with_negatives(any_impl, negatives):
    query, key, negatives = normal(N, D), normal(K, D, grad=False), normal(*negatives)
    count = counted(lambda: tlk.info_nce(query, key, negatives=negatives, reduction="none", impl=any_impl))
    # By the keys only the query has a gradient.
    assert count == expected(any_impl, False, one=PAIRS + NEGATIVES, gradients=PAIRS + 2 * NEGATIVES)


@pytest.mark.usefixtures("needs_native")
def test_a_gradient_of_the_scale_alone_needs_no_similarities():
    query, key, scale = normal(N, D, grad=False), normal(K, D, grad=False), torch.tensor(2.0, requires_grad=True)
    count = counted(lambda: tlk.info_nce(query, key, logit_scale=scale, reduction="none", impl="native"))
    assert count == (PAIRS, 0)


@pytest.mark.parametrize("loss", ["nt_xent", "sup_con"])
def test_half_of_a_symmetric_matrix(any_impl, loss):
    """The kernels compute half of the similarities, and one product for both gradients of them."""
    if loss == "nt_xent":
        first, second = normal(N // 2, D), normal(N // 2, D)
        count = counted(lambda: tlk.nt_xent(first, second, impl=any_impl))
    else:
        features = normal(N, D)
        count = counted(lambda: tlk.sup_con(features, labels(3), impl=any_impl))
    if any_impl == "reference":
        assert count == (SQUARE, 2 * SQUARE)
    else:
        assert count == expected(any_impl, any_impl == "native", one=SQUARE // 2, gradients=SQUARE)


def test_sigmoid_contrastive(any_impl):
    query, key = normal(N, D), normal(N, D)
    count = counted(lambda: tlk.sigmoid_contrastive(query, key, logit_scale=3.0, logit_bias=-2.0, impl=any_impl))
    assert count == expected(any_impl, True, one=SQUARE, gradients=2 * SQUARE)


def test_losses_without_products_count_nothing(any_impl):
    logits, other = normal(N, C), normal(N, C)
    assert counted(lambda: tlk.cross_entropy(logits, labels(), impl=any_impl)) == (0, 0)
    assert counted(lambda: tlk.distillation(logits, other, impl=any_impl)) == (0, 0)
    assert counted(lambda: tlk.mse(logits, other, impl=any_impl)) == (0, 0)


def test_counting_changes_no_bit(any_impl):
    input, weight = normal(N, D), normal(C, D)

    def run():
        loss = tlk.linear_cross_entropy(input, weight, labels(), impl=any_impl)
        return loss, *torch.autograd.grad(loss, (input, weight))

    right = run()
    with FlopCounterMode(display=False):
        assert all(map(torch.equal, run(), right))


class CallingMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("mode", [FakeTensorMode, CallingMode])
def test_with_another_mode_the_backward_is_the_rule(mode):
    """A mode may replace tensors, so a reduced loss is not computed along with its gradients."""
    with mode(), FlopCounterMode(display=False) as counter:
        input, weight = normal(N, D), normal(C, D)
        tlk.linear_cross_entropy(input, weight, labels(), impl="native").backward()
    assert counter.get_total_flops() == 4 * LOGITS


def test_every_op_that_multiplies_has_a_formula():
    prefixes = tuple(f"tlkernels::{loss}" for loss in ("linear_", "info_nce_", "sigmoid_contrastive_"))
    every = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].partition(".")[0] for name in every if name.startswith(prefixes)}
    assert len(names) >= 23
    assert not {name for name in names if getattr(torch.ops.tlkernels, name) not in flop_registry}


COUNT = """
x, w = torch.randn(2, 3), torch.randn(5, 3)
with FlopCounterMode(display=False) as counter:
    tlkernels.linear_cross_entropy(x, w, torch.tensor([0, 1]), impl="native")
print(counter.get_total_flops())
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("imports", [
    pytest.param(
        "from torch.utils.flop_counter import FlopCounterMode; import tlkernels", id="before", marks=pytest.mark.full
    ),
    pytest.param("import tlkernels; from torch.utils.flop_counter import FlopCounterMode", id="after"),
    pytest.param(
        "import importlib.util as u, tlkernels; u.find_spec('torch.utils.flop_counter');"
        "assert 'torch.utils.flop_counter' not in sys.modules; from torch.utils.flop_counter import FlopCounterMode",
        id="found first",
        marks=pytest.mark.full,
    ),
])  # fmt: skip
def test_any_order_of_imports(imports):
    code = f"import sys, torch\n{imports}\n{COUNT}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == 2 * 2 * 3 * 5
