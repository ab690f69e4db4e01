"""The losses of `tlkernels contrast` against the papers, and its ranks against a loop."""

import pytest
import torch
from train_cases import contrast_formula, ranks_by_hand

from tlkernels.train.contrast_config import ContrastLossConfig
from tlkernels.train.contrast_losses import losses
from tlkernels.train.retrieval import ranks, recall, reciprocals
from tlkernels.train.task import OURS

# ---- the losses --------------------------------------------------------------------------------------------------

LOSSES = {
    "symmetric": ContrastLossConfig(),
    "one way": ContrastLossConfig(symmetric=False),
    "smooth": ContrastLossConfig(label_smoothing=0.2),
    "sigmoid": ContrastLossConfig(name="sigmoid"),
    "nt_xent": ContrastLossConfig(name="nt_xent"),
    "sup_con": ContrastLossConfig(name="sup_con"),
}
WAYS = [OURS, "eager", *((f"eager in slices of {rows}") for rows in (1, 3, 7))]


def embeddings(loss, negatives):
    draw = lambda rows: torch.nn.functional.normalize(torch.randn(rows, 5).double(), dim=-1)  # noqa: E731
    k = None if loss.name == "sup_con" else draw(7)
    ids, labels = torch.tensor([4, 1, 4, 2, 7, 2, 4]), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    scale, bias = torch.tensor(6.0).double(), torch.tensor(-3.0).double() if loss.name == "sigmoid" else None
    return [draw(7), k, draw(14) if negatives else None, ids, labels, scale, bias]


@pytest.mark.parametrize("negatives", [False, True], ids=["pairs", "negatives"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_papers(name, way, negatives):
    """Also where the loss is used twice and is multiplied by 2."""
    loss = LOSSES[name]
    if loss.name != "info_nce" and (negatives or "slices" in way):
        assert "eager in slices" not in losses(loss, None, 3)
        return
    slices = int(way.split()[-1]) if "slices" in way else None
    compute = losses(loss, None, slices)["eager in slices" if slices else way]
    arguments = embeddings(loss, negatives)
    leaves = [value for value in arguments if value is not None and value.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = contrast_formula(loss, *arguments)
    right = torch.autograd.grad(expected, leaves)
    value = compute(*arguments)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (2.0 * value + value).backward()
    for leaf, gradient in zip(leaves, right, strict=True):
        assert torch.allclose(leaf.grad, 3 * gradient, rtol=0, atol=1e-12)


@pytest.mark.full  # the import takes many seconds
@pytest.mark.parametrize("slices", [1, 3, 7])
def test_eager_in_slices_is_the_cached_loss_of_sentence_transformers(slices):
    st = pytest.importorskip("sentence_transformers.losses")
    loss = ContrastLossConfig(symmetric=False)
    q, k, negatives, _, _, scale, _ = embeddings(loss, True)
    leaves = [value.requires_grad_() for value in (q, k, negatives)]
    ours = losses(loss, None, slices)["eager in slices"](q, k, negatives, torch.arange(7), None, scale, None)
    gradients = torch.autograd.grad(ours, leaves)
    model = torch.nn.Sequential(torch.nn.Identity())
    dot = lambda a, b: a @ b.T  # noqa: E731
    cached = st.CachedMultipleNegativesRankingLoss(model, float(scale), dot, mini_batch_size=slices)
    parts = [[value.detach().requires_grad_()] for value in (q, k, *negatives.split(7))]
    assert cached.calculate_loss(parts, with_backward=True).item() == pytest.approx(ours.item(), rel=1e-12)
    right = [part.grad for [part] in parts]
    for mine, theirs in zip(gradients, (*right[:2], torch.cat(right[2:])), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


# ---- retrieval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [False, True], ids=["keys", "same"])
def test_ranks_are_those_of_a_loop(same, monkeypatch):
    """Small integers give many ties, and ids occur several times or not at all; there are several chunks."""
    monkeypatch.setattr("tlkernels.train.retrieval._ROWS", 16)
    queries, query_ids = torch.randint(-2, 3, (50, 4)), torch.randint(0, 30, (50,))
    keys, key_ids = (queries, query_ids) if same else (torch.randint(-2, 3, (37, 4)), torch.randint(0, 30, (37,)))
    expected = ranks_by_hand(queries, keys, query_ids, key_ids, same)
    assert {0, 1} < set(expected) and max(expected) > 10
    found = ranks(queries.float(), keys.float(), query_ids, key_ids, same=same)
    assert found.tolist() == expected
    assert reciprocals(found).tolist() == [1 / rank if 1 <= rank <= 10 else 0 for rank in expected]
    for at in (1, 10):
        assert recall(found, at) == pytest.approx(sum(1 <= rank <= at for rank in expected) / 50)


def test_embeddings_that_are_nan_find_nothing():
    ids = torch.arange(20)
    assert ranks(torch.full((20, 3), torch.nan), torch.ones(20, 3), ids, ids).tolist() == [20] * 20
