"""Linear losses in Triton: both strategies, the choice between them, memory, and the number of products."""

import harness
import linear_cross_entropy_cases
import linear_distillation_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tlkernels as tlk
from tlkernels._core import triton
from tlkernels._core.triton import linear
from tlkernels._core.triton.launch import recorded

pytestmark = pytest.mark.skipif(not triton.INTERPRETED or not triton.available(), reason="needs TRITON_INTERPRET=1")
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LCE, LD = linear_cross_entropy_cases.LOSS, linear_distillation_cases.LOSS


def results(function, arguments, names):
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    value = function(**arguments | dict(zip(names, leaves, strict=True)))
    upstream = (0.5 + torch.rand(value.shape, generator=harness.generator(0))).bfloat16().to(value)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


# For the hidden sizes of the battery the rule chooses the lean strategy.
CHUNKED = [
    pytest.param(loss, case, id=case.id)
    for loss in (LCE, LD)
    for case in loss.cases
    if case.dtype in (F64, BF16) and not case.small
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("loss", "case"), CHUNKED)
def test_in_chunks(loss, case):
    budgets = {}
    for seed in range(2):
        arguments = case.make(seed)
        if harness.too_large("triton", *arguments.values()):
            pytest.skip("left out by the size rule of the interpreter")
        with linear.forced("chunks"):
            assert "in chunks of" in tlk.explain(loss.function, **arguments, impl="triton")
            ours = results(lambda **a: loss.function(**a, impl="triton"), arguments, case.wants_grad)
        eager = results(loss.pytorch, arguments, case.wants_grad)
        right = results(loss.pytorch, harness.widened(arguments), case.wants_grad)
        for name, *values in zip(("loss", *case.wants_grad), ours, eager, right, strict=True):
            budgets.setdefault(name, harness.Budget(case.dtype)).add(*values)
    for name, budget in budgets.items():
        budget.check(name)


class Padding(TorchDispatchMode):
    """Checks the memory after the rows of 16-bit operands of products, which the library may read and multiply by 0."""

    def __init__(self):
        super().__init__()
        self.padded, self.finite = 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            for operand in args[-2:]:
                rows, width = (operand if operand.stride(1) == 1 else operand.t()).shape
                stride = max(operand.stride())
                behind = operand.as_strided((rows, stride - width), (stride, 1), operand.storage_offset() + width)
                self.padded += behind.numel() > 0
                self.finite &= bool(behind.isfinite().all())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("strategy", linear.STRATEGIES)
@pytest.mark.parametrize("features", [16, 64], ids=["own memory", "memory of the weight's gradient"])
def test_no_product_reads_memory_that_nothing_wrote(strategy, features):
    """CPUs with AMX also read what follows a row of bfloat16, and a NaN there made the result NaN."""
    from tlkernels.losses.linear_cross_entropy import triton as kernels

    arguments = linear_cross_entropy_cases.make((33,), features, 1009, BF16, "indices", False, False, {}, 0)
    input, weight, target = (arguments[name] for name in ("input", "linear_weight", "target"))
    with linear.forced(strategy), Padding() as seen:
        ours = kernels.step(input, weight, None, target, None, -100, 0.0, 1.0, *[None, 0.0, None, None, None], True,
                            [True, True, False])  # fmt: skip
    assert seen.padded
    assert seen.finite
    leaves = [tensor.double().requires_grad_() for tensor in (input, weight)]
    loss = LCE.pytorch(*leaves, target)
    for value, right in zip(ours[:3], (loss.detach(), *torch.autograd.grad(loss, leaves)), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=0, atol=float(right.abs().max()) / 100)


def layer(rows, features, classes, dtype=BF16):
    input = torch.empty(rows, features, dtype=dtype, device="meta")
    return input, input.new_empty(classes, features), None


ALL = linear.Needs(True, True, True)


