"""selective_log_softmax and its linear form: edge cases, errors, rows without a class. The battery has the rest."""

import math
import re
from pathlib import Path

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from selective_log_softmax_cases import BF16, F16, F32, F64, lines, make

import tlkernels as tlk
from tlkernels.losses.linear_selective_log_softmax import call as linear
from tlkernels.losses.linear_selective_log_softmax.ops import IMPLEMENTATIONS as LINEAR
from tlkernels.losses.selective_log_softmax.call import Arguments, Options
from tlkernels.losses.selective_log_softmax.ops import IMPLEMENTATIONS

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
impl = helpers.impl_fixture("selective_log_softmax")
INF = math.inf
PAGE = Path(__file__).parents[1] / "docs/losses/selective_log_softmax.md"


def both(impl, logits, index, **options):
    """Return log-probabilities, entropy and the gradient for upstreams that differ: ours, and PyTorch's in float64."""

    def run(function, x):
        x = x.detach().requires_grad_()
        log_probs, entropy = function(x, index, return_entropy=True, **options)
        g = torch.linspace(-1, 2, max(1, log_probs.numel())).view_as(log_probs).to(x)
        (grad,) = torch.autograd.grad((log_probs, entropy), x, (g, torch.full_like(entropy, 0.5)))
        return log_probs.detach(), entropy.detach(), grad

    ours = run(lambda *args, **kwargs: tlk.selective_log_softmax(*args, **kwargs, impl=impl), logits)
    return ours, run(lines, logits.double())


def same(results, expected, rtol=1e-5, atol=1e-6):
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("selected", [0, 1, 7])
def test_each_result_keeps_its_budget(impl, dtype, selected):
    """Log-probabilities, entropy, and the gradient by each alone."""

    def draw(seed):
        logits, index = make((5, 77), selected, dtype)(seed).values()
        for part in (0, 1):
            results = []
            for x, function, how in ((logits, tlk.selective_log_softmax, {"impl": impl}), (logits, lines, {}),
                                     (logits.double(), lines, {})):  # fmt: skip
                value, grad = harness.gradients(
                    lambda x, function=function, how=how, part=part: function(
                        x, index, temperature=0.8, return_entropy=True, **how
                    )[part],
                    x,
                    torch.linspace(0.5, 1.5, 5 if part or not selected else 5 * selected).view(
                        (5,) if part or not selected else (5, selected)
                    ),
                )
                results.append((value, grad))
            for name, *values in zip((f"value {part}", f"gradient {part}"), *results, strict=True):
                yield name, *values

    harness.check_budgets(dtype, draw)


def test_index_without_a_last_dimension(impl):
    """As TRL's function takes it."""
    logits, index = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    log_probs = tlk.selective_log_softmax(logits, index, impl=impl)
    torch.testing.assert_close(log_probs, logits.gather(2, index[..., None])[..., 0] - logits.logsumexp(2))
    torch.testing.assert_close(tlk.selective_log_softmax(logits, index[..., None], impl=impl)[..., 0], log_probs)


def test_one_row_and_no_row_and_no_class(impl):
    logits = torch.randn(9)
    log_probs, entropy = tlk.selective_log_softmax(logits, torch.tensor(4), return_entropy=True, impl=impl)
    assert log_probs.shape == entropy.shape == ()
    same((log_probs, entropy), lines(logits, torch.tensor(4), return_entropy=True))
    assert tlk.selective_log_softmax(logits, torch.tensor([4, 2]), impl=impl).shape == (2,)
    for rows in ((0,), (0, 3), (2, 0)):
        x = torch.randn(*rows, 9, requires_grad=True)
        for index in (torch.zeros(rows, dtype=torch.int64), torch.zeros(*rows, 2, dtype=torch.int64)):
            log_probs, entropy = tlk.selective_log_softmax(x, index, return_entropy=True, impl=impl)
            assert (log_probs.shape, entropy.shape) == (index.shape, rows)
            assert torch.autograd.grad(log_probs.sum() + entropy.sum(), x)[0].shape == x.shape
    x = torch.randn(3, 9)
    log_probs, entropy = tlk.selective_log_softmax(
        x, torch.zeros(3, 0, dtype=torch.int64), return_entropy=True, impl=impl
    )
    assert log_probs.shape == (3, 0)
    same([entropy], [torch.distributions.Categorical(logits=x).entropy()])


@pytest.mark.parametrize("classes", [9, 5000])
def test_a_class_that_is_selected_twice_gets_both_gradients(impl, classes):
    logits, index = torch.randn(3, classes), torch.tensor([[1, 1, 1], [0, 2, 0], [classes - 1, 3, classes - 1]])
    same(*both(impl, logits, index))


