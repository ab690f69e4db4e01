"""Rows that do not count in linear cross entropy: they are not multiplied, and what they hold does not matter."""

import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import BF16, F16, F32, F64, LAYER, MIXED, call, layer, make, pytorch, same

import tlkernels as tlk
from tlkernels._core import triton
from tlkernels._core.triton import counted, linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("linear_cross_entropy")
on_cpu = pytest.mark.usefixtures("needs_native")

N = 12
PATTERNS = {
    "none": torch.zeros(N, dtype=torch.bool),
    "all": torch.ones(N, dtype=torch.bool),
    "first": torch.arange(N) == 0,
    "last": torch.arange(N) == N - 1,
    "alternating": torch.arange(N) % 2 == 0,
    "most": torch.arange(N) % 5 != 3,
    "one row": torch.tensor([True]),
}
FILLS = torch.tensor([math.nan, math.inf, -math.inf])
patterns = pytest.mark.parametrize("pattern", PATTERNS)
num_valids = pytest.mark.parametrize("known", [False, True], ids=["counted", "num_valid"])


def lost(arguments, rows, ignored=True):
    """Return the arguments with these rows ignored, or left alone, and filled with what is not finite."""
    made = dict(arguments)
    if ignored:
        made["target"] = arguments["target"].masked_fill(rows, -100)
    fills = FILLS.to(arguments["input"].dtype).repeat(len(rows))[: len(rows), None]
    made["input"] = torch.where(rows[:, None], fills, arguments["input"].detach()).requires_grad_()
    return made


def zeros(arguments, rows):
    """Return the arguments in float64 with zeros in these rows."""
    wide = harness.widened(arguments)
    wide["input"] = arguments["input"].detach().masked_fill(rows[:, None], 0).double()
    return wide | {name: wide[name].detach().requires_grad_() for name in LAYER}


def results(function, arguments):
    loss = function(**arguments)
    upstream = (1 + torch.arange(loss.numel(), dtype=loss.dtype)).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, layer(arguments), upstream)


def agree(ours, right, dtype=F64):
    for a, b in zip(ours, right, strict=True):
        tolerance = {F64: 1e-10, F32: 1e-5, BF16: 4e-2, F16: 1e-2}[dtype]
        same(a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.nan_to_num().abs().max()))


@patterns
@num_valids
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, MIXED | {"reduction": "none"}, MIXED], ids=harness.words)
def test_ignored_rows(impl, pattern, known, options):
    rows = PATTERNS[pattern]
    arguments = lost(call((len(rows),), weighted=bool(options), ignore_index=-100, **options), rows)
    valid = int((arguments["target"] != -100).sum())
    right = results(pytorch, zeros(arguments, arguments["target"] == -100))
    ours = results(tlk.linear_cross_entropy, arguments | ({"num_valid": valid} if known else {}) | {"impl": impl})
    if not valid:  # PyTorch's gradients are NaN
        right = right[0], *(torch.zeros_like(grad) for grad in right[1:])
    agree(ours, right)
    assert not ours[1][arguments["target"] == -100].any()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@num_valids
def test_dtypes(impl, dtype, reduction, known):
    rows = PATTERNS["most"]
    arguments = lost(call((N,), 16, dtype=dtype, reduction=reduction, ignore_index=-100), rows)
    arguments["target"][3] = 5
    rows = arguments["target"] == -100
    right = results(pytorch, zeros(arguments, rows))
    number = {"num_valid": int((~rows).sum())} if known else {}
    agree(results(tlk.linear_cross_entropy, arguments | number | {"impl": impl}), right, dtype)


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("strategy", ["", *linear.STRATEGIES])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, MIXED | {"reduction": "none"}, MIXED], ids=harness.words)
@num_valids
def test_row_weight(impl, target, options, known, strategy, monkeypatch):
    """Rows of weight 0 are not there: they hold NaN. Weights may be negative."""
    if strategy and impl != "triton":
        pytest.skip("Triton alone has strategies")
    monkeypatch.setenv("TLKERNELS_LINEAR", strategy)
    weights = torch.linspace(-1, 2, N).half()
    weights[::3] = 0
    arguments = lost(call((N,), target=target, weighted=True, **options), weights == 0, ignored=False)
    ignored = arguments["target"] == -100 if target == "indices" else torch.zeros(N, dtype=torch.bool)
    number = {"num_valid": int((~ignored).sum())} if known else {}
    right = results(pytorch, zeros(arguments, weights == 0) | {"row_weight": weights.double()})
    ours = results(tlk.linear_cross_entropy, arguments | number | {"row_weight": weights, "impl": impl})
    agree(ours, right)
    assert not ours[1][weights == 0].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_gradient_of_row_weight(impl, reduction, target):
    """It is the row's loss, also where the weight is 0."""
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0, 3.0], dtype=F64, requires_grad=True)
    arguments = call(target=target, reduction=reduction)
    ours = tlk.linear_cross_entropy(**arguments, row_weight=weights, impl=impl)
    right = pytorch(**arguments, row_weight=weights)
    inputs = (*layer(arguments), weights)
    upstream = torch.rand_like(ours)
    same(ours, right)
    for create_graph in (False, True):
        grads = [torch.autograd.grad(loss, inputs, upstream, retain_graph=True, create_graph=create_graph)
                 for loss in (ours, right)]  # fmt: skip
        same(*grads)
    mixed = [sum(grad.square().sum() for grad in each) for each in grads]
    same(*(torch.autograd.grad(each, inputs) for each in mixed))


