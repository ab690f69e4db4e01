"""pytorch-metric-learning: our NTXentLoss and SupConLoss against the host's own, in float64."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

theirs = pytest.importorskip("pytorch_metric_learning.losses")
from pytorch_metric_learning import distances, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import distributed  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from tlkernels.integrations import pytorch_metric_learning as ours  # noqa: E402

LOSSES = ["NTXentLoss", "SupConLoss"]
N, WIDTH = 24, 6
LABELS = {
    "two views": torch.arange(12).repeat(2),
    "two views side by side": torch.arange(12).repeat_interleave(2),
    "classes": torch.randint(5, (N,), generator=torch.Generator().manual_seed(0)),
    "classes and singletons": torch.tensor([0, 0, 0, *range(1, 20), 7, 7]),
    "two classes": torch.tensor([1, 0] * 12),
    "negative numbers": torch.arange(12).repeat(2) - 100,
    "floating": torch.arange(6).repeat(4) / 2,
    "one class": torch.zeros(N, dtype=torch.long),
    "no pair": torch.arange(N),
}
MINERS = {
    "multi-similarity": lambda: miners.MultiSimilarityMiner(epsilon=0.2),
    "all triplets": lambda: miners.TripletMarginMiner(margin=0.3, type_of_triplets="all"),
    "hard triplets": lambda: miners.TripletMarginMiner(margin=0.1, type_of_triplets="hard"),
    "batch-hard": miners.BatchHardMiner,
    "pair-margin": lambda: miners.PairMarginMiner(pos_margin=0.5, neg_margin=1.2),
    "easy-hard": lambda: miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="semihard"),
}


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def embeddings(rows=N, seed=0, dtype=torch.float64):
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def both(name, arguments, wrap=lambda loss: loss, options=lambda: {}):
    """Return (loss, gradients) of the host's class and of ours; `arguments()` gives the tensors of a call."""
    results = []
    for library in (theirs, ours):
        loss = wrap(getattr(library, name)(**options()))
        call = arguments()
        value = loss(*call)
        leaves = [x for x in call if isinstance(x, torch.Tensor) and x.requires_grad]
        results.append([value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)])
    return results


def assert_same(results, zero=False):
    assert bool(results[0][0] != 0) != zero
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-14)


@pytest.fixture
def no_host_loss(monkeypatch):
    """Our classes must not call the host's losses."""

    def refuse(*_):
        raise AssertionError("the host's loss was called")

    for name in LOSSES:
        monkeypatch.setattr(getattr(ours, name), "_compute_loss", refuse)
        monkeypatch.setattr(getattr(ours, name), "loss_method", refuse, raising=False)


@pytest.mark.usefixtures(no_host_loss.__name__)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_labels(name, kind):
    results = both(name, lambda: (embeddings(), LABELS[kind]))
    assert_same(results, zero=kind in ("one class", "no pair"))


@pytest.mark.usefixtures(no_host_loss.__name__)
@pytest.mark.parametrize("kind", ["two views", "classes", "classes and singletons", "floating"])
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", LOSSES)
def test_miners(name, miner, kind):
    pairs = MINERS[miner]()(embeddings(), LABELS[kind])
    assert pairs[0].numel() > 1
    assert_same(both(name, lambda: (embeddings(), LABELS[kind], pairs)))
    assert_same(both(name, lambda: (embeddings(), None, pairs)))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_triplets_with_repeated_pairs(name, impl):
    """A negative that occurs k times is k terms of NT-Xent's sum; SupCon counts it once."""
    a = torch.tensor([0, 0, 0, 3, 3, 5])
    p, n = torch.tensor([1, 1, 2, 4, 4, 6]), torch.tensor([7, 7, 7, 8, 9, 0])
    results = []
    for loss in (getattr(theirs, name)(), getattr(ours, name)(impl=impl)):
        x = embeddings()
        value = loss(x, None, (a, p, n))
        results.append([value.detach(), *torch.autograd.grad(value, x)])
    assert_same(results)


