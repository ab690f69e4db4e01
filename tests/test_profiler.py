"""While a profiler runs, every call of a loss has a range of the loss's name in the trace, and its backward one too."""

import inspect

import harness
import pytest
import torch
from battery import LOSSES, leaves
from helpers import IMPLEMENTATIONS
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tlkernels as tlk
from tlkernels._core import ranges
from tlkernels._core.dispatch import Implementation, resolve

N, D, C = 6, 4, 5
KERNELS = [impl for impl in IMPLEMENTATIONS if impl != "reference"]


def normal(*shape):
    return torch.randn(*shape, requires_grad=True)


def labels():
    return torch.arange(N) % C


CALLS = [
    pytest.param(name, options, id="-".join((name, *options.values())))
    for name, loss in LOSSES.items()
    for options in ({}, {"reduction": "none"})
    if options.keys() <= inspect.signature(loss.function).parameters.keys()
]
STATISTICS = {
    "cross_entropy_stats": lambda **o: tlk.cross_entropy_stats(normal(N, C), labels(), **o),
    "linear_cross_entropy_stats": lambda **o: tlk.linear_cross_entropy_stats(normal(N, D), normal(C, D), labels(), **o),
}


def traced(run):
    """Return the names of the losses' ranges in the trace of `run`, in order."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    events = sorted(prof.events(), key=lambda event: event.time_range.start)
    ranges = {f"tlkernels::{loss}" for loss in (*LOSSES, *STATISTICS)}
    return [event.name for event in events if event.name.removesuffix(" backward") in ranges]


def one_of_each(loss, impl):
    return [f"tlkernels::{loss}"] + [f"tlkernels::{loss} backward"] * (impl != "reference")


@pytest.mark.parametrize(("name", "options"), CALLS)
def test_one_range_for_each_call_and_each_backward(name, options, any_impl):
    loss = LOSSES[name]
    case = next(case for case in loss.cases if case.small)
    arguments = {**case.make(0), **options}
    tensors, put = harness.split(arguments, case.wants_grad)

    def run():
        loss.function(**put(*leaves(tensors)), impl=any_impl).sum().backward()

    # The hard part of a top-k distillation at another temperature selects its class in a second call.
    calls = 2 if "topk" in name and arguments.get("hard_weight") and arguments.get("temperature", 1) != 1 else 1
    of_a_run = one_of_each(name, any_impl)
    expected = [of_a_run[0]] * calls + of_a_run[1:] * calls
    assert traced(lambda: (run(), run())) == expected * 2


@pytest.mark.parametrize("loss", STATISTICS)
def test_one_range_for_statistics(loss, any_impl):
    assert traced(lambda: STATISTICS[loss](impl=any_impl).loss.backward()) == one_of_each(loss, any_impl)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_backward_of_a_checkpointed_loss(impl):
    """Saved-tensor hooks and several differentiable results take the rule's own node."""
    input, weight = normal(N, D), normal(C, D)

    def run():
        loss = checkpoint(tlk.linear_cross_entropy, input, weight, labels(), impl=impl, use_reentrant=False)
        loss.backward()

    names = traced(run)
    assert names.count("tlkernels::linear_cross_entropy") == 2  # checkpointing runs the forward again
    assert names.count("tlkernels::linear_cross_entropy backward") == 1


def test_the_range_of_a_node_without_a_profiler_has_no_name():
    loss = tlk.cross_entropy(normal(N, C), labels())
    assert traced(loss.backward) == []


def test_no_range_without_a_profiler(monkeypatch):
    def refuse(*args):
        raise AssertionError("a range was opened")

    monkeypatch.setattr(autograd_profiler, "record_function", refuse)
    implementation = Implementation("reference", lambda call: None, lambda call: call)
    assert resolve("mse", [implementation], torch.ones(1), "auto") is implementation
    tlk.cross_entropy(normal(N, C), labels()).backward()
    with pytest.raises(AssertionError, match="a range was opened"), profile():
        tlk.cross_entropy(normal(N, C), labels())
    assert not ranges.of_backward()


def test_an_error_closes_the_range():
    with profile(), pytest.raises(IndexError):
        tlk.cross_entropy(normal(N, C), torch.full((N,), C))
    assert not ranges.of_backward()


def test_old_profilers_too():
    with autograd_profiler.profile() as prof:
        tlk.mse(normal(N), normal(N))
    assert "tlkernels::mse" in {event.name for event in prof.function_events}


def test_counting_operations_at_the_same_time(any_impl):
    input, weight = torch.randn(N, D), torch.randn(C, D)
    with profile(), FlopCounterMode(display=False) as counter:
        tlk.linear_cross_entropy(input, weight, labels(), impl=any_impl)
    assert counter.get_total_flops() == 2 * N * D * C


def test_explain_opens_no_range():
    logits = normal(N, C)
    plain = tlk.explain(tlk.cross_entropy, logits, labels())
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        assert tlk.explain(tlk.cross_entropy, logits, labels()) == plain
    assert not any(event.name.startswith("tlkernels::") for event in prof.events())


def test_compiled_calls_have_no_range_and_are_not_compiled_again():
    input, weight = normal(N, D), normal(C, D)
    compiled = torch.compile(tlk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    right = compiled(input, weight, labels())
    with torch._dynamo.config.patch(error_on_recompile=True):
        names = traced(lambda: torch.testing.assert_close(compiled(input, weight, labels()), right))
    assert names == []


def test_compiled_while_a_profiler_runs():
    input, weight = normal(N, D), normal(C, D)
    torch._dynamo.reset()
    compiled = torch.compile(tlk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with profile(activities=[ProfilerActivity.CPU]):
        loss = compiled(input, weight, labels())
        loss.backward()
    right = tlk.linear_cross_entropy(input, weight, labels())
    torch.testing.assert_close(loss, right)


def test_torch_func(any_impl):
    logits = torch.randn(3, N, C)
    run = torch.func.vmap(torch.func.grad(lambda x: tlk.cross_entropy(x, labels(), impl=any_impl)))
    right = run(logits)
    assert traced(lambda: torch.testing.assert_close(run(logits), right)) == ["tlkernels::cross_entropy"]


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    logits = torch.randn(N, C)
    with profile(activities=[ProfilerActivity.CPU]):
        graph = make_fx(lambda x: tlk.cross_entropy(x, labels()))(logits)
    torch.testing.assert_close(graph(logits), tlk.cross_entropy(logits, labels()))


def test_nested_losses_keep_their_names():
    inner = ranges.in_range("inner", lambda call: ranges.of_backward())
    outer = ranges.in_range("outer", lambda call: (inner(call), ranges.of_backward()))
    with profile():
        assert outer(None) == ("tlkernels::inner backward", "tlkernels::outer backward")
