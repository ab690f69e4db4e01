"""`tlkernels.profile` around real loops on the CPU."""

import gzip
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import data

import tlkernels as tlk
from tlkernels._core import dispatch
from tlkernels.bench import ceilings
from tlkernels.losses.cross_entropy.call import plain_options
from tlkernels.losses.linear_cross_entropy import call as linear_call
from tlkernels.losses.linear_cross_entropy import ops as linear_ops
from tlkernels.profiling import profile, replay, torch_calls
from tlkernels.profiling.calls import OurCall
from tlkernels.profiling.discover import Recorded, _spans
from tlkernels.profiling.events import Segment
from tlkernels.profiling.memory import Peaks
from tlkernels.profiling.result import of_phases
from tlkernels.profiling.watch import Watch
from tlkernels.train.errors import RunError

CLASSES, WIDTH, LENGTH, ROWS = 50, 16, 6, 4
CEILING = 5e9


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A replay of three rounds; the ceiling is a number, since measuring it takes seconds. Nothing was compiled yet."""
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(replay, "SECONDS", 0.0)
    monkeypatch.setattr(replay, "peak_bytes", lambda run: (run(), 1000)[1])  # without collecting all garbage
    monkeypatch.setattr(ceilings, "matmul", lambda device, dtype: torch.randn(3) is not None and CEILING)
    yield
    torch.set_num_threads(threads)


class Rows(data.Dataset):
    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.ids = torch.randint(CLASSES, (2000, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        time.sleep(self.seconds)
        return self.ids[row]


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


class SlowHead(nn.Linear):
    """Sleeps in the forward and in the backward."""

    forward_seconds = backward_seconds = 0.0

    def forward(self, x):
        time.sleep(self.forward_seconds)
        return super().forward(SlowBackward.apply(x, self.backward_seconds))


class Net(nn.Module):
    def __init__(self, dropout=0.0, trunk_seconds=(0.0, 0.0)):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout))
        self.head = SlowHead(WIDTH, CLASSES)
        self.trunk_seconds = trunk_seconds

    def hidden(self, ids):
        time.sleep(self.trunk_seconds[0])
        return SlowBackward.apply(self.trunk(self.embedding(ids)), self.trunk_seconds[1])

    def forward(self, ids):
        return self.head(self.hidden(ids))


class LossInside(Net):
    def forward(self, ids):
        return tlk.linear_cross_entropy(self.hidden(ids), self.head.weight, ids, linear_bias=self.head.bias)


class Tied(Net):
    def forward(self, ids):
        return F.linear(self.hidden(ids), self.embedding.weight)


class SlowSGD(torch.optim.SGD):
    seconds = 0.0

    def step(self, closure=None):
        time.sleep(self.seconds)
        return super().step(closure)


def eager(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def ours(logits, ids):
    return tlk.cross_entropy(logits.flatten(0, 1), ids.flatten())


def train(net, loss, folder, *, steps=1000, micro=1, seconds=0.0, optimiser=None, given=True, **options):
    """Train until all is measured; return the profile."""
    optimiser = optimiser or SlowSGD(net.parameters(), lr=0.1)
    loader = iter(data.DataLoader(Rows(seconds), batch_size=ROWS))
    options = {"steps": 3, "warmup": 2, "compare": False} | options
    with profile(net if given else None, folder=folder, **options) as p:
        for _ in range(steps):
            for ids in (next(loader) for _ in range(micro)):
                output = net(ids)
                (output if loss is None else loss(output, ids)).div(micro).backward()
            optimiser.step()
            optimiser.zero_grad()
            if p.step():
                break
    return p


def phases_of(p):
    return {row["name"]: row["seconds"] for row in p.result["phases"]}


@pytest.mark.parametrize("loss", [eager, pytest.param(ours, marks=pytest.mark.full)])
def test_each_phase_has_the_time_that_is_spent_in_it(loss, tmp_path):
    net = Net(trunk_seconds=(0.015, 0.025))
    net.head.forward_seconds, net.head.backward_seconds = 0.02, 0.03
    optimiser = SlowSGD(net.parameters(), lr=0.1)
    optimiser.seconds = 0.035
    p = train(net, loss, tmp_path, seconds=0.01, optimiser=optimiser, warmup=1)
    asleep = {
        "data": 0.01 * ROWS,
        "forward of the trunk": 0.015,
        "head and loss forward": 0.02,
        "head and loss backward": 0.03,
        "backward of the trunk": 0.025,
        "optimiser": 0.035,
    }
    found = phases_of(p)
    assert set(found) - {"other"} == set(asleep)
    for phase, seconds in asleep.items():
        assert seconds <= found[phase] <= 1.2 * seconds + 0.02, (phase, found)
    assert found["other"] < 0.02
    assert sum(row["share"] for row in p.result["phases"]) == pytest.approx(1)
    wait = p.result["starvation"]
    assert 0.01 * ROWS <= wait["seconds"] < 0.01 * ROWS + 0.02
    assert wait["share"] == pytest.approx(wait["seconds"] / p.result["step"]["seconds"][1])


def test_phases_add_up_to_the_step_on_another_clock(tmp_path):
    net, times = Net(trunk_seconds=(0.01, 0.0)), []
    optimiser, ids = torch.optim.SGD(net.parameters(), lr=0.1), Rows().ids[:ROWS]
    with profile(net, steps=3, folder=tmp_path, compare=False) as p:
        done = False
        while not done:
            start = time.perf_counter()
            time.sleep(0.005)
            eager(net(ids), ids).backward()
            time.sleep(0.015)
            optimiser.step()
            times.append(time.perf_counter() - start)
            done = p.step()
    traced = sorted(times[-3:])[1]
    assert sum(phases_of(p).values()) == pytest.approx(traced, rel=0.03)
    assert p.result["traced_step"] == {"seconds": pytest.approx(traced, rel=0.03), "steps": 3}
    found = phases_of(p)
    assert found["data"] >= 0.005, "without a DataLoader, the time before the forward"
    assert found["other"] >= 0.015, "what is in no phase is not given to one"
    assert any("No DataLoader" in note for note in p.result["notes"])


def test_the_trace_has_the_phases_and_the_ranges_of_losses(tmp_path):
    p = train(Net(), ours, tmp_path)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    drawn = [event for event in events if event.get("cat") == "phase"]
    steps, end = [], 0.0
    for event in drawn:
        if event["ts"] > end + 1:  # between two steps is a border
            steps.append({})
        end = event["ts"] + event["dur"]
        steps[-1][event["name"]] = steps[-1].get(event["name"], 0.0) + event["dur"] / 1e6
    assert len(steps) == 3
    assert sorted(steps, key=lambda step: sum(step.values()))[1] == pytest.approx(phases_of(p))
    names = {event.get("name") for event in events}
    assert {"tlkernels::cross_entropy", "tlkernels::cross_entropy backward"} <= names
    loss = [event for event in events if event.get("name") == "tlkernels::cross_entropy"][-1]
    (around,) = [e for e in drawn if e["ts"] <= loss["ts"] + loss["dur"] / 2 <= e["ts"] + e["dur"]]
    assert around["name"] == "head and loss forward", "the phases are on the trace's clock"


def test_operations_and_utilisation(tmp_path):
    result = train(Net(), eager, tmp_path).result
    tokens = ROWS * LENGTH
    # Forward, and two products in the backward of each layer.
    expected = 2 * tokens * WIDTH * (WIDTH + CLASSES) * 3
    assert result["flops"] == expected
    assert result["mfu"] == pytest.approx(expected / result["step"]["seconds"][1] / CEILING)
    assert result["flops_by_dtype"] == {"float32": expected}


@pytest.mark.parametrize("given", [True, False])
def test_rates_count_all_micro_batches(given, tmp_path):
    result = train(Net(), eager, tmp_path, micro=3, given=given).result
    (loss,) = result["losses"]
    assert loss["calls"] == 3
    rate, (_, middle, _) = result["rate"], result["step"]["seconds"]
    assert rate["tokens"] == pytest.approx(rate["samples"] * LENGTH)
    assert 0.3 < rate["samples"] * middle / (3 * ROWS) < 3
    assert {row["name"] for row in result["phases"]} >= {"data", "forward of the trunk", "backward of the trunk"}


def test_a_loss_of_pytorch_is_compared_with_ours(tmp_path):
    (loss,) = train(Net(), eager, tmp_path).result["losses"]
    assert (loss["name"], loss["own"], loss["shape"]) == ("F.cross_entropy", "eager", [[ROWS * LENGTH, CLASSES]])
    assert set(loss["ways"]) == {"eager", "native", "reference"}
    assert loss["refused"]["triton"]
    for way in loss["ways"].values():
        assert way["wrong"] is None
        assert max(way["error"].values()) < 1e-6
        assert way["speedup"] == pytest.approx(loss["ways"]["eager"]["seconds"] / way["seconds"])
    assert loss["logits"]["bytes"] == ROWS * LENGTH * CLASSES * 4


def test_a_linear_loss_has_its_head_inside_and_stores_no_logits(tmp_path):
    result = train(LossInside(), None, tmp_path).result
    (loss,) = result["losses"]
    assert (loss["name"], loss["own"]) == ("linear_cross_entropy", "native")
    assert set(loss["ways"]) == {"eager", "native", "reference"}
    assert result["logits"]["bytes"] == ROWS * LENGTH * CLASSES * 4
    assert not result["logits"]["stored"] and result["logits"]["share_of_peak"] is None
    assert {"forward of the trunk", "head and loss backward"} <= {row["name"] for row in result["phases"]}


def test_a_head_that_is_not_found_is_said_not_to_be_told_apart(tmp_path):
    p = train(Tied(), eager, tmp_path)
    assert {"forward, not told apart", "backward, not told apart", "head and loss backward"} <= set(phases_of(p))
    assert "forward of the trunk" not in phases_of(p)
    assert any("head" in note for note in p.result["notes"])


def test_a_head_named_by_transformers_is_found(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=CLASSES, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    net = LlamaForCausalLM(config)
    optimiser, ids = torch.optim.SGD(net.parameters(), lr=0.1), Rows().ids[:ROWS]
    with profile(steps=3, folder=tmp_path, compare=False) as p:
        done = False
        while not done:
            net(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            done = p.step()
    assert {"forward of the trunk", "head and loss forward", "backward of the trunk"} <= set(phases_of(p))
    assert p.result["losses"][0]["name"] == "F.cross_entropy"
    assert not any("head" in note for note in p.result["notes"])


def weights_after(folder, profiled, **options):
    net, rows = Net(dropout=0.3), Rows().ids
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.01)
    torch.manual_seed(1)

    def step(number):
        ids = rows[ROWS * number : ROWS * (number + 1)]
        eager(net(ids), ids).backward()
        optimiser.step()
        optimiser.zero_grad()

    if profiled:
        with profile(net, steps=3, folder=folder, **options) as p:
            for number in range(40):
                step(number)
                p.step()
        assert p.done
    else:
        for number in range(40):
            step(number)
    return [parameter.detach().clone() for parameter in net.parameters()], torch.get_rng_state()


def test_training_computes_the_same_bits_with_a_profile(tmp_path):
    bare, state = weights_after(tmp_path, profiled=False)
    profiled, state_after = weights_after(tmp_path, profiled=True, compare=False)
    assert all(torch.equal(one, other) for one, other in zip(bare, profiled, strict=True))
    assert torch.equal(state, state_after)
    compared, state_after = weights_after(tmp_path, profiled=True)
    assert torch.equal(state, state_after)
    torch.testing.assert_close(compared, bare, rtol=1e-3, atol=1e-4)


def hooks(net):
    modules = torch.nn.modules.module
    return (
        len(modules._global_forward_pre_hooks),
        len(modules._global_forward_hooks),
        len(_global_optimizer_pre_hooks),
        len(_global_optimizer_post_hooks),
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in net.modules()],
        data.dataloader._BaseDataLoaderIter.__next__,
        tlk.cross_entropy.__globals__["resolve"] is dispatch.resolve,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.autograd.profiler._is_profiler_enabled,
    )


@pytest.mark.parametrize("failing", [1, 3, 6, 7, 9, 12, None])
def test_no_hook_is_left_also_after_an_exception(failing, tmp_path):
    net = Net()
    before = hooks(net)
    optimiser, ids = torch.optim.SGD(net.parameters(), lr=0.1), Rows().ids[:ROWS]

    def loop():
        with profile(net, steps=3, folder=tmp_path) as p:
            for number in range(1, 100):
                loss = ours(net(ids), ids)
                assert failing is None or hooks(net) != before
                if number == failing:
                    raise KeyError("the loop's own")
                loss.backward()
                optimiser.step()
                if p.step():
                    break

    if failing is None:
        loop()
    else:
        with pytest.raises(KeyError, match="the loop's own"):
            loop()
    assert hooks(net) == before


def test_too_few_steps_are_an_error_that_counts_them(tmp_path):
    with pytest.raises(RunError, match=r"did 4 steps .* needs 11: 2 to warm up, 3 that are timed"):
        train(Net(), eager, tmp_path, steps=4)
    assert train(Net(), eager, tmp_path, steps=11).done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "steps: expected a whole number of at least 3, got 2"),
        ({"warmup": 0}, "warmup: expected a whole number of at least 1, got 0"),
        ({"model": torch.zeros(2)}, "model: expected a torch.nn.Module or None, got Tensor"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        profile(**options)


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


def test_a_step_that_also_evaluates_is_not_the_one_that_is_shown():
    plain, long = [Segment(0, 9_000_000, "data")], [Segment(0, 2_000_000_000, None)]
    rows, whole = of_phases([long, plain, [Segment(0, 10_000_000, "data")]], {}, True, True)
    assert whole == pytest.approx(0.01)
    assert [(row["name"], row["share"]) for row in rows] == [("data", 1.0)]


def test_the_device_is_that_of_the_gpu_if_the_loop_began_on_a_cpu():
    """As a trainer does that evaluates a model before it moves it."""
    watch = Watch(None)
    assert watch.device == torch.device("cpu")
    watch.roots = [nn.Linear(2, 2), nn.Linear(2, 2, device="meta")]
    assert watch.device == torch.device("meta")
    watch.roots.pop()
    assert watch.device == torch.device("cpu")


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


def test_a_head_that_the_loop_calls_itself_is_the_head(tmp_path):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = nn.Sequential(nn.Embedding(CLASSES, WIDTH)), SlowHead(WIDTH, CLASSES)

    net = Parts()
    net.head.forward_seconds = 0.02
    ids = Rows().ids[:ROWS]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    with profile(steps=3, folder=tmp_path, compare=False) as p:
        done = False
        while not done:
            eager(net.head(net.trunk(ids)), ids).backward()
            optimiser.step()
            done = p.step()
    found = phases_of(p)
    assert 0.02 <= found["head and loss forward"] < 0.04 and found["forward of the trunk"] < 0.02


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


def test_a_teacher_has_a_phase_of_its_own(tmp_path):
    net, teacher, ids = Net(), Net(trunk_seconds=(0.03, 0.0)).requires_grad_(False), Rows().ids[:ROWS]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    with profile(steps=3, folder=tmp_path, compare=False) as p:
        done = False
        while not done:
            with torch.no_grad():
                target = teacher(ids).softmax(-1)
            F.kl_div(net(ids).log_softmax(-1), target, reduction="sum").backward()
            optimiser.step()
            done = p.step()
    assert 0.03 <= phases_of(p)["forward without gradient"] < 0.06
    losses = {loss["name"]: loss for loss in p.result["losses"]}
    assert set(losses) == {"F.kl_div", "F.log_softmax"}
    assert "tlkernels.distillation takes both logits" in losses["F.kl_div"]["refused"]["native"]
    assert {"forward of the trunk", "head and loss forward"} <= set(phases_of(p))


def test_peaks_of_memory_belong_to_phases(tmp_path):
    class Hungry(Net):
        def hidden(self, ids):
            torch.ones(50_000_000).sum()  # 200 MB
            return super().hidden(ids)

    result = train(Hungry(), ours, tmp_path).result
    peaks = {row["name"]: row["peak_bytes"] for row in result["phases"]}
    others = [peaks[name] for name in ("data", "head and loss backward", "backward of the trunk", "optimiser")]
    assert all(150e6 < peaks["forward of the trunk"] - other < 250e6 for other in others), peaks
    assert result["peak_bytes"] == peaks["forward of the trunk"]
    assert result["logits"]["share_of_peak"] == pytest.approx(ROWS * LENGTH * CLASSES * 4 / result["peak_bytes"])


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


def test_a_peak_between_phases_is_of_none():
    peaks = Peaks(torch.device("cpu"))
    with peaks.measured():
        peaks.enter("optimiser")
        peaks.leave("optimiser")
        torch.ones(50_000_000).sum()
        peaks.enter("data")
        peaks.leave("data")
    assert peaks.by_phase["other"] - peaks.by_phase["optimiser"] > 150e6
    assert peaks.by_phase["other"] - peaks.by_phase["data"] > 150e6


def test_the_report_is_that_of_the_file(tmp_path):
    p = train(Net(), ours, tmp_path)
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved == json.loads(json.dumps(p.result)) and saved["kind"] == "profile"
    _, step, _ = saved["step"]["seconds"]
    loss = saved["losses"][0]["ways"]["native"]["seconds"]
    assert saved["loss_share"] == pytest.approx(loss / step)
    assert saved["bound"] == pytest.approx(step / (step - loss))
    assert f"at most {saved['bound']:.3g}x as fast" in p.report
    assert saved["overhead"] == pytest.approx(saved["traced_step"]["seconds"] / step)
