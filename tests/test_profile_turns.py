"""The losses of a profile alone, and the steps in which their implementations take turns."""

import time

import pytest
import torch
import torch.nn.functional as F
from profile_loops import CLASSES, ROWS, WIDTH, Net, Rows, eager, ours, phases_of, quickly, train
from torch import nn

import tlkernels as tlk
from tlkernels.losses.cross_entropy.call import plain_options
from tlkernels.losses.linear_cross_entropy import call as linear_call
from tlkernels.losses.linear_cross_entropy import ops as linear_ops
from tlkernels.profiling import profile, replay, torch_calls
from tlkernels.profiling.calls import OurCall
from tlkernels.profiling.discover import Recorded, _spans


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    with quickly(monkeypatch):
        yield


def test_steps_are_measured_with_each_implementation(tmp_path, monkeypatch):
    plain = tlk.cross_entropy

    def slow(*args, impl, **kwargs):
        time.sleep(0.2 if impl == "native" else 0)
        return plain(*args, impl=impl, **kwargs)

    monkeypatch.setitem(torch_calls._OURS, "cross_entropy", slow)
    p = train(Net(trunk_seconds=(0.01, 0.01)), eager, tmp_path, compare=True)
    result = p.result
    assert p.done and result["baseline"] == "as it is"
    steps, (loss,) = result["step_speedups"], result["losses"]
    assert set(steps) == {"as it is", "native"}
    slowed = steps["native"]["seconds"][1] - steps["as it is"]["seconds"][1]
    assert 0.1 < slowed < 0.35, "it sleeps once a step"
    assert steps["native"]["speedup"][1] < 0.6
    assert loss["ways"]["native"]["seconds"] > 0.2 and loss["ways"]["native"]["speedup"] < 0.1
    assert "The loss by native makes the step" in p.report and "it is slower" in p.report


def test_our_loss_takes_turns_with_pytorch(tmp_path):
    seen = []
    original = F.cross_entropy

    def loss(logits, ids):
        return ours(logits, ids)

    from tlkernels.profiling import lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines.F, "cross_entropy", lambda *a, **k: (seen.append(1), original(*a, **k))[1])
        p = train(Net(), loss, tmp_path, compare=True)
    assert set(p.result["step_speedups"]) == {"as it is", "eager"}
    assert p.result["baseline"] == "eager"
    assert p.seen == 11 + 2 * (1 + 3)
    assert len(seen) >= 4, "the steps with eager's loss call it"


def test_an_implementation_that_is_wrong_has_no_speedup_and_trains_no_step(tmp_path, monkeypatch):
    plain = tlk.cross_entropy
    monkeypatch.setitem(
        torch_calls._OURS, "cross_entropy",
        lambda *args, impl, **kwargs: plain(*args, impl=impl, **kwargs) * (1.001 if impl == "native" else 1),
    )  # fmt: skip
    p = train(Net(), eager, tmp_path, compare=True)
    native = p.result["losses"][0]["ways"]["native"]
    assert native["speedup"] is None
    assert native["error"]["gradient"] == pytest.approx(1e-3, rel=0.01)
    assert p.result["step_speedups"] == {}
    assert any("No steps with native: error of the" in note for note in p.result["notes"])


def test_a_step_that_a_scaler_skips_is_measured_again(tmp_path):
    net, ids = Net(), Rows().ids[:ROWS]
    optimiser, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    skipped = {4, 7, 9}
    with profile(net, steps=3, folder=tmp_path, compare=False) as p:
        for number in range(1, 100):
            loss = eager(net(ids), ids)
            if number in skipped:
                time.sleep(0.1)
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            if p.step():
                break
    assert p.seen == 11 + len(skipped)
    assert p.result["step"]["seconds"][2] < 0.1
    assert p.result["losses"][0]["calls"] == 1