@pytest.mark.parametrize(("shape", "dtype", "needs", "expected"), [
    ((4096, 4096, 128256), BF16, ALL, ("chunks", 4096, 128256)),  # in the memory of the weight's gradient
    ((16384, 4096, 128256), BF16, ALL, ("chunks", 4096, 128256)),
    ((4096, 4096, 128256), BF16, (True, False, False), ("chunks", 1024, 128256)),
    ((4096, 1024, 128256), F32, (False, False, False), ("chunks", 512, 128256)),
    ((8192, 64, 50000), BF16, ALL, ("lean", 8192, 2048)),  # bound by the bytes of logits
    ((8192, 64, 50000), F64, ALL, ("chunks", 640, 50000)),
], ids=str)  # fmt: skip
def test_the_rule_on_an_h200(shape, dtype, needs, expected):
    with recorded("sm_90"):
        plan = linear.plan([layer(*shape, dtype)], [linear.Needs(*needs)])
    assert plan == expected


def test_an_unknown_strategy(monkeypatch):
    monkeypatch.setenv("TLKERNELS_LINEAR", "fat")
    with pytest.raises(ValueError, match="TLKERNELS_LINEAR: expected one of"):
        linear.plan([layer(4, 4, 4)], [ALL])


@pytest.mark.parametrize("shape", [(16, 16, 37), (13, 16, 1000), (4096, 4096, 128256), (5, 17, 3), (100, 4000, 777)])
def test_the_weights_gradient_never_reaches_logits_that_are_still_read(shape):
    input, weight, _ = layer(*shape)
    needs = linear.Needs(True, True, False)
    with recorded("sm_90"), linear.forced("chunks"):
        sweep = linear.Sweep((input, weight, None), needs, linear.plan([(input, weight, None)], [needs]))
        assert sweep.whole
    rows, features, classes = shape
    logits, gradient = sweep.logits, sweep.by_weight
    assert gradient.storage_offset() == 0 and gradient.is_contiguous()
    for k in range(0, classes, sweep.block):
        written = min(classes, k + sweep.block) * features
        assert written <= logits.storage_offset() + k * logits.stride(0), "the block that it is made of, and all after"
    assert logits.storage_offset() + logits.numel() <= logits.untyped_storage().nbytes() // 2
    if classes > 128000:  # the bar: half of eager's, which holds logits, their logarithms and gradient at once
        held = logits.untyped_storage().nbytes() + sweep.by_input.nbytes
        assert held <= 1.2 * weight.nbytes <= 3 * rows * classes * 2 / 2


@pytest.mark.parametrize(("classes", "features", "architecture", "block"), [
    (128256, 4096, "sm_90", 8448),  # 66 x 16 tiles, eight for each of 132 multiprocessors
    (32000, 4096, "sm_90", 2048),  # 16 x 16: no larger block takes fewer turns
    (128256, 4096, "gfx942", 8064),  # a sixteenth, where the tiles are not known
    (7, 4096, "sm_90", 7),
    (0, 4096, "sm_90", 0),
], ids=str)  # fmt: skip
def test_blocks_fill_the_multiprocessors(classes, features, architecture, block):
    with recorded(architecture):
        gpu = linear.machine(torch.device("meta"))
    assert linear._block(classes, features, gpu) == block


