"""The losses for sentence-transformers, against the library's own on a tiny BERT with random weights."""

import copy
import inspect
import itertools
import random
import sys
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import util as st_util
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tlkernels.integrations import sentence_transformers as ours

WIDTH, ROWS = 32, 6
WORDS = [f"{a}{b}" for a in "bcdfgklmnp" for b in "aeiou"]
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss")
GUIDED = ("GISTEmbedLoss", "CachedGISTEmbedLoss")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with one vocabulary, and `other` with its own."""
    for name, words in (("model", WORDS), ("other", WORDS[::-1])):
        path = tmp_path_factory.getbasetemp() / name
        path.mkdir()
        (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
        config = transformers.BertConfig(
            vocab_size=len(words) + 5, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=32,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(path)
    return tmp_path_factory.getbasetemp()


def build(folder, seed=0, name="model", dtype=torch.float64):
    torch.manual_seed(seed)
    model = SentenceTransformer(modules=[Transformer(str(folder / name)), Pooling(WIDTH)], device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def texts(columns, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (columns, rows, 5), generator=generator)
    return [[" ".join(WORDS[i] for i in row[: 2 + n % 4]) for n, row in enumerate(column)] for column in picks.tolist()]


def features(model, columns, rows=ROWS, seed=0):
    return [model.preprocess(column) for column in texts(columns, rows, seed)]


def results(loss, model, columns, labels=None, rows=ROWS):
    """The loss, and the gradients of all parameters of the model and the loss."""
    loss.zero_grad()
    random.seed(1)  # the wrappers choose layers
    torch.manual_seed(1)
    value = loss(features(model, columns, rows), labels)
    (1.5 * value).backward()
    grads = {name: parameter.grad for name, parameter in loss.named_parameters() if parameter.grad is not None}
    return value.detach(), {name: grad.clone() for name, grad in grads.items()}


def compare(name, model, *args, columns=2, labels=None, wrap=None, rtol=1e-9, **options):
    """Check that value, gradients and configuration are the library's."""
    found = []
    for module in (theirs, ours):
        own = {key: value.clone() if isinstance(value, nn.Parameter) else value for key, value in options.items()}
        loss = getattr(module, name)(model, *args, **own)
        assert isinstance(loss, getattr(theirs, name))
        whole = loss if wrap is None else wrap(loss)
        described = loss.get_config_dict(), getattr(loss, "citation", ""), wrap and whole.get_config_dict()
        found.append((*results(whole, model, columns, labels), described))
    (value, grads, described), (value_2, grads_2, described_2) = found
    assert value.isfinite() and (value == 0 or any(grad.abs().max() > 1e-6 for grad in grads.values()))
    torch.testing.assert_close(value_2, value, rtol=rtol, atol=0)
    torch.testing.assert_close(grads_2, grads, rtol=100 * rtol, atol=rtol / 100)
    assert described_2 == described
    return value


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score", "pytorch_cos_sim", "model"])
def test_the_similarities(folder, name, columns, similarity):
    model = build(folder)
    if similarity == "model":
        model.similarity_fn_name = "dot"
    function = model.similarity if similarity == "model" else getattr(st_util, similarity)
    compare(name, model, columns=columns, scale=0.7, similarity_fct=function)


def subsets():
    rest = ALL[1:]
    return [("query_to_doc", *some) for n in range(4) for some in itertools.combinations(rest, n)]


