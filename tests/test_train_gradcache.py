"""GradCache: the gradient is that of one pass of the whole batch, and the activations are those of a micro-batch."""

import copy
import weakref

import pytest
import torch
from accelerate import Accelerator
from train_cases import contrast_formula, quick, task_of, tiny_contrast_config, tiny_model, write_translations

from tlkernels.train.checkpoint import Progress
from tlkernels.train.contrast_config import ContrastLossConfig, EncodersConfig
from tlkernels.train.contrast_losses import losses
from tlkernels.train.encoders import Encoders
from tlkernels.train.gradcache import joint_gradient
from tlkernels.train.gradient import gradient
from tlkernels.train.task import OURS

pytestmark = pytest.mark.usefixtures(quick.__name__)
WORDS = 30
LOSSES = {
    "info_nce": ContrastLossConfig(temperature=0.1),
    "one way": ContrastLossConfig(temperature=0.1, symmetric=False, label_smoothing=0.1),
    "fixed": ContrastLossConfig(temperature=0.1, learnable=False),
    "sigmoid": ContrastLossConfig(name="sigmoid", temperature=0.2, bias=-2.0),
    "nt_xent": ContrastLossConfig(name="nt_xent", temperature=0.3),
    "sup_con": ContrastLossConfig(name="sup_con", temperature=0.3),
}
EAGER = ("eager", "eager in slices")


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def bert(width, dropout):
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def encoders(loss, two=False, dropout=0.0):
    """Return encoders in float64, in training mode; two have widths 8 and 12, and maps."""
    torch.manual_seed(3)
    widths = [8, 12] if two else [8]
    query, *key = [bert(width, dropout) for width in widths]
    config = EncodersConfig(dimensions=6 if two else None)
    return Encoders(query, key[0] if two else None, widths, loss, config).double().train()


def texts(count, longest):
    mask = (torch.arange(longest) < torch.randint(2, longest + 1, (count, 1))).long()
    mask[0] = 1
    return {"input_ids": torch.randint(1, WORDS, (count, longest)) * mask, "attention_mask": mask}


def micro_batches(loss, sizes, negatives=0):
    """Return the network's arguments for micro-batches of these sizes; a third of the rows share an id with others."""
    torch.manual_seed(4)
    ids, calls = torch.randint(max(2, sum(sizes) - 3), (sum(sizes),)), []
    assert len(ids.unique()) < len(ids)
    for number, part in enumerate(ids.split(list(sizes))):
        count, longest = len(part), 5 + number % 3  # micro-batches are padded to different lengths
        query = texts(count, longest)
        key = {"nt_xent": query, "sup_con": None}.get(loss.name, texts(count, longest + 1))
        labels = part % 3 if loss.name == "sup_con" else None
        hard = texts(count * negatives, longest) if negatives else None
        calls.append(({"query": query, "key": key, "negatives": hard, "ids": part, "labels": labels},))
    return calls


def embedded(network, inputs, key=False):
    """The embeddings by transformers' hidden states."""
    if inputs is None:
        return None
    model = network.key if key and network.key is not None else network.query
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
    mean = torch.stack([states[: int(length)].mean(0) for states, length in zip(hidden, mask.sum(1), strict=True)])
    linear = network.maps[1 if key and len(network.maps) > 1 else 0]
    mean = mean @ linear.weight.T if isinstance(linear, torch.nn.Linear) else mean
    return mean / mean.norm(dim=1, keepdim=True)


def one_pass(network, loss, calls, states):
    """Return loss and gradients of all rows in one graph; each micro-batch starts with its state of random numbers."""
    network = copy.deepcopy(network)
    parts = []
    for (rows,), state in zip(calls, states, strict=True):
        torch.set_rng_state(state)
        sides = [embedded(network, rows[name], key=name != "query") for name in ("query", "key", "negatives")]
        parts.append([*sides, rows["ids"], rows["labels"]])
    whole = [None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)]
    value = contrast_formula(loss, *whole, network.log_scale.exp(), network.bias)
    value.backward()
    return value.item(), {name: p.grad for name, p in network.named_parameters()}


def in_pieces(accelerator, network, loss, calls, name=OURS, seed=5):
    """Return the same of `joint_gradient`, and the random numbers' states before the first pass of each micro-batch."""
    network, states = copy.deepcopy(network), []
    network.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    value = joint_gradient(accelerator, network, calls, losses(loss, None, 2)[name], 3, seed)
    return value.item(), {name: p.grad for name, p in network.named_parameters()}, states[: len(calls)]


def check_equal(accelerator, network, loss, calls, name=OURS):
    value, found, states = in_pieces(accelerator, network, loss, calls, name)
    expected, right = one_pass(network, loss, calls, states)
    assert value == pytest.approx(expected, rel=1e-12)
    assert found.keys() == right.keys()
    for parameter, expected in right.items():
        if expected is None:
            assert found[parameter] is None, parameter
        else:
            assert torch.allclose(found[parameter], expected, rtol=0, atol=1e-12), parameter
    norms = [float(expected.norm()) for expected in right.values() if expected is not None]
    assert max(norms) > 1e-2 and ("log_scale" in right) and (right["log_scale"] is None) != loss.learnable
    return states


CASES = [(loss, two, sizes) for loss in LOSSES for two in (False, True) for sizes in ((3, 3, 2), (8,), (1, 4, 2, 1))]
SHORT = {("info_nce", True, (1, 4, 2, 1)), ("info_nce", False, (8,)), ("one way", True, (3, 3, 2))}
SHORT |= {("fixed", False, (3, 3, 2)), ("sigmoid", True, (1, 4, 2, 1)), ("sigmoid", False, (8,))}
SHORT |= {("nt_xent", False, (3, 3, 2)), ("sup_con", False, (1, 4, 2, 1))}


