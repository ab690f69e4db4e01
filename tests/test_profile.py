"""`tlkernels.profile` around real loops on the CPU."""

import gzip
import json
import time

import pytest
import torch
import torch.nn.functional as F
from profile_loops import (
    CEILING,
    CLASSES,
    LENGTH,
    ROWS,
    WIDTH,
    LossInside,
    Net,
    Rows,
    SlowHead,
    SlowSGD,
    Tied,
    eager,
    ours,
    phases_of,
    quickly,
    train,
)
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import data

import tlkernels as tlk
from tlkernels._core import dispatch
from tlkernels.profiling import profile
from tlkernels.profiling.events import Segment
from tlkernels.profiling.memory import Peaks
from tlkernels.profiling.result import of_phases
from tlkernels.profiling.watch import Watch
from tlkernels.train.errors import RunError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    with quickly(monkeypatch):
        yield


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