@pytest.mark.parametrize("hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
def test_all_directions_and_hardness_modes(folder, hardness):
    model, values = build(folder), []
    for directions, columns in itertools.product(subsets(), (2, 4)):
        options = {"directions": directions, "hardness_mode": hardness, "hardness_strength": 3.0 if hardness else 0.0}
        for mode in ("joint", "per_direction"):
            if mode == "joint" or set(directions) <= {"query_to_doc", "doc_to_query"}:
                name = RANKING[len(values) % 2]
                values.append(compare(name, model, columns=columns, scale=7.0, partition_mode=mode, **options))
    # All differ, but with one direction the modes are the same.
    assert (len(values), len({round(float(value), 9) for value in values})) == (20, 18)


def test_a_hardness_strength_of_zero_has_no_effect(folder):
    compare(RANKING[0], build(folder), columns=3, hardness_mode="all_negatives")


def test_a_learnable_scale(folder):
    """The trainer of the library optimises the parameters of a loss too."""
    # The library's own gradient is NaN with query_to_query and doc_to_doc: -inf, times the scale, times 0.
    for options in ({}, {"directions": ALL[::2]}, {"hardness_mode": "all_negatives", "hardness_strength": 2.0}):
        scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
        model = build(folder)
        loss = ours.MultipleNegativesRankingLoss(model, scale=scale, **options)
        expected = theirs.MultipleNegativesRankingLoss(model, scale=nn.Parameter(scale.detach().clone()), **options)
        found, right = results(loss, model, 3), results(expected, model, 3)
        assert right[1]["scale"].abs() > 1e-4
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("cached", ["", "Cached"])
def test_the_symmetric_classes(folder, cached):
    name = f"{cached}MultipleNegativesSymmetricRankingLoss"
    for columns in (2, 3):
        compare(name, build(folder), columns=columns, scale=5.0)
    with pytest.warns(DeprecationWarning, match="without Symmetric in its name"):
        loss = getattr(ours, name)(build(folder))
    assert isinstance(loss, getattr(ours, f"{cached}MultipleNegativesRankingLoss"))


@pytest.mark.parametrize("name", RANKING)
def test_a_similarity_that_is_not_served_is_refused_by_name(folder, name):
    model, cls = build(folder), getattr(ours, name)
    others = [st_util.euclidean_sim, nn.CosineSimilarity(dim=-1), lambda a, b: a @ b.T, st_util.pairwise_cos_sim]
    for similarity in others:
        message = rf"similarity_fct: expected cos_sim, dot_score.*got {st_util.similarity_fct_name(similarity)}.*{name}"
        with pytest.raises(NotImplementedError, match=message):
            cls(model, similarity_fct=similarity)
        with pytest.raises(NotImplementedError, match=message):
            cls(model).similarity_fct = similarity
    model.similarity_fn_name = "manhattan"
    with pytest.raises(NotImplementedError, match=r"similarity_fct: .* got manhattan_sim"):
        cls(model, similarity_fct=model.similarity)
    loss = cls(model)
    loss.similarity_fct = st_util.dot_score
    assert loss.get_config_dict()["similarity_fct"] == "dot_score"


def test_directions_set_later_without_the_positive_are_refused(folder):
    model = build(folder)
    loss = ours.MultipleNegativesRankingLoss(model, partition_mode="per_direction")
    loss.directions = ("query_to_doc", "doc_to_doc")
    with pytest.raises(NotImplementedError, match="directions: with partition_mode='per_direction' expected"):
        loss(features(model, 2), None)


def test_sparse_embeddings_are_refused(folder):
    loss = ours.MultipleNegativesRankingLoss(build(folder))
    with pytest.raises(NotImplementedError, match="embeddings: expected dense tensors, got sparse ones"):
        loss.compute_loss_from_embeddings([torch.eye(3).to_sparse()] * 2, None)


def test_what_the_library_refuses_is_refused(folder):
    model = build(folder)
    for options in ({"scale": 0}, {"directions": ("doc_to_query",)}, {"hardness_mode": "some"}):
        with pytest.raises(ValueError):
            ours.MultipleNegativesRankingLoss(model, **options)
    for loss in (ours.MultipleNegativesRankingLoss(model), ours.CachedMultipleNegativesRankingLoss(model)):
        with pytest.raises(ValueError, match=r"at least 2 \w+, got 1"):
            loss(features(model, 1), None)
    for columns in (1, 4):
        with pytest.raises(ValueError, match=f"expected 2 or 3 columns, got {columns}"):
            ours.GISTEmbedLoss(model, model)(features(model, columns), None)


def test_the_constructors_are_the_librarys():
    for name in ours.__all__:
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize(
    "margin", [("absolute", 0.0), ("absolute", 0.02), ("relative", -0.05), ("absolute", -3.0)], ids=str
)
def test_guided(folder, name, margin):
    """A margin of -3 masks nothing."""
    model, guide, values = build(folder), build(folder, seed=5), set()
    for contrast, columns in itertools.product(itertools.product([True, False], repeat=2), (2, 3, 4)):
        if columns < 4 or name == "CachedGISTEmbedLoss":
            options = dict(zip(("contrast_anchors", "contrast_positives"), contrast, strict=True))
            options |= {"margin_strategy": margin[0], "margin": margin[1], "temperature": 0.2}
            values.add(round(float(compare(name, model, guide, columns=columns, **options)), 9))
    assert len(values) == (12 if name == "CachedGISTEmbedLoss" else 8)


def test_guided_by_another_tokenizer(folder):
    model, guide = build(folder), build(folder, seed=5, name="other")
    assert ours.GISTEmbedLoss(model, guide).must_retokenize
    same = compare("GISTEmbedLoss", model, build(folder, seed=5), temperature=0.2)
    for name in GUIDED:
        assert compare(name, model, guide, temperature=0.2) != same


def test_the_guide_masks_in_blocks(folder, monkeypatch):
    monkeypatch.setattr("tlkernels.integrations.sentence_transformers_rows._BLOCK", 4)
    compare("GISTEmbedLoss", build(folder), build(folder, seed=5), columns=3, temperature=0.2)


@pytest.mark.parametrize("columns", [3, 4])
def test_distillation(folder, columns):
    model = build(folder)
    labels = 3 * torch.randn(ROWS, columns - 1, dtype=torch.float64)
    labels[0, 1] = -torch.inf  # a candidate that is left out
    for options in (
        {}, {"temperature": 2.0}, {"student_temperature": 0.5, "teacher_temperature": 3.0},
        {"similarity_fct": st_util.pairwise_cos_sim, "teacher_temperature": 0.5},
        {"similarity_fct": st_util.pairwise_euclidean_sim},
    ):  # fmt: skip
        compare("DistillKLDivLoss", model, columns=columns, labels=labels, **options)
    # The library's softmax of the teacher is then float32.
    compare("DistillKLDivLoss", model, columns=columns, labels=labels.float(), rtol=1e-6)


def test_distillation_checks_its_teacher(folder):
    model = build(folder)
    loss = ours.DistillKLDivLoss(model)
    with pytest.raises(ValueError, match="embeddings: expected at least 3 columns, got 2"):
        loss(features(model, 2), torch.zeros(ROWS, 1))
    with pytest.raises(ValueError, match=r"labels: expected teacher scores of shape \(6, 2\), got \(6, 3\)"):
        loss(features(model, 3), torch.zeros(ROWS, 3))
    with pytest.raises(ValueError, match="the teacher scores contain NaN"):
        loss(features(model, 3), torch.full((ROWS, 2), torch.nan))
    with pytest.raises(ValueError, match="student_temperature must be a positive"):
        ours.DistillKLDivLoss(model, student_temperature=0.0)


@pytest.mark.parametrize("name", [*RANKING, *GUIDED, "DistillKLDivLoss"])
def test_inside_the_librarys_matryoshka_loss(folder, name):
    model, labels = build(folder), torch.randn(ROWS, 2, dtype=torch.float64)
    guide = [build(folder, seed=5)] if name in GUIDED else []

    def matryoshka(loss):
        return theirs.MatryoshkaLoss(model, loss, [WIDTH, 16, 4], matryoshka_weights=[1, 0.5, 2.0])

    def layers(loss):
        return theirs.AdaptiveLayerLoss(model, loss)

    def both(loss):
        return theirs.Matryoshka2dLoss(model, loss, [WIDTH, 16], n_layers_per_step=-1, n_dims_per_step=-1)

    for wrap in (matryoshka,) if name.startswith("Cached") else (matryoshka, layers, both):
        compare(name, model, *guide, columns=3, labels=labels, wrap=wrap)


def test_dropout_is_replayed(folder):
    model = build(folder)
    model.train()
    compare("CachedMultipleNegativesRankingLoss", model, columns=3, mini_batch_size=4)
    evaluated = [getattr(m, RANKING[1])(model.eval()) for m in (theirs, ours)]
    with torch.no_grad():
        values = [loss(features(model, 3), None) for loss in evaluated]
    torch.testing.assert_close(*values)
    assert not values[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(folder, dtype, autocast):
    """The loss is float32, and at most as far from float64 as the library's, which under autocast is bfloat16."""
    wide = build(folder).to(dtype).double()
    right = results(theirs.MultipleNegativesRankingLoss(wide), wide, 3)[0]
    model = copy.deepcopy(wide).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = [results(m.MultipleNegativesRankingLoss(model), model, 3)[0] for m in (theirs, ours)]
    assert values[1].dtype == torch.float32
    assert (values[1] - right).abs() <= 2 * (values[0] - right).abs() + 1e-6 * right


class Shapes(TorchDispatchMode):
    """Records the largest number of elements of all results."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if function is not torch.ops.aten.expand.default:
            self.largest = max([self.largest, *(t.numel() * t.itemsize for t in tensors)])
        return result


def embeddings(columns, rows, width):
    return [torch.randn(rows, width, requires_grad=True) for _ in range(columns)]


OPTIONS = [
    {}, {"directions": ALL}, {"directions": ("query_to_doc", "doc_to_doc")},
    {"directions": ("query_to_doc", "query_to_query")},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 3.0, "directions": ALL},
]  # fmt: skip


def test_no_matrix_of_similarities(folder):
    """Nothing is as large as a twentieth of one; with a guide the masks, a byte an entry, are the largest."""
    model, (rows, width) = build(folder), (2048, 8)
    matrix, inputs = rows * rows * 4, embeddings(3, rows, width)
    for options in OPTIONS:
        for cls in (ours.MultipleNegativesRankingLoss, ours.CachedMultipleNegativesRankingLoss):
            loss = cls(model, **options)
            with Shapes() as shapes:
                if cls is ours.MultipleNegativesRankingLoss:
                    loss.compute_loss_from_embeddings(inputs, None).backward()
                else:
                    value = loss.calculate_loss([list(each.split(64)) for each in inputs], with_backward=True)
                    assert not value.requires_grad
            assert 0 < shapes.largest < matrix / 20, options
    loss = ours.CachedGISTEmbedLoss(model, model)
    guides = [each.detach() for each in embeddings(3, rows, width)]
    with Shapes() as shapes:
        loss.calculate_loss([[each] for each in inputs], [[each] for each in guides], with_backward=True)
    assert shapes.largest <= 3 * rows * rows
    with Shapes() as shapes:
        theirs.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(inputs, None)
    assert shapes.largest >= matrix


@pytest.mark.parametrize(
    "name",
    [
        "MultipleNegativesRankingLoss",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("CachedGISTEmbedLoss", "DistillKLDivLoss")),
    ],
)
def test_the_librarys_trainer(folder, tmp_path, name):
    columns = 2 if name != "DistillKLDivLoss" else 3
    data = dict(zip(("anchor", "positive", "negative"), texts(columns, 24), strict=False))
    if name == "DistillKLDivLoss":
        data["label"] = torch.randn(24, 2).tolist()
    weights, logs = [], []
    for module in (theirs, ours):
        model = build(folder, dtype=torch.float32)
        loss = getattr(module, name)(model, *([build(folder, seed=5, dtype=torch.float32)] if "GIST" in name else []))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=6, gradient_accumulation_steps=2,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, seed=0,
            optim="sgd", disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(data), loss=loss
        )
        trainer.train()
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    start = build(folder, dtype=torch.float32).state_dict()
    assert len(logs[0]) == 4 and max((weights[0][key] - start[key]).abs().max() for key in start) > 1e-4
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=2e-6)


RANKS = 2


def on_rank(rank, store, path, failures):
    """Compare the gathered losses with the library's, and with one process where that is the whole batch's."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        check_gathered(rank, path)
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()[-1500:]}")
    dist.barrier()
    dist.destroy_process_group()


def check_gathered(rank, folder):
    torch.manual_seed(0)
    model, guide = build(folder), build(folder, seed=5)
    whole = [torch.randn(RANKS * 4, WIDTH, dtype=torch.float64) for _ in range(6)]

    def run(module, name, inputs, options):
        """The loss and the gradient of the weight of a linear encoder."""
        weight = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=torch.float64).sin().view(WIDTH, WIDTH).requires_grad_()
        loss = getattr(module, name)(model, *([guide] if "GIST" in name else []), **options)
        columns = [each @ weight for each in inputs[:3]]
        if "GIST" in name:
            value = loss.calculate_loss([[each] for each in columns], [[each] for each in inputs[3:]])
        elif "Cached" in name:
            value = loss.calculate_loss([[each] for each in columns])
        else:
            value = loss.compute_loss_from_embeddings(columns, None)
        (grad,) = torch.autograd.grad(value, weight)
        return torch.cat([value.detach().view(1), grad.flatten()])

    mine = [each[4 * rank : 4 * rank + 4] for each in whole]
    for name, options in [(name, {"scale": 2.0, **some}) for name in RANKING for some in OPTIONS] + [
        ("CachedGISTEmbedLoss", {"temperature": 0.5, "contrast_anchors": anchors}) for anchors in (True, False)
    ]:
        gathered = options | {"gather_across_devices": True}
        found, right = (run(module, name, mine, gathered) for module in (ours, theirs))
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)
        if options.get("contrast_anchors"):
            continue  # only the anchors of a process are contrasted with one another
        dist.all_reduce(found)
        torch.testing.assert_close(found / RANKS, run(ours, name, whole, options), rtol=1e-8, atol=1e-12)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
@pytest.mark.skipif(
    sys.platform != "linux" or not dist.is_gloo_available(), reason="torch.distributed has no gloo here"
)
def test_gathered_over_two_processes(folder, tmp_path):
    """Value and gradient are the library's; averaged over the processes they are those of the whole batch."""
    context = mp.get_context("spawn")
    queue, store = context.SimpleQueue(), str(tmp_path / "store")
    other = context.Process(target=on_rank, args=(1, store, folder, queue))
    other.start()
    on_rank(0, store, folder, queue)
    other.join()
    failed = []
    while not queue.empty():
        failed.append(queue.get())
    assert not failed and other.exitcode == 0, "\n".join(failed)