@patterns
@num_valids
@pytest.mark.parametrize("row_weight", [None, 2.0])
def test_statistics(impl, pattern, known, row_weight):
    """Of a row that does not count they are 0, and their gradient is 0."""
    rows = PATTERNS[pattern]
    arguments = lost(call((len(rows),), **MIXED), rows)
    ignored = arguments["target"] == -100
    more = {"num_valid": int((~ignored).sum())} if known else {}
    if row_weight is not None:
        more["row_weight"] = torch.full((len(rows),), row_weight)
        more["row_weight"][-1] = 0
        arguments = lost(arguments, torch.arange(len(rows)) == len(rows) - 1, ignored=False)
        arguments["input"] = lost(arguments, rows)["input"]
    absent = ignored.clone()
    absent[-1] |= row_weight is not None
    ours = tlk.linear_cross_entropy_stats(**arguments, **more, impl=impl)
    wide = zeros(arguments, absent)
    logits = MIXED["softcap"] * torch.tanh(F.linear(*layer(wide)) / MIXED["softcap"]) / MIXED["temperature"]
    log_p = logits.log_softmax(1)
    right = logits.logsumexp(1).masked_fill(absent, 0), -(log_p.exp() * log_p).sum(1).masked_fill(absent, 0)
    same((ours.lse, ours.entropy), right)
    assert torch.equal(ours.correct, (logits.argmax(1) == arguments["target"]) & ~absent)
    upstream = torch.rand(2, len(rows), dtype=F64).unbind()
    agree(torch.autograd.grad([ours.lse, ours.entropy], layer(arguments), upstream),
          torch.autograd.grad(right, layer(wide), upstream))  # fmt: skip


@num_valids
def test_chunks(impl, known, monkeypatch):
    """Several chunks of rows that count: CUDA's and Triton's. The next test has the CPU's."""
    monkeypatch.setenv("TLKERNELS_CHUNK_BYTES", str(128 * 600 * 8))
    monkeypatch.setenv("TLKERNELS_LINEAR", "chunks")
    rows = torch.rand(500, generator=harness.generator(0)) < 0.4
    arguments = lost(call((500,), 24, 600), rows)
    ignored = arguments["target"] == -100
    number = {"num_valid": int((~ignored).sum())} if known else {}
    for reduction in ("mean", "none"):
        arguments["reduction"] = reduction
        right = results(pytorch, zeros(arguments, ignored))
        agree(results(tlk.linear_cross_entropy, arguments | number | {"impl": impl}), right)


@on_cpu
def test_chunks_on_cpu():
    rows = torch.arange(1000) % 2 == 0
    arguments = lost(make((1000,), 2, 70001, F32, "indices", True, False, {}, 0), rows)
    arguments |= {name: arguments[name].requires_grad_() for name in LAYER}
    kept = arguments["target"] != -100
    alone = arguments | {
        "input": arguments["input"][kept].detach().requires_grad_(),
        "target": arguments["target"][kept],
    }
    ours = results(lambda **a: tlk.linear_cross_entropy(**a, impl="native"), arguments)
    right = results(pytorch, alone)
    agree([ours[0], ours[1][kept], *ours[2:]], right, F32)
    assert not ours[1][~kept].any()