@pytest.mark.parametrize("name", LOSSES)
def test_an_anchor_without_negatives_among_those_of_a_miner(name):
    pairs = tuple(torch.tensor(x) for x in ([0, 0, 3, 5], [1, 2, 4, 6], [0, 0], [8, 9]))
    assert_same(both(name, lambda: (embeddings(), None, pairs)))


@pytest.mark.parametrize(
    ("pairs", "zero"),
    [(([], [], [0, 1], [2, 3]), True), (([0, 1], [1, 0], [], []), True), (([0], [1], [0], [2]), True),
     (([0], [1], [0, 0], [2, 3]), False), (([0, 1], [1, 0], [0], [2]), False)],
)  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_few_pairs(name, pairs, zero):
    pairs = tuple(torch.tensor(x, dtype=torch.long) for x in pairs)
    assert_same(both(name, lambda: (embeddings(), None, pairs)), zero)


@pytest.mark.usefixtures(no_host_loss.__name__)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_reference_embeddings(name, kind):
    labels = LABELS[kind]
    assert_same(
        both(name, lambda: (embeddings(), labels, None, embeddings(9, 1), labels[:9])), zero=kind == "one class"
    )
    # the same tensor of labels: the host pairs no element with that of its number
    zero = kind in ("one class", "no pair")
    assert_same(both(name, lambda: (embeddings(), labels, None, embeddings(N, 1), labels)), zero)
    assert_same(both(name, lambda: (embeddings(), labels, None, embeddings(N, 1), labels.clone())), kind == "one class")


@pytest.mark.parametrize("kind", ["no pair", "two views"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_embeddings_as_their_own_references(name, kind):
    """With other labels, an element is then its own positive."""
    results = []
    for library in (theirs, ours):
        x = embeddings()
        value = getattr(library, name)()(x, LABELS[kind], None, x, LABELS[kind].clone())
        results.append([value.detach(), *torch.autograd.grad(value, x)])
    assert_same(results)


@pytest.mark.parametrize("name", LOSSES)
def test_one_element_and_two_references(name):
    """One pair of each kind, for which the host's loss is zero."""
    call = lambda: (embeddings(1), torch.tensor([1]), None, embeddings(2, 1), torch.tensor([1, 2]))  # noqa: E731
    assert_same(both(name, call), zero=True)
    call = lambda: (embeddings(1), torch.tensor([1]), None, embeddings(3, 1), torch.tensor([1, 2, 3]))  # noqa: E731
    assert_same(both(name, call))


@pytest.mark.parametrize("miner", ["multi-similarity", "all triplets"])
@pytest.mark.parametrize("name", LOSSES)
def test_miners_with_reference_embeddings(name, miner):
    labels, ref_labels = LABELS["classes"], LABELS["classes"][:9]
    pairs = MINERS[miner]()(embeddings(), labels, embeddings(9, 1), ref_labels)
    assert_same(both(name, lambda: (embeddings(), labels, pairs, embeddings(9, 1), ref_labels)))


@pytest.mark.usefixtures(no_host_loss.__name__)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_self_supervised_loss(name, symmetric):
    wrap = lambda loss: theirs.SelfSupervisedLoss(loss, symmetric=symmetric)  # noqa: E731
    assert_same(both(name, lambda: (embeddings(), embeddings(seed=1)), wrap))


@pytest.mark.usefixtures(no_host_loss.__name__)
@pytest.mark.parametrize("miner", [None, "multi-similarity", "all triplets"])
@pytest.mark.parametrize("name", LOSSES)
def test_cross_batch_memory(name, miner):
    """Three batches; in the third the memory of 40 wraps around."""
    results = []
    for library in (theirs, ours):
        loss = getattr(library, name)()
        memory = theirs.CrossBatchMemory(loss, WIDTH, memory_size=40, miner=miner and MINERS[miner]())
        for step in range(3):
            x = embeddings(16, seed=step)
            value = memory(x, torch.randint(6, (16,), generator=torch.Generator().manual_seed(step)))
            results.append([value.detach(), *torch.autograd.grad(value, x)])
    for expected, found in zip(results[:3], results[3:], strict=True):
        assert_same([expected, found])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"distance": distances.CosineSimilarity()},
        {"distance": distances.DotProductSimilarity()},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 2.0},
        {"reducer": reducers.SumReducer()},
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"reducer": reducers.ThresholdReducer(low=9, high=15)},
        {"reducer": reducers.ClassWeightedReducer(torch.linspace(0.1, 2, 5))},
        {"reducer": reducers.PerAnchorReducer()},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    ],
    ids=lambda options: " ".join(f"{key}={type(value).__name__}" for key, value in options.items()),
)
@pytest.mark.parametrize("name", LOSSES)
def test_options(name, options):
    call = lambda: (embeddings(), LABELS["classes"])  # noqa: E731
    assert_same(both(name, call, options=lambda: copy.deepcopy(options)))


