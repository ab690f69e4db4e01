"""A head and its loss as one unit of a profile, and `linear_cross_entropy` in its place."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from profile_loops import quickly
from torch import nn
from torch.nn.utils import parametrizations

import tlkernels as tlk
from tlkernels._core.dispatch import Implementation
from tlkernels.losses.cross_entropy.call import Arguments as CrossEntropyArguments
from tlkernels.profiling import profile, replay, units
from tlkernels.profiling.calls import OurCall
from tlkernels.profiling.discover import Discovery
from tlkernels.profiling.functions import Functions
from tlkernels.profiling.result import _with_expected
from tlkernels.profiling.unit_report import sentences
from tlkernels.profiling.watch import Watch

CLASSES, WIDTH, ROWS, LENGTH = 50, 16, 4, 6
TARGET = torch.randint(CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
TARGET[0, :3] = 7
FLAT = TARGET.flatten()
CLASS_WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2)) + 0.5
ROW_WEIGHT = torch.rand(ROWS * LENGTH, generator=torch.Generator().manual_seed(3)) + 0.5
PROBABILITIES = torch.randn(ROWS * LENGTH, CLASSES, generator=torch.Generator().manual_seed(4)).softmax(-1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    with quickly(monkeypatch):
        yield


class Net(nn.Module):
    def __init__(self, head=None, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.head = head or nn.Linear(WIDTH, CLASSES, bias=bias)

    def hidden(self, ids=TARGET):
        return self.embedding(ids).tanh()

    def forward(self, ids=TARGET):
        return self.head(self.hidden(ids))


def discovered(net, loss, backward=True):
    """Return what a step of `loss(net)` says of its heads, and what would be replayed."""
    watch = Watch(None)
    watch.roots = [net]
    watch.listener = found = Discovery(watch)
    with watch.hooked(), Functions(watch).seen(all_calls=True), found.recorded():
        found.begin()
        value = loss(net)
        if backward:
            value.sum().backward()
    return found.units.recorded()


def theirs(net, **options):
    return F.cross_entropy(net().flatten(0, 1), FLAT, **options)


def ours(net, **options):
    return tlk.cross_entropy(net().view(-1, CLASSES), FLAT, **options)


def evaluate(net, swap, target=FLAT):
    """Return what the code of the report computes."""
    names = {"tlkernels": tlk, "model": net, "hidden": net.hidden().flatten(0, 1), "target": target}
    return eval(swap, names | {"weight": CLASS_WEIGHT, "row_weight": ROW_WEIGHT})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (theirs, {}),
        (theirs, {"ignore_index": 7, "label_smoothing": 0.1}),
        (theirs, {"weight": CLASS_WEIGHT, "reduction": "sum"}),
        (theirs, {"reduction": "none"}),
        (ours, {"softcap": 2.0, "z_loss": 0.01, "temperature": 0.7}),
        (ours, {"row_weight": ROW_WEIGHT, "ignore_index": 7}),
        (ours, {"inplace_grad": True}),
    ],
)
def test_the_unit_and_the_code_of_the_report_compute_the_loss_of_the_loop(loss, options, bias):
    net, values = Net(bias=bias), []

    def run(net):
        values.append(loss(net, **options))
        return values[0]

    ((said, recorded),) = discovered(net, run)
    assert said["why_not"] is None and said["head"] == "head"
    call = recorded.call
    assert call.own == ("eager" if loss is theirs else "head, then native") and call.auto == "native"
    torch.testing.assert_close(evaluate(net, said["swap"]), values[0], rtol=1e-5, atol=1e-6)
    assert {call.own, "native", "reference"} <= set(call.ways)
    for way in call.ways.values():
        torch.testing.assert_close(way(call.arguments), values[0], rtol=1e-5, atol=1e-6)
    assert recorded.parts == (("hidden", "weight", "bias") if bias else ("hidden", "weight"))


def test_probabilities_are_targets_too():
    net = Net()
    ((said, recorded),) = discovered(net, lambda net: F.cross_entropy(net().flatten(0, 1), PROBABILITIES))
    value = F.cross_entropy(net().flatten(0, 1), PROBABILITIES)
    torch.testing.assert_close(recorded.call.ways["native"](recorded.call.arguments), value)
    torch.testing.assert_close(evaluate(net, said["swap"], PROBABILITIES), value)


@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_the_unit_multiplies_in_its_dtype(inside):
    def loss(net):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net().flatten(0, 1)
            if inside:
                return F.cross_entropy(logits, FLAT)
        return F.cross_entropy(logits, FLAT)

    ((_, recorded),) = discovered(Net(), loss)
    assert recorded.call.arguments.linear_weight.dtype == recorded.call.arguments.input.dtype == torch.bfloat16
    assert recorded.autocast == (torch.bfloat16 if inside else None)
    found = replay.replay(recorded)
    assert found["ways"]["native"]["wrong"] is None and found["ways"]["native"]["speedup"] is not None


@pytest.mark.parametrize(
    ("frozen", "parts"),
    [(("weight", "bias"), ("hidden",)), (("bias",), ("hidden", "weight")), (("weight",), ("hidden", "bias"))],
)
def test_a_frozen_head_needs_no_gradient(frozen, parts):
    """As of a model that is trained with LoRA."""
    net = Net()
    for name in frozen:
        getattr(net.head, name).requires_grad_(False)
    ((said, recorded),) = discovered(net, theirs)
    assert said["why_not"] is None and recorded.parts == parts
    found = replay.replay(recorded)
    assert {"value", "gradient", *parts} == set(found["ways"]["native"]["error"])
    assert found["ways"]["native"]["wrong"] is None and found["ways"]["native"]["speedup"] is not None


# ---- what is not tried


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def head_with(change):
    head = nn.Linear(WIDTH, CLASSES)
    return change(head) or head


def doubled_forward(head):
    plain = head.forward
    head.forward = lambda x: 2 * plain(x)


def of_logits(change):
    return lambda net: F.cross_entropy(change(net().flatten(0, 1)), FLAT)


def in_place(logits):
    return logits.mul_(2)


def one_row_less(net):
    return F.cross_entropy(net().flatten(0, 1)[:-1], FLAT[:-1])


def shifted(net):
    return F.cross_entropy(net()[:, :-1].reshape(-1, CLASSES), TARGET[:, 1:].reshape(-1))


def twice(net):
    logits = net().flatten(0, 1)
    return F.cross_entropy(logits, FLAT) + F.cross_entropy(logits, FLAT, ignore_index=7)


def distilled(net):
    logits = net().flatten(0, 1)
    return F.cross_entropy(logits, FLAT) + F.kl_div(logits.log_softmax(-1), PROBABILITIES)


def autocast_loss_only(net):
    logits = net().flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(logits, FLAT)


LOSSES_THAT_ARE_NOT_TRIED = {
    "shifted": (shifted, "copy of some rows"),
    "fewer rows": (one_row_less, "takes 23 of the 24 rows"),
    "chosen rows": (lambda net: F.cross_entropy(net().flatten(0, 1)[::2], FLAT[::2]), "takes 12 of the 24 rows"),
    "other order": (of_logits(lambda logits: logits.flip(0)), "FlipBackward0 lies between"),
    "picked rows": (of_logits(lambda logits: logits[torch.arange(24)]), "copy of some rows"),
    "a copy": (of_logits(lambda logits: logits.clone()), "takes a copy of the logits"),
    "softcap": (of_logits(lambda logits: 30 * torch.tanh(logits / 30)), "a scale or softcap lies between"),
    "temperature": (of_logits(lambda logits: logits / 0.7), "a scale or softcap lies between"),
    "in place": (of_logits(in_place), "changed in place"),
    "cast": (of_logits(lambda logits: logits.double()), "cast to float64 in a copy"),
    "sum": (of_logits(lambda logits: logits + 1), "AddBackward0 lies between"),
    "axis": (lambda net: F.cross_entropy(net().transpose(1, 2), TARGET), "shape 4×50×6; expected rows × 50 classes"),
    "deprecated": (lambda net: theirs(net, size_average=False), "size_average is deprecated"),
    "twice": (twice, "2 losses take the same logits: F.cross_entropy, F.cross_entropy"),
    "distilled": (distilled, "2 losses take the same logits: F.cross_entropy, F.log_softmax"),
    "autocast": (autocast_loss_only, "autocast is on for the loss and not for the head"),
    "bare": (
        lambda net: F.cross_entropy(F.linear(net.hidden().flatten(0, 1), net.head.weight), FLAT),
        "the head is a bare product",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LOSSES_THAT_ARE_NOT_TRIED)
def test_logits_that_are_not_the_heads_output_are_not_tried_and_the_reason_is_said(name):
    loss, reason = LOSSES_THAT_ARE_NOT_TRIED[name]
    (said, recorded), *_ = discovered(Net(), loss)
    assert recorded is None and said["loss"] == "F.cross_entropy"
    assert reason in said["why_not"]
    assert sentences(said) == [
        f"linear_cross_entropy in place of the head and F.cross_entropy was not tried: {said['why_not']}."
    ]


HEADS_THAT_ARE_NOT_TRIED = {
    "subclass": (lambda: Scaled(WIDTH, CLASSES), "the head is a Scaled"),
    "LoRA": (LoRA, "AddBackward0 lies between"),
    "hook": (
        lambda: head_with(lambda head: head.register_forward_hook(lambda *call: 2 * call[-1]) and None),
        "has hooks",
    ),
    "hook before": (
        lambda: head_with(lambda head: head.register_forward_pre_hook(lambda _, args: (2 * args[0],)) and None),
        "has hooks",
    ),
    "hook of the backward": (
        lambda: head_with(lambda head: head.register_full_backward_hook(lambda *_: None) and None),
        "has hooks",
    ),
    "forward": (lambda: head_with(doubled_forward), "a Linear whose forward is replaced"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, CLASSES)), "the head is a Parametrized"),
}


@pytest.mark.parametrize("name", HEADS_THAT_ARE_NOT_TRIED)
def test_a_head_that_is_more_than_a_plain_layer_is_not_tried_and_the_reason_is_said(name):
    make, reason = HEADS_THAT_ARE_NOT_TRIED[name]
    ((said, recorded),) = discovered(Net(make()), theirs)
    assert recorded is None and reason in said["why_not"]


def test_a_global_hook_may_change_the_heads_output():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        ((said, recorded),) = discovered(Net(), theirs)
    finally:
        handle.remove()
    assert recorded is None and "has hooks" in said["why_not"]


def test_two_heads_of_a_loss_are_not_tried():
    def both(net):
        return theirs(net) + F.cross_entropy(net.second(net.hidden()).flatten(0, 1), FLAT)

    net = Net()
    net.second = nn.Linear(WIDTH, CLASSES)
    ((said, recorded),) = discovered(net, both)
    assert recorded is None and "different heads" in said["why_not"]


def test_classes_over_processes_are_not_tried():
    arguments = CrossEntropyArguments(torch.zeros(2, 3), torch.zeros(2), None, "mean", False, False, None, "a group")
    call = OurCall("cross_entropy", [], arguments, Implementation("native", lambda _: None, lambda _: None))
    with pytest.raises(ValueError, match="vocab_group: the classes are spread over processes"):
        units._read(call)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
def test_a_sharded_model_is_not_tried():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        net = Net()
        fully_shard(net, mesh=dist.init_device_mesh("cpu", (1,)))
        ((said, recorded),) = discovered(net, theirs)
    finally:
        dist.destroy_process_group()
    assert recorded is None and ("FSDP" in said["why_not"] or "DTensor" in said["why_not"])


def test_a_loss_without_a_head_is_no_unit():
    assert discovered(Net(), lambda net: F.mse_loss(net.hidden(), torch.zeros(ROWS, LENGTH, WIDTH))) == []
    inside = lambda net: tlk.linear_cross_entropy(net.hidden(), net.head.weight, TARGET)  # noqa: E731
    assert discovered(Net(), inside) == []


def test_the_inputs_of_layers_are_freed_when_the_backward_begins():
    seen = []

    def loss(net):
        hidden = net.hidden()
        heads = watch.listener._heads
        hidden.register_hook(lambda _: seen.append(len(heads._ran)))
        value = F.cross_entropy(net.head(hidden).flatten(0, 1), FLAT)
        with torch.no_grad():
            net.head(hidden)
        seen.append(len(heads._ran))
        return value

    watch = Watch(None)
    watch.roots = [net := Net()]
    watch.listener = Discovery(watch)
    with watch.hooked(), Functions(watch).seen(all_calls=True), watch.listener.recorded():
        loss(net).backward()
    assert seen == [1, 0]


# ---- what is measured


def test_micro_batches_are_one_unit_whose_time_is_that_of_all():
    def loss(net):
        first = F.cross_entropy(net(TARGET[:1]).flatten(0, 1), TARGET[:1].flatten())
        return first + theirs(net)

    ((_, recorded),) = discovered(Net(), loss)
    found = replay.replay(recorded)
    assert found["calls"] == 2 and found["shape"] == [[24, WIDTH], [CLASSES, WIDTH], [CLASSES]]
    for way in found["ways"].values():
        assert way["step_seconds"] == pytest.approx(way["seconds"] * 30 / 24)


def test_float64_also_needs_the_weight_and_its_gradients(monkeypatch):
    ((_, recorded),) = discovered(Net(), theirs)
    needed = 8 * (6 * ROWS * LENGTH * CLASSES + 3 * (CLASSES * WIDTH + CLASSES))
    monkeypatch.setattr(replay, "free_bytes", lambda device: needed)
    assert replay.replay(recorded)["ways"]["native"]["wrong"] is None
    monkeypatch.setattr(replay, "free_bytes", lambda device: needed - 1)
    assert "float64 needs" in replay.replay(recorded)["ways"]["native"]["wrong"]


class WrongBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias):
        return bias.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def test_a_wrong_gradient_of_the_bias_has_its_error_and_no_speed_up(monkeypatch):
    def wrong(each):
        return each._replace(run=lambda call: each.run(call._replace(linear_bias=WrongBias.apply(call.linear_bias))))

    changed = [wrong(each) if each.name == "native" else each for each in units.IMPLEMENTATIONS]
    monkeypatch.setattr(units, "IMPLEMENTATIONS", changed)
    ((said, recorded),) = discovered(Net(), theirs)
    found = replay.replay(recorded)
    error, wrong = found["ways"]["native"]["error"], found["ways"]["native"]["wrong"]
    assert error["bias"] == error["gradient"] == pytest.approx(0.01, rel=1e-3)
    assert max(error["hidden"], error["weight"]) < 1e-5
    assert max(found["ways"]["eager"]["error"].values()) < 1e-5
    assert wrong and found["ways"]["native"]["speedup"] is None
    said = _with_expected(said | {"unit": found}, step=1.0)
    assert said["unit"]["ways"]["native"]["expected"] is None
    assert sentences(said) == [f"linear_cross_entropy in place of head and F.cross_entropy has no speed-up: {wrong}."]


def said_with(own=0.4, ours=0.2, **changes):
    def way(seconds, peak):
        return {"step_seconds": seconds, "peak_bytes": peak, "wrong": None}

    ways = {"eager": way(own, 3_000_000_000), "native": way(ours, 1_100_000_000)}
    for name, change in changes.items():
        ways[name] |= change
    unit = {"name": "lm_head and F.cross_entropy", "own": "eager", "ways": ways, "refused": {"eager": "out of memory"}}
    said = {"loss": "F.cross_entropy", "head": "lm_head", "auto": "native", "swap": "f(hidden)", "why_not": None}
    return said | {"unit": unit}


def test_the_expected_step_has_our_time_in_place_of_the_heads_and_the_losss():
    found = _with_expected(said_with(), step=1.0)
    assert {name: way["expected"] for name, way in found["unit"]["ways"].items()} == {
        "eager": pytest.approx(1.0),
        "native": pytest.approx(1.0 / 0.8),
    }
    sentence, swap = sentences(found)
    assert sentence == (
        "Head and loss together take 400 ms of the step. linear_cross_entropy takes 200 ms and 1.90 GB less: the step "
        "would be 1.25x as fast (expected from these times, not measured in steps)."
    )
    assert "loss = f(hidden), where hidden is what lm_head gets" in swap
    assert "replaces lm_head and F.cross_entropy if nothing else needs the logits" in swap


@pytest.mark.parametrize(
    ("said", "step", "expected", "words"),
    [
        (said_with(ours=0.6), 1.0, 1 / 1.2, "the step would be 0.83x as fast (expected from these times, not"),
        (said_with(ours=0.6), 1.0, 1 / 1.2, ": it would be slower."),
        (said_with(native={"peak_bytes": 3_500_000_000}), 1.0, 1.25, "200 ms and 0.50 GB more: the step"),
        (said_with(eager={"peak_bytes": None}), 1.0, 1.25, "takes 200 ms: the step would be 1.25x"),
        (said_with(), 0.3, None, "what linear_cross_entropy would gain is not known"),
        (said_with(eager={"wrong": "odd"}), 1.0, None, "cannot be compared: odd."),
        (said_with(native={"wrong": "odd"}), 1.0, None, "has no speed-up: odd."),
    ],
)
def test_the_sentence_says_what_is_slower_and_what_is_not_known(said, step, expected, words):
    found = _with_expected(said, step)
    assert found["unit"]["ways"]["native"]["expected"] == (expected and pytest.approx(expected))
    assert words in " ".join(sentences(found))


def test_what_did_not_run_alone_has_no_speed_up():
    said = said_with()
    del said["unit"]["ways"]["eager"]
    found = _with_expected(said, 1.0)
    assert found["unit"]["ways"]["native"]["expected"] is None
    assert sentences(found)[0] == (
        "lm_head and F.cross_entropy did not run alone: out of memory. linear_cross_entropy takes 200 ms and 1.10 GB."
    )


# ---- in a profile


def train(net, folder, loss, steps=11):
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step():
        loss(net).backward()
        optimiser.step()
        optimiser.zero_grad()

    if folder is None:
        for _ in range(steps):
            step()
        return None
    with profile(net, steps=3, folder=folder, compare=False) as p:
        for _ in range(steps):
            step()
            p.step()
    return p


def test_a_profile_says_what_the_loop_would_gain_and_changes_no_bit(tmp_path):
    net, bare = Net(), Net()
    p = train(net, tmp_path, theirs)
    train(bare, None, theirs)
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), bare.parameters(), strict=True))
    result = json.loads((tmp_path / "profile.json").read_text())
    (said,), (_, step, _) = result["head_and_loss"], result["step"]["seconds"]
    ways = said["unit"]["ways"]
    assert said["unit"]["name"] == "head and F.cross_entropy" and set(ways) == {"eager", "native", "reference"}
    own = ways["eager"]["step_seconds"]
    for way in ways.values():
        expected = step / (step - own + way["step_seconds"]) if own < step else None
        assert way["expected"] == (expected and pytest.approx(expected))
        assert way["wrong"] is None and set(way["error"]) == {"value", "gradient", "hidden", "weight", "bias"}
        assert way["speedup"] == pytest.approx(ways["eager"]["seconds"] / way["seconds"])
    assert own > result["losses"][0]["ways"]["eager"]["step_seconds"] * 0.5
    for sentence in sentences(said):
        assert sentence in p.report
    assert "head and F.cross_entropy (eager)" in p.report and "step, expected" in p.report
    assert [loss["name"] for loss in result["losses"]] == ["F.cross_entropy"], "the unit is no loss of the step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_a_model_of_transformers(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=CLASSES, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    net, values = LlamaForCausalLM(config).to(dtype), []

    def loss(net):
        values.append(net(input_ids=TARGET, labels=TARGET).loss)
        return values[0]

    ((said, recorded),) = discovered(net, loss)
    if dtype == torch.bfloat16:
        assert said["why_not"] == "the logits are cast to float32 in a copy"
        return
    assert said["swap"] == "tlkernels.linear_cross_entropy(hidden, model.lm_head.weight, target)"
    torch.testing.assert_close(recorded.call.ways["native"](recorded.call.arguments), values[0])


def test_the_head_of_a_masked_model_of_transformers():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=CLASSES, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    net = BertForMaskedLM(config).eval()
    ((said, recorded),) = discovered(net, lambda net: net(input_ids=TARGET, labels=TARGET).loss)
    value = net(input_ids=TARGET, labels=TARGET).loss
    torch.testing.assert_close(recorded.call.ways["native"](recorded.call.arguments), value)
    assert (
        said["head"] == "cls.predictions.decoder" and "linear_bias=model.cls.predictions.decoder.bias" in said["swap"]
    )


def test_a_head_of_another_kind_that_transformers_names_is_named():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH))

        def forward(self, x):
            return F.linear(x, self.weight)

    net = Net(Quantised())
    net.get_output_embeddings = lambda: net.head
    ((said, _),) = discovered(net, theirs)
    assert said["why_not"].startswith("the head is a Quantised,")


def test_the_code_of_a_head_in_a_list_is_python():
    net = nn.ModuleList([Net()])
    ((said, _),) = discovered(net, lambda net: theirs(net[0]))
    assert said["swap"].startswith("tlkernels.linear_cross_entropy(hidden, model[0].head.weight, target")


@pytest.mark.full
def test_a_head_in_a_compiled_graph_is_not_tried(tmp_path):
    net = Net()
    run = torch.compile(net, backend="eager")
    p = train(net, tmp_path, lambda _: F.cross_entropy(run(TARGET).flatten(0, 1), FLAT))
    (said,) = p.result["head_and_loss"]
    assert said["why_not"] == "the head is in a graph of torch.compile"