@pytest.mark.parametrize("classes", [9, 5000])
def test_minus_infinity(impl, classes):
    """Probability 0; a whole row of it is NaN in that row alone."""
    logits, index = torch.randn(4, classes), torch.tensor([[0, 3], [1, 2], [0, 1], [4, 4]])
    logits[0, 1:3] = logits[1, 1] = logits[2] = -INF
    (log_probs, entropy, grad), (right, right_entropy, _) = both(impl, logits, index)
    same((log_probs, entropy), (right, right_entropy))
    assert log_probs[1, 0] == -INF and entropy[[0, 1, 3]].isfinite().all()
    assert grad[[0, 1, 3]].isfinite().all() and grad[2].isnan().any()
    low = logits.double().masked_fill(logits == -INF, -1e4)
    expected = both(impl, low, index)[1][2][[0, 3]]
    same([grad[[0, 3]]], [expected])
    assert torch.equal(grad[0, 1:3], torch.zeros(2))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_of_ten_thousand(impl, offset):
    logits = torch.randn(4, 5000).mul(4).round().div(4) + offset
    same(*both(impl, logits, torch.randint(5000, (4, 3))), atol=1e-5)


def test_the_gradient_of_a_selected_class_is_rounded_once(impl):
    """1 - p where p is nearly 1: a p that was rounded to bfloat16 first would leave nothing of it."""
    logits = torch.zeros(2, 40, dtype=BF16)
    logits[:, 3] = torch.tensor([12.0, 9.0])
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(tlk.selective_log_softmax(x, torch.tensor([3, 3]), impl=impl).sum(), x)
    right = 1 - logits.double().softmax(1)[:, 3]
    torch.testing.assert_close(grad[:, 3].double(), right, rtol=2**-8, atol=0)


def test_rows_that_do_not_lie_at_one_distance(impl):
    whole = torch.randn(3, 6, 11)
    index = torch.randint(11, (3, 5))
    same(*both(impl, whole[:, :-1], index))
    same(*both(impl, whole.transpose(0, 1)[1:], torch.randint(11, (5, 3))))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0}], ids=["plain", "bent"])
def test_rows_without_a_class(impl, options):
    """In the ops -1 is no class; a row of nothing else is not read. top-k distillation passes such rows."""
    logits = torch.randn(4, 9)
    logits[1] = math.nan
    index = torch.tensor([[2, -1, 2], [-1, -1, -1], [-1, 8, 0], [5, 6, -1]])
    options = Options(**{"temperature": 1.0, "softcap": None, **options}, entropy=True)
    x = logits.requires_grad_()
    log_probs, entropy = run(IMPLEMENTATIONS, impl, Arguments(x, index, options))
    assert torch.equal(log_probs == -INF, index < 0) and entropy[1] == 0
    g, h = torch.rand(4, 3), torch.rand(4)
    (grad,) = torch.autograd.grad((log_probs, entropy), x, (g, h))
    assert torch.equal(grad[1], torch.zeros(9))
    kept = logits.detach()[[0, 2, 3]].double().requires_grad_()
    bent = {"temperature": options.temperature, "softcap": options.softcap}
    right, right_entropy = lines(kept, index[[0, 2, 3]].clamp(min=0), return_entropy=True, **bent)
    there = index[[0, 2, 3]] >= 0
    g_kept = g[[0, 2, 3]].double().masked_fill(~there, 0)
    (right_grad,) = torch.autograd.grad((right, right_entropy), kept, (g_kept, h[[0, 2, 3]].double()))
    same((log_probs[[0, 2, 3]][there], entropy[[0, 2, 3]], grad[[0, 2, 3]]), (right[there], right_entropy, right_grad))


def run(implementations, impl, call):
    return next(each for each in implementations if each.name == impl).run(call)


@pytest.fixture(params=harness.targets(loss="linear_selective_log_softmax"), ids=str)
def linear_impl(request):
    with harness.forced(request.param) as name:
        yield name


def test_rows_without_a_class_in_the_linear_form(linear_impl):
    """They add nothing to the gradients of the layer, even if their features are NaN."""
    layer = [torch.randn(4, 3), torch.randn(9, 3), torch.randn(9)]
    layer[0][1] = math.nan
    index = torch.tensor([[2, -1], [-1, -1], [8, 0], [5, 6]])
    leaves = [tensor.requires_grad_() for tensor in layer]
    call = linear.Arguments(linear.Layer(*leaves), index, Options(0.7, 3.0, entropy=True))
    log_probs, entropy = run(LINEAR, linear_impl, call)
    assert torch.equal(log_probs == -INF, index < 0) and entropy[1] == 0
    g, h = torch.rand(4, 2), torch.rand(4)
    grads = torch.autograd.grad((log_probs, entropy), leaves, (g, h))
    assert torch.equal(grads[0][1], torch.zeros(3))
    kept = [0, 2, 3]
    wide = [tensor.detach().double().requires_grad_() for tensor in (layer[0].detach()[kept], *layer[1:])]
    right = lines(F.linear(*wide), index[kept].clamp(min=0), temperature=0.7, softcap=3.0, return_entropy=True)
    there = index[kept] >= 0
    expected = torch.autograd.grad(right, wide, (g[kept].double().masked_fill(~there, 0), h[kept].double()))
    same((log_probs[kept][there], entropy[kept]), (right[0][there], right[1]))
    same((grads[0][kept], *grads[1:]), expected)