@pytest.mark.parametrize("name", LOSSES)
def test_unreduced_losses_and_their_indices_are_in_the_hosts_order(name):
    shuffled = LABELS["two views"][torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    for labels in (LABELS["classes"], LABELS["two views"], shuffled):
        for more in ((), (MINERS["all triplets"]()(embeddings(), labels),)):
            expected, found = (
                getattr(library, name)(reducer=reducers.DoNothingReducer())(embeddings(), labels, *more)["loss"]
                for library in (theirs, ours)
            )
            assert found["reduction_type"] == expected["reduction_type"]
            torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(found["indices"], expected["indices"])


@pytest.mark.parametrize("name", LOSSES)
def test_statistics_of_the_distance_and_the_reducer(name):
    found = []
    for library in (theirs, ours):
        loss = getattr(library, name)(
            distance=distances.CosineSimilarity(collect_stats=True),
            reducer=reducers.ThresholdReducer(low=9, collect_stats=True),
            collect_stats=True,
        )
        loss(embeddings(), LABELS["classes"], None, embeddings(9, 1), LABELS["classes"][:9])
        modules = (loss, loss.distance, loss.reducer)
        names = [name for m in modules for name in getattr(m, "_record_these", [])]
        stats = [getattr(m, name) for m in modules for name in getattr(m, "_record_these_stats", [])]
        found.append((names, stats))
    assert len(found[0][1]) > 6
    assert found[1][0] == found[0][0] and found[1][1] == pytest.approx(found[0][1])


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_as_close_to_float64_as_the_hosts(name):
    expected = both(name, lambda: (embeddings(), LABELS["classes"]))[0]
    host, found = both(name, lambda: (embeddings(dtype=torch.float32), LABELS["classes"]))
    for right, their, our in zip(expected, host, found, strict=True):
        assert our.dtype == torch.float32
        rounding = torch.finfo(torch.float32).eps * right.abs().max()
        assert (our - right).abs().max() <= 2 * (their - right).abs().max() + rounding


def test_where_the_host_s_probability_underflows_ours_has_the_loss():
    """In float32 the host's -log(p + tiny) ends at 87.3, without a gradient."""
    x = torch.tensor([[1.0, 0], [-1.0, 0.1], [1.0, 0.1], [-1.0, 0]], dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    expected = theirs.NTXentLoss(temperature=0.01)(x.double(), labels)
    assert theirs.NTXentLoss(temperature=0.01)(x, labels) < 88 < 190 < expected
    found = ours.NTXentLoss(temperature=0.01)(x, labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


class Shapes(TorchDispatchMode):
    """The largest number of elements of a result."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_with_labels_no_matrix_is_made(name):
    rows, width = 128, 4
    labels = torch.arange(rows // 4).repeat(4)
    x = torch.randn(rows, width, requires_grad=True)
    largest = []
    for library in (theirs, ours):
        with Shapes() as shapes:
            getattr(library, name)()(x, labels).backward()
        largest.append(shapes.largest)
    assert largest[0] >= rows**2 and largest[1] <= 3 * rows * width * 2


@pytest.mark.parametrize("name", LOSSES)
def test_modules_are_the_hosts_and_can_be_copied(name):
    loss = getattr(ours, name)(temperature=0.2, impl="reference")
    assert isinstance(loss, getattr(theirs, name)) and type(loss).__name__ == name
    assert getattr(ours, name)().temperature == getattr(theirs, name)().temperature
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.impl == "reference"
        assert other(embeddings(), LABELS["classes"]) == loss(embeddings(), LABELS["classes"])


def gathered(rank, folder, name):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for efficient in (False, True):
        results = []
        for library in (theirs, ours):
            x, half = embeddings(), slice(12 * rank, 12 * rank + 12)
            loss = distributed.DistributedLossWrapper(getattr(library, name)(), efficient=efficient)
            value = loss(x[half], LABELS["classes"][half])
            results.append([value.detach(), *torch.autograd.grad(value, x)])
        torch.save(results, f"{folder}/{rank}{efficient}")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", LOSSES)
def test_the_hosts_wrapper_for_several_processes(name, tmp_path):
    if sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    mp.start_processes(gathered, (str(tmp_path), name), nprocs=2, start_method="fork")
    for rank in range(2):
        for efficient in (False, True):
            assert_same(torch.load(tmp_path / f"{rank}{efficient}"))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "found"),
    [
        (lambda: distances.LpDistance(), r"LpDistance\(p=2, power=1\)"),
        (lambda: distances.SNRDistance(), r"SNRDistance\(p=2, power=1\)"),
        (lambda: distances.CosineSimilarity(p=1), r"CosineSimilarity\(p=1, power=1\)"),
        (lambda: distances.DotProductSimilarity(power=2), r"DotProductSimilarity\(p=2, power=2\)"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_other_distances_are_refused(name, distance, found):
    expected = "expected CosineSimilarity or DotProductSimilarity with p=2 and power=1"
    message = rf"^distance: {expected}, got {found}; use pytorch_metric_learning.losses.{name} for it$"
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(distance=distance())
    loss = getattr(ours, name)()
    loss.distance = distance()
    with pytest.raises(ValueError, match=message):
        loss(embeddings(), LABELS["classes"])


@pytest.mark.parametrize("name", LOSSES)
def test_bad_arguments(name):
    loss, labels = getattr(ours, name)(), LABELS["classes"]
    with pytest.raises(ValueError, match=r"^labels: expected the labels, or an indices_tuple, got None$"):
        loss(embeddings())
    with pytest.raises(ValueError, match=r"^ref_labels: expected the labels, or an indices_tuple, got None$"):
        loss(embeddings(), labels, None, embeddings(9, 1))
    with pytest.raises(ValueError, match=r"^embeddings: expected shape \(N, D\), got \(24, 2, 3\)$"):
        loss(embeddings().view(N, 2, 3), labels)
    with pytest.raises(ValueError, match=r"^indices_tuple: expected triplets or pairs, 3 or 4 tensors, got 2$"):
        loss(embeddings(), labels, lmu.get_all_pairs_indices(labels)[:2])
    with pytest.raises(ValueError, match=rf"^indices_tuple: expected .* got one as both; use .*losses.{name} for it$"):
        loss(embeddings(), labels, tuple(torch.tensor(x) for x in ([0, 1], [1, 2], [0, 1], [3, 2])))
    with pytest.raises(ValueError, match=r"^temperature: "):
        getattr(ours, name)(temperature=0.0)(embeddings(), labels)
    with pytest.raises(ValueError, match=r"^impl: "):
        getattr(ours, name)(impl="fast")(embeddings(), labels)