def multiplied(function):
    """Return the number of rows in each matrix product of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    shapes = [event.input_shapes[-3:] for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    return [sizes for each in shapes for sizes in each]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", ["linear_cross_entropy", "linear_distillation"])
def test_only_rows_that_count_are_multiplied(reduction, loss):
    """5 of 11 rows; no other size of the call is 11 or 5."""
    if not harness.on_cuda_host(loss) and not tlk._core.native.available():
        pytest.skip("no native implementation")
    target = torch.randint(0, 37, (11,))
    target[[0, 3, 4, 10]] = -100
    row_weight = torch.ones(11)
    row_weight[[0, 6, 7]] = 0
    x, w = torch.randn(11, 6, requires_grad=True), torch.randn(37, 6, requires_grad=True)
    options = {"row_weight": row_weight, "reduction": reduction}

    def run(**more):
        if loss == "linear_cross_entropy":
            value = tlk.linear_cross_entropy(x, w, target, **options, **more)
        else:
            value = tlk.linear_distillation(x, w, x.detach(), w.detach(), target, **options, **more)
        value.sum().backward()

    for target_ in harness.targets(loss=loss):
        if target_.impl != "native" or target_.isa == harness.CUDA_HOST:
            continue
        with harness.forced(target_) as name:
            sizes = multiplied(lambda: run(impl=name))
        assert sizes and not any(11 in each for each in sizes)
        assert all(5 in each or {*each} <= {6, 37} for each in sizes)


def test_only_num_valid_rows_are_multiplied(monkeypatch):
    """Without a wait, on CUDA and in Triton."""
    target = torch.tensor([-100, 1, 2, -100, 4, 5, -100, 7, -100, -100, -100])
    x, w = torch.randn(11, 6, requires_grad=True), torch.randn(37, 6, requires_grad=True)
    for each in harness.targets(loss="linear_cross_entropy"):
        if each.impl != "triton" and each.isa != harness.CUDA_HOST:
            continue
        monkeypatch.setenv("TLKERNELS_LINEAR", "chunks")
        with harness.forced(each) as name:
            run = lambda: tlk.linear_cross_entropy(x, w, target, num_valid=5, impl=name).backward()  # noqa: E731
            sizes = multiplied(run)
        assert sizes and not any(11 in each for each in sizes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_wrong_num_valid(impl, number, reduction, request, monkeypatch):
    """ValueError where the host knows the rows, else NaN; ValueError with TLKERNELS_CHECK=1 too."""
    arguments = call((6,), reduction=reduction)
    arguments["target"] = torch.tensor([1, -100, 3, 4, 5, 6])
    with monkeypatch.context() as patch:
        patch.setenv("TLKERNELS_CHECK", "1")
        with pytest.raises(ValueError, match=f"num_valid: expected 5, .* got {number}"):
            tlk.linear_cross_entropy(**arguments, num_valid=number, impl=impl)
    host = "cuda_host" in request.node.name
    if impl == "triton":
        monkeypatch.setattr(counted, "check_num_valid", lambda *args: None)
    elif not host:
        return
    loss, *grads = results(tlk.linear_cross_entropy, arguments | {"num_valid": number, "impl": impl})
    assert loss.isnan().any() and (reduction == "none" or loss.isnan())
    assert all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("known", [0, 6])
def test_num_valid_of_all_or_none(impl, known):
    arguments = call(dtype=F32, reduction="sum")
    arguments["target"] = torch.arange(6) if known else torch.full((6,), -100)
    arguments["input"] = arguments["input"].detach() if known else torch.full((6, 5), math.nan)
    arguments["input"].requires_grad_()
    ours = results(tlk.linear_cross_entropy, arguments | {"num_valid": known, "impl": impl})
    if known:
        agree(ours, results(pytorch, arguments), F32)
    else:
        assert all(not value.any() for value in ours)


@pytest.mark.skipif(not triton.available(), reason="needs Triton")
def test_explain_says_which_rows_are_multiplied():
    x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    words = {}
    for strategy in linear.STRATEGIES:
        with linear.forced(strategy):
            for number in (None, 4):
                report = tlk.explain(tlk.linear_cross_entropy, x, w, y, num_valid=number, impl="triton")
                words[strategy, number] = report.split("; ")[1].split("\n")[0]
    assert words == {
        ("chunks", None): "multiplies ignored rows too, since num_valid is not given",
        ("lean", None): "tiles of ignored rows end at once",
        ("chunks", 4): "multiplies only the rows that count",
        ("lean", 4): "multiplies only the rows that count",
    }
    if tlk._core.native.available():
        report = tlk.explain(tlk.linear_cross_entropy, x, w, y)
        assert "served by native, multiplies only the rows that count" in report