def test_the_linear_form_is_that_of_the_logits(linear_impl):
    x, w, b = torch.randn(2, 3, 4), torch.randn(9, 4), torch.randn(9)
    for index in (torch.randint(9, (2, 3)), torch.randint(9, (2, 3, 5)), torch.zeros(2, 3, 0, dtype=torch.int64)):
        ours = tlk.linear_selective_log_softmax(x, w, index, linear_bias=b, return_entropy=True, impl=linear_impl)
        same(ours, tlk.selective_log_softmax(F.linear(x, w, b), index, return_entropy=True, impl="reference"))


L, Y = torch.randn(2, 5), torch.tensor([0, 1])
X, W = torch.randn(2, 3), torch.randn(5, 3)


@pytest.mark.parametrize(("args", "options", "error", "message"), [
    (([1.0], Y), {}, TypeError, "logits: expected a Tensor, got list"),
    ((L.long(), Y), {}, TypeError, "logits: expected float64, float32, bfloat16 or float16, got torch.int64"),
    ((torch.tensor(1.0), Y), {}, ValueError, r"logits: expected shape \(..., C\) with C above 0, got \(\)"),
    ((L[:, :0], Y), {}, ValueError, "logits: expected shape"),
    ((L, [0, 1]), {}, TypeError, "index: expected a Tensor, got list"),
    ((L, Y.float()), {}, TypeError, "index: expected an integer dtype, got torch.float32"),
    ((L, Y.bool()), {}, TypeError, "index: expected an integer dtype, got torch.bool"),
    ((L, Y[:1]), {}, ValueError, r"index: expected shape \(2,\) or \(2, 'K'\), got \(1,\)"),
    ((L, torch.zeros(3, 2, dtype=torch.int64)), {}, ValueError, "index: expected shape"),
    ((L, torch.zeros(2, 2, 2, dtype=torch.int64)), {}, ValueError, "index: expected shape"),
    ((L, Y.to("meta")), {}, ValueError, "index: expected it on the device of the logits, cpu, got meta"),
    ((L, torch.tensor([0, 5])), {}, IndexError, r"index: expected class indices in \[0, 5\), got 5"),
    ((L, torch.tensor([-1, 0])), {}, IndexError, r"index: expected class indices in \[0, 5\), got -1"),
    ((L, Y), {"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ((L, Y), {"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
    ((L, Y), {"softcap": -1.0}, ValueError, "softcap: expected None or a finite number above 0, got -1.0"),
    ((L, Y), {"return_entropy": 1}, TypeError, "return_entropy: expected a bool, got int"),
    ((L, Y), {"impl": "cuda"}, ValueError, "impl: expected 'auto' or one of"),
])  # fmt: skip
def test_errors(any_impl, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tlk.selective_log_softmax(*args, **{"impl": any_impl, **options})


@pytest.mark.parametrize(("args", "options", "error", "message"), [
    (([1.0], W, Y), {}, TypeError, "input: expected a Tensor, got list"),
    ((X, W.double(), Y), {}, TypeError, "linear_weight: expected the dtype of input, torch.float32, got torch.float64"),
    ((X, W[:, :2], Y), {}, ValueError, r"linear_weight: expected shape \(classes, in_features\) with in_features 3"),
    ((X, W[:0], Y), {}, ValueError, "linear_weight: expected shape"),
    ((torch.tensor(1.0), W, Y), {}, ValueError, r"input: expected shape \(..., in_features\), got a 0-d tensor"),
    ((X, W, Y), {"linear_bias": W[:, 0][:4]}, ValueError, r"linear_bias: expected shape \(5,\), .* got \(4,\)"),
    ((X, W.to("meta"), Y), {}, ValueError, "linear_weight: expected it on the device of input, cpu, got meta"),
    ((X, W, Y[:1]), {}, ValueError, "index: expected shape"),
    ((X, W, torch.tensor([0, 5])), {}, IndexError, r"index: expected class indices in \[0, 5\), got 5"),
    ((X, W, Y), {"softcap": 0}, ValueError, "softcap: expected None or a finite number above 0, got 0.0"),
])  # fmt: skip
def test_errors_of_the_linear_form(any_impl, args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        tlk.linear_selective_log_softmax(*args, **{"impl": any_impl, **options})


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_compiled_index_out_of_range_raises(any_impl, wrong):
    torch._dynamo.reset()
    compiled = torch.compile(tlk.selective_log_softmax, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(L, Y, impl=any_impl), tlk.selective_log_softmax(L, Y, impl="reference"))
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|expected class indices"):
        compiled(L, torch.tensor([0, wrong]), impl=any_impl)


def test_the_policy_gradient_step_of_the_documentation():
    """It runs, and is the step of the PyTorch lines."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens = torch.randint(11, (3, 6))
        advantage, old_log_probs = torch.randn(3, 1), torch.randn(3, 5) - 2
        mask = torch.rand(3, 5) < 0.7
        function = tlk.selective_log_softmax if ours else lines
        scope = {**locals(), "torch": torch, "tlkernels": type("", (), {"selective_log_softmax": function})}
        exec(code, scope)
        results.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*results)