def test_a_loss_that_the_loop_holds_by_a_reference_is_seen_and_replaced(tmp_path, monkeypatch):
    held, calls = {"loss": F.cross_entropy}, []
    plain = tlk.cross_entropy

    def loss(logits, ids):
        calls.append([])
        value = held["loss"](logits.flatten(0, 1), ids.flatten())
        calls.append(None)
        return value

    def served(*args, impl, **kwargs):
        if calls[-1] is not None:  # not in a replay
            calls[-1].append(impl)
        return plain(*args, impl=impl, **kwargs)

    monkeypatch.setitem(torch_calls._OURS, "cross_entropy", served)
    p = train(Net(), loss, tmp_path, compare=True)
    assert {"head and loss forward", "head and loss backward", "forward of the trunk"} <= set(phases_of(p))
    assert set(p.result["step_speedups"]) == {"as it is", "native"}
    assert calls[::2].count(["native"]) == 1 + 3


def test_calls_that_an_implementation_does_not_serve_are_counted(tmp_path):
    def loss(logits, ids):
        logits, ids = logits.flatten(0, 1), ids.flatten()
        few = F.cross_entropy(logits[:2], ids[:2], size_average=False, reduce=True)
        return F.cross_entropy(logits, ids) + few

    with pytest.warns(UserWarning, match="size_average"):
        p = train(Net(), loss, tmp_path, compare=True)
    assert "In these steps 4 calls of losses had no other way" in "\n".join(p.result["notes"])


@pytest.mark.full
def test_compiled_models_stay_compiled(tmp_path):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES))

        def forward(self, ids):
            return eager(self.layers(ids), ids)

    net = WithLoss()
    run = torch.compile(net, backend=backend, fullgraph=True)
    optimiser, ids = torch.optim.SGD(net.parameters(), lr=0.1), Rows().ids[:ROWS]
    with profile(steps=3, folder=tmp_path) as p:
        for number in range(1, 100):
            run(ids).backward()
            optimiser.step()
            if number == 2:
                compiled = len(graphs)
            if p.step():
                break
    assert len(graphs) == compiled, "no step after the warm-up compiles anew"
    assert set(phases_of(p)) >= {"forward, not told apart", "backward, not told apart", "optimiser"}
    assert p.result["losses"] == [] and any("In a graph of torch.compile" in note for note in p.result["notes"])


def test_many_rows_are_compared_at_some_of_them(monkeypatch):
    rows, sizes = 3000, []
    input, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    target = torch.randint(20, (rows,))
    target[::3] = -100
    options = plain_options(None, -100, 0.0, 1.0, None, 0.0)
    counted = int((target >= 0).sum())
    given = linear_call.Arguments(input, weight, None, target, options, "mean", False, None, counted)
    arguments = linear_call.check(given)
    chosen = next(way for way in linear_ops.IMPLEMENTATIONS if way.name == "native")
    call = OurCall("linear_cross_entropy", linear_ops.IMPLEMENTATIONS, arguments, chosen)
    widened = replay._wide

    def seen(leaf):
        sizes.append(leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.dim() else None)
        return widened(leaf)

    monkeypatch.setattr(replay, "_wide", seen)
    found = replay.replay(Recorded(call, 2, 2 * rows * 8, rows * 8, None, call.logits(), False))
    assert rows not in sizes and 1024 in sizes and 20 in sizes
    for way in found["ways"].values():
        assert way["wrong"] is None and 0 < way["error"]["gradient"] < 1e-5
        assert way["step_seconds"] == pytest.approx(2 * way["seconds"])
    assert found["ways"]["native"]["speedup"] == pytest.approx(
        found["ways"]["eager"]["seconds"] / found["ways"]["native"]["seconds"]
    )


def test_a_loss_over_processes_is_not_computed_alone(tmp_path):
    class Spread(torch.Tensor):
        pass

    logits = torch.randn(4, 5).as_subclass(Spread).requires_grad_()
    call = torch_calls.TorchCall(F.cross_entropy, (logits, torch.arange(4)), {})
    assert _spans(call)
    found = replay.replay(Recorded(call, 1, 20, 20, None, call.logits(), True))
    assert found["ways"] == {} and "spread over processes" in found["refused"]["native"]