class Watched(TorchDispatchMode):
    """Counts the multiplications of products, and the elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        result = func(*args, **(kwargs or {}))
        if name in ("empty", "new_empty", "zeros", "new_zeros"):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("rows", [16, 70], ids=["one chunk", "several"])
@pytest.mark.parametrize("strategy", linear.STRATEGIES)
@pytest.mark.parametrize("needs", [(False,) * 3, (True, False, False), (False, True, False), (False, False, True), ALL])
def test_only_needed_products_are_made(strategy, needs, rows):
    from tlkernels.losses.linear_cross_entropy import triton as kernels

    features, classes = 24, 600
    arguments = linear_cross_entropy_cases.make((rows,), features, classes, F32, "indices", True, False, {}, 0)
    args = [arguments[name] for name in ("input", "linear_weight", "linear_bias", "target")]
    with linear.forced(strategy), Watched() as seen:
        kernels.step(*args, None, -100, 0.0, 1.0, None, 0.0, None, None, None, True, needs)
    made = (strategy == "chunks") + sum(needs[:2])  # the lean strategy computes the logits in its kernels
    assert seen.products == made * rows * features * classes
    if strategy == "lean" and rows == 70:
        assert seen.largest < rows * classes, "nothing of the logits' size"


@pytest.mark.parametrize("strategy", linear.STRATEGIES)
def test_a_class_index_out_of_range_is_nan_in_its_row_alone(strategy, monkeypatch):
    """As on a GPU, where the host does not check; the kernels access no memory for it."""
    from tlkernels.losses.linear_cross_entropy import triton as kernels
    from tlkernels.losses.linear_distillation import triton as distillation

    for module in (kernels, distillation):
        monkeypatch.setattr(module, "check_classes", lambda *args: None)
    target = torch.tensor([1, 37, -1, 2**40, -100, 36])
    bad = torch.tensor([False, True, True, True, False, False])
    make = linear_cross_entropy_cases.make((6,), 5, 37, F32, "indices", True, True, {}, 0)
    make |= {"target": target, "label_smoothing": 0.1, "reduction": "none"}
    student = linear_distillation_cases.make((6,), 37, F32, hard_weight=0.5, reduction="none")(0) | {"target": target}
    for loss, arguments, name in ((LCE, make, "input"), (LD, student, "student_input")):
        with linear.forced(strategy):
            value, grad = results(lambda **a: loss.function(**a, impl="triton"), arguments, [name])  # noqa: B023
        right = results(loss.pytorch, arguments | {"target": target.masked_fill(bad, -100)}, [name])
        assert value[bad].isnan().all() and grad[bad].isnan().all()
        torch.testing.assert_close(value[~bad], right[0][~bad])
        torch.testing.assert_close(grad[~bad], right[1][~bad])


@pytest.mark.parametrize("strategy", linear.STRATEGIES)
@pytest.mark.parametrize("ignored", [False, True])
def test_strides_and_ignored_rows(strategy, ignored):
    """A transposed weight, a sliced input; and a call in which no row counts."""
    arguments = linear_cross_entropy_cases.make((70,), 24, 600, F32, "indices", True, False, {"z_loss": 0.1}, 0)
    arguments["linear_weight"] = arguments["linear_weight"].t().contiguous().t()
    arguments["input"] = harness.lay_out(arguments["input"], "sliced")
    if ignored:
        arguments["target"] = torch.full((70,), -100)
    names = ("input", "linear_weight", "linear_bias")
    with linear.forced(strategy):
        loss, *grads = results(lambda **a: tlk.linear_cross_entropy(**a, impl="triton"), arguments, names)
    if ignored:
        assert loss.isnan()
        assert all(not grad.any() for grad in grads)
        return
    for value, expected in zip((loss, *grads), results(LCE.pytorch, harness.widened(arguments), names), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)


def test_explain_names_the_strategy():
    arguments = LCE.cases[0].make(0)
    assert "served by triton, lean: without logits" in tlk.explain(tlk.linear_cross_entropy, **arguments, impl="triton")
    arguments = LD.cases[0].make(0)
    with linear.forced("chunks"):
        report = tlk.explain(tlk.linear_distillation, **arguments, impl="triton")
    assert "served by triton, in chunks of 6 rows" in report


@pytest.mark.parametrize("layout", harness.LAYOUTS[:3])
def test_forward_and_backward_multiply_the_same_layout(layout):
    """Their logits were rounded differently for every second element of a tensor: gradients had 5 times the error."""
    input = harness.lay_out(torch.randn(12, 8, generator=harness.generator(0)), layout)
    layer = input, torch.randn(30, 8, generator=harness.generator(1)), None
    none, every = linear.Needs(False, False, False), linear.Needs(True, True, False)
    plans = [linear.plan([layer], [needs], "chunks") for needs in (none, every)]
    forward = linear.Sweep(layer, none, plans[0])
    backward = linear.Sweep(layer, every, plans[1], torch.arange(12).remainder(3).eq(0).unsqueeze(1))
    assert forward.input.stride() == backward.input.stride()
    assert torch.equal(forward.input, input)
