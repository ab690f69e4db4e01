"""InfoNCE: edge cases, accuracy at large scales, layouts, bits, memory."""

import math

import harness
import helpers
import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import both, pairs, pytorch, same

import tlkernels as tlk

pytestmark = pytest.mark.usefixtures("poisoned_memory")
impl = helpers.impl_fixture("info_nce")
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_rows(impl, symmetric, reduction):
    """The mean is NaN and the gradient is empty, as F.cross_entropy's."""
    query, key = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    loss = tlk.info_nce(query, key, symmetric=symmetric, reduction=reduction, impl=impl)
    torch.testing.assert_close(
        loss, F.cross_entropy(torch.zeros(0, 0), torch.arange(0), reduction=reduction), equal_nan=True
    )
    if reduction != "none":
        loss.backward()
        assert query.grad.shape == (0, 4)


def test_one_row(impl):
    ours, right = both(impl, pairs(1, 5), symmetric=True)
    assert ours[0] == 0
    assert not ours[1].any()
    same(ours, right)
    same(*both(impl, pairs(1, 1, 4), temperature=0.1, label_smoothing=0.2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_other_key_masked(impl, symmetric):
    """Only the positive is left: the loss and its gradient are 0, not NaN."""
    query, key = pairs(6, 4)
    for mask in (torch.ones(6, 6, dtype=torch.bool), (torch.zeros(6, dtype=torch.long),) * 2):
        ours, _ = both(impl, (query, key), mask=mask, symmetric=symmetric, label_smoothing=0.1)
        assert ours[0] == 0
        assert not any(grad.any() for grad in ours[1:])


def test_mask_covers_keys_not_negatives(impl):
    query, key = pairs(5, 4)
    negatives = torch.randn(3, 4)
    ours, right = both(impl, (query, key), mask=torch.ones(5, 5, dtype=torch.bool), negatives=negatives)
    assert (ours[0] > 0).all()
    same(ours, right)


@pytest.mark.parametrize("per_query", [False, True])
def test_mask_of_all_columns_is_that_of_fewer_negatives(impl, per_query):
    """Masking whole columns gives the same as leaving those negatives out, wherever they are."""
    query, key = pairs(5, 4)
    negatives = torch.randn(5, 6, 4) if per_query else torch.randn(6, 4)
    mask = torch.zeros(5, 11, dtype=torch.bool)
    mask[:, [5, 8, 10]] = True
    kept = negatives[..., [1, 2, 4], :].double()
    for view in (mask, mask.T.contiguous().T):
        ours, _ = both(impl, (query, key), negatives=negatives, mask=view, label_smoothing=0.1, symmetric=not per_query)
        tensors = [t.double().requires_grad_() for t in (query, key)]
        right = pytorch(*tensors, negatives=kept, label_smoothing=0.1, symmetric=not per_query)
        same(ours, [right.detach(), *torch.autograd.grad(right, tensors)])


@pytest.mark.parametrize("wide", [False, True])
def test_target_among_negatives(impl, wide):
    """Also with a mask that covers the target itself."""
    query, key = pairs(4, 6)
    mask = torch.arange(7).expand(4, 7) > 2 if wide else None
    for negatives in (torch.randn(3, 6), torch.randn(4, 3, 6)):
        options = {"target": torch.tensor([0, 6, 4, 2]), "negatives": negatives, "mask": mask, "label_smoothing": 0.1}
        same(*both(impl, (query, key), **options))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_infinity_are_as_in_pytorch(impl, value):
    query, key = pairs(6, 3)
    query[2, 1] = value
    ours, right = both(impl, (query, key), reduction="none", upstream=torch.ones(6))
    torch.testing.assert_close(ours[0].double(), right[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    for a, b in zip(ours[1:], right[1:], strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("scale", [100.0, 1e4, -3.0, 0.0, 1e-30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales(impl, scale, symmetric):
    """Logits of 1e4 do not overflow; 0 and negative scales are allowed."""
    query, key = pairs(40, 8)
    key = F.normalize(query + key, dim=1)
    scale = torch.tensor(scale)
    mask = torch.eye(40).roll(1, 0) > 0

    def run(loss, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, scale)]
        value = loss(leaves[0], leaves[1], logit_scale=leaves[2], symmetric=symmetric, mask=mask)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    ours = run(lambda *t, **o: tlk.info_nce(*t, impl=impl, **o), torch.float32)
    results = ours, run(pytorch, torch.float32), run(pytorch, torch.float64)
    harness.check_results(torch.float32, zip(("loss", "query", "key", "scale"), *results, strict=True))


def test_sure_rows_keep_their_small_gradient(impl):
    """Where the positive is far ahead, 1 - p in float32 would be 0."""
    query = torch.eye(4) * 5
    ours, right = both(impl, (query, query.clone()), symmetric=True)
    assert right[0] < 1e-9
    if impl == "native":  # PyTorch's log_softmax gives 0, and so does the reference
        same(ours, right, rtol=1e-5, atol=0)


def test_duplicates(impl):
    query, _ = pairs(5, 4)
    query = query[[0, 0, 1, 1, 1]]
    same(*both(impl, (query, query.clone()), symmetric=True, temperature=0.1))
    ids = torch.tensor([0, 0, 1, 1, 1])
    ours, right = both(impl, (query, query.clone()), symmetric=True, temperature=0.1, mask=(ids, ids))
    same(ours, right)


def test_strides(impl):
    query, key = pairs(7, 6)
    expected = both(impl, (query, key))[1]
    for layout in ("transposed", "sliced"):
        leaves = [harness.lay_out(t, layout).requires_grad_() for t in (query, key)]
        loss = tlk.info_nce(*leaves, impl=impl)
        same([loss.detach(), *torch.autograd.grad(loss, leaves)], expected)
    mask = torch.rand(7, 7) < 0.3
    for view in (mask.T.contiguous().T, mask[:1].expand(7, 7)):
        same(*both(impl, (query, key), mask=view))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [13, 16])
def test_narrow_rows_of_any_alignment(impl, dtype, features):
    """Tensor cores load chunks of 16 bytes: an unaligned tensor gives the same as its aligned copy."""
    query, key = (t.to(dtype) for t in pairs(9, features))

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss = tlk.info_nce(*leaves, temperature=0.1, symmetric=True, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = run(query, key)
    views = [[harness.lay_out(t, layout) for t in (query, key)] for layout in ("transposed", "sliced")]
    views.append([torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (query, key)])
    for tensors in views:
        torch.testing.assert_close(run(*tensors), expected)


def test_no_negatives_and_no_keys(impl):
    """Some sizes are 0, the others are not."""
    query, key = pairs(4, 3)
    same(*both(impl, (query, key), negatives=torch.randn(0, 3)))
    same(*both(impl, (query, key), negatives=torch.randn(4, 0, 3)))
    same(*both(impl, (query, key[:0]), target=torch.tensor([0, 1, 1, 0]), negatives=torch.randn(2, 3)))


def test_zero_rows_normalized(impl):
    """F.normalize's lower bound of the norm."""
    query, key = pairs(5, 4)
    query[1] = 0
    query[2] *= 1e-20
    ours, right = both(impl, (query, key), normalize=True)
    same(ours[:1], right[:1])
    for row in range(5):
        same([ours[1][row]], [right[1][row]], rtol=1e-4, atol=1e-6 * float(right[1][row].abs().max()))


def test_same_bits_run_after_run(impl):
    query, key = pairs(700, 30)
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (query, key)]
        loss = tlk.info_nce(*leaves, temperature=0.07, symmetric=True, impl=impl)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


MEMORY = """
import sys, torch, tlkernels as tlk
name, n, d = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def run(n, d):
    x, y = (torch.randn(n, d).requires_grad_() for _ in range(2))
    ids = torch.arange(n) // 2
    loss = {
        "info_nce": lambda: tlk.info_nce(x, y, temperature=0.07, symmetric=True, normalize=True, mask=(ids, ids)),
        "none": lambda: tlk.info_nce(x, y, temperature=0.07, symmetric=True, reduction="none").sum(),
        "nt_xent": lambda: tlk.nt_xent(x[: n // 2], x[n // 2 :], temperature=0.07),
        "sup_con": lambda: tlk.sup_con(x, ids, temperature=0.07),
        "sigmoid_contrastive": lambda: tlk.sigmoid_contrastive(x, y, logit_scale=10.0, logit_bias=-10.0),
    }[name]()
    loss.backward()

run(600, 8)  # loads what a first call loads
print(peak(lambda: run(n, d)), status("VmHWM"))
"""


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("name", [
    "info_nce", "sigmoid_contrastive",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("none", "nt_xent", "sup_con")),
])  # fmt: skip
def test_no_matrix_of_similarities(name):
    """6144 x 6144 floats are 151 MB, as bytes 38 MB; embeddings, gradients, statistics and a tile are under 16 MB."""
    above, _ = helpers.peak_memory(MEMORY, name, 6144, 16)
    assert above < 16e6


@pytest.mark.full
@pytest.mark.usefixtures("needs_native")
def test_65536_rows_within_one_and_a_half_gigabytes():
    _, whole = helpers.peak_memory(MEMORY, "info_nce", 65536, 384)
    assert whole < 1.5e9