def cases():
    for loss, two, sizes in CASES:
        if two and LOSSES[loss].name in ("nt_xent", "sup_con"):
            continue
        marks = [] if (loss, two, sizes) in SHORT else [pytest.mark.full]
        id = f"{loss}-{'two encoders' if two else 'one encoder'}-{'+'.join(map(str, sizes))}"
        yield pytest.param(loss, two, sizes, marks=marks, id=id)


@pytest.mark.parametrize(("loss", "two", "sizes"), list(cases()))
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["still", "dropout"])
def test_the_gradient_is_that_of_one_pass_of_the_whole_batch(loss, two, sizes, dropout, accelerator):
    config = LOSSES[loss]
    calls = micro_batches(config, sizes, negatives=2 if config.name == "info_nce" else 0)
    states = check_equal(accelerator, encoders(config, two, dropout), config, calls)
    assert len({tuple(state.tolist()) for state in states}) == len(sizes), "two micro-batches have the same dropout"


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("loss", ["info_nce", pytest.param("one way", marks=pytest.mark.full)])
def test_it_is_the_same_with_pytorchs_losses(name, loss, accelerator):
    config = LOSSES[loss]
    check_equal(accelerator, encoders(config, True, 0.2), config, micro_batches(config, (3, 3, 2), 1), name)


def test_dropout_makes_a_difference_and_follows_from_the_seed(accelerator):
    """Otherwise the cases above would not see another dropout in the second pass."""
    config = LOSSES["nt_xent"]
    network, calls = encoders(config, dropout=0.2), micro_batches(config, (3, 3))
    values = [in_pieces(accelerator, network, config, calls, seed=seed)[0] for seed in (5, 5, 6)]
    assert values[0] == values[1] != values[2]


def test_gradients_are_added_to_those_that_are_there(accelerator):
    config = LOSSES["sigmoid"]
    network, calls = encoders(config), micro_batches(config, (3, 2))
    _, once, _ = in_pieces(accelerator, network, config, calls)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    joint_gradient(accelerator, network, calls, losses(config, None, None)[OURS], 3, 5)
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter.grad, 1 + once[name], atol=1e-12), name


def test_large_seeds_are_allowed(accelerator):
    config = LOSSES["sigmoid"]
    network, calls = encoders(config, dropout=0.2), micro_batches(config, (3, 2))
    seeds = (
        (1 << 32) * 1_000_003 * 1_009,
        (1 << 32) * 1_000_003 * 1_009 + 1,
    )  # of the first steps with --run.seed 2^32
    assert len({in_pieces(accelerator, network, config, calls, seed=seed)[0] for seed in seeds}) == 2


class Saved:
    """Counts the bytes that exist because a backward pass needs them, apart from parameters."""

    def __init__(self, network):
        self.parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.now = self.peak = 0

    def pack(self, tensor):
        class Holder:
            value = tensor.detach()  # itself would make a cycle if it is an output of the node

        holder = Holder()
        if tensor.untyped_storage().data_ptr() not in self.parameters:
            self.change(tensor.nbytes)
            weakref.finalize(holder, self.change, -tensor.nbytes)
        return holder

    def change(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)

    def during(self, step):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda holder: holder.value):
            step()
        assert self.now == 0, "something has been kept"
        return self.peak


def test_activations_of_one_micro_batch_exist_at_a_time(accelerator):
    config = LOSSES["info_nce"]
    network = encoders(config, dropout=0.1)

    def rows(count):
        text = {"input_ids": torch.randint(1, WORDS, (count, 8)), "attention_mask": torch.ones(count, 8).long()}
        return ({"query": text, "key": text, "negatives": None, "ids": torch.arange(count), "labels": None},)

    def peak(pieces, size):
        calls, loss = [rows(size) for _ in range(pieces)], losses(config, None, None)[OURS]
        return Saved(network).during(lambda: joint_gradient(accelerator, network, calls, loss, 3, 5))

    def features(q, k, *_):
        return (q * q.detach()).sum() + (k * k.detach()).sum()

    one = Saved(network).during(lambda: network(*rows(3), features).backward())
    whole = peak(1, 24)
    assert peak(4, 3) == peak(8, 3) <= one + 2 * 3 * 8 * 8 + 64  # that of the features of 3 rows, and of the scale
    assert whole > 7 * one


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
def test_a_steps_gradient_does_not_depend_on_the_micro_batches(name, tmp_path):
    data = write_translations(tmp_path / "pairs.jsonl", 40, negatives=1 if name == "info_nce" else 0)
    model = tiny_model(tmp_path / "model")
    found = []
    for limit in (None, 3, 1):
        config = tiny_contrast_config(tmp_path, model, data, micro_batch=limit)
        config.loss, config.model.dropout = LOSSES[name], False
        task = task_of(config)
        network = task.start().double().train()
        ids = task.rows["train"].ids
        twice = next(number for number in ids.tolist() if (ids == number).sum() > 1)
        batch = torch.cat([(ids == twice).nonzero()[:, 0], (ids != twice).nonzero()[:6, 0]])  # with false negatives
        loss = gradient(task, network, batch, 0, Progress())
        found.append([loss, *(p.grad for p in network.parameters() if p.grad is not None)])
    [inputs] = task.inputs("train", batch, 0)
    sides = [embedded(network, inputs[name], key=name != "query") for name in ("query", "key", "negatives")]
    value = contrast_formula(config.loss, *sides, inputs["ids"], None, network.log_scale.exp(), network.bias)
    right = torch.autograd.grad(value, [p for p in network.parameters() if p.grad is not None])
    for tensors in found:
        for ours, expected in zip(tensors, [value, *right], strict=True):
            assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
