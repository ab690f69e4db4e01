"""Losses of other libraries: each proves that it computes the same loss, or is absent with a reason."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tlkernels.bench import losses, peers
from tlkernels.bench.peers import Peer, Refused, proof
from tlkernels.bench.work import Case, LossStep, build

SHAPES = {
    "cross_entropy": (256, 1003),
    "linear_cross_entropy": (256, 96, 3001),
    "linear_selective_log_softmax": (256, 96, 3001),
    "linear_distillation": (256, 96, 80, 3001),
    "selective_log_softmax": (256, 1003),
    "distillation": (256, 1003),
    "info_nce": (256, 96),
    "nt_xent": (256, 96),
    "sup_con": (256, 96),
    "sigmoid_contrastive": (256, 96),
}
DIVERGENCES = ("reverse_kl", "js", "tv")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def case(loss="cross_entropy", dtype=torch.float32, **options):
    return Case(loss, SHAPES[loss], dtype, getattr(losses, loss), options=options)


class ByHand(torch.autograd.Function):
    """Cross entropy and its gradient, as in a textbook; the gradient may be wrong by a factor."""

    @staticmethod
    def forward(ctx, logits, target, slope):
        ctx.slope = slope
        ctx.save_for_backward(logits, target)
        return (logits.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)).mean()

    @staticmethod
    def backward(ctx, upstream):
        logits, target = ctx.saved_tensors
        grad = logits.softmax(1) - F.one_hot(target, logits.shape[1])
        return upstream * (ctx.slope / len(logits) * grad).to(logits.dtype), None, None


def made_up(loss, package="torch", devices=("cpu",), fresh=()):
    """A library with a cross entropy, which has one option."""

    def adapter(*, target, reduction="mean"):
        return lambda x: loss(x, target)

    return Peer("made-up", package, {"cross_entropy": adapter}, devices, fresh)


def by_hand(slope=1.0):
    return made_up(lambda x, target: ByHand.apply(x, target, slope))


@pytest.fixture
def found(monkeypatch):
    """The work of a case with one made-up peer."""

    def work_with(peer, case):
        monkeypatch.setattr(peers, "PEERS", (peer,))
        monkeypatch.setattr(peers, "_refusals", {})
        return peers.with_peers(case, case.work())

    return work_with


@DTYPES
def test_cross_entropy_by_hand_is_proven(dtype):
    proof.prove(by_hand(), case(dtype=dtype))


@DTYPES
@pytest.mark.parametrize("slope", [1.01, 0.99, float("nan")])
def test_a_gradient_wrong_by_a_hundredth_is_another_loss(dtype, slope):
    much = "nan" if slope != slope else "0.01"
    with pytest.raises(Refused) as refused:
        proof.prove(by_hand(slope), case(dtype=dtype))
    assert str(refused.value) == f"computes another loss: gradient 1 differs by {much} in float32, more than 0.001"


@DTYPES
def test_a_mean_in_place_of_a_sum_is_another_loss(dtype):
    with pytest.raises(Refused, match=r"^computes another loss: value differs by 0\.99 in float32"):
        proof.prove(by_hand(), case(dtype=dtype, reduction="sum"))


def sixteen_bits(factor):
    def loss(x, target):
        if x.dtype is torch.float32:
            raise TypeError("takes 16 bits\nand more lines")
        return factor * F.cross_entropy(x, target)

    return made_up(loss)


def test_a_peer_without_float32_is_proven_in_the_dtype_of_the_case():
    proof.prove(sixteen_bits(1.0), case(dtype=torch.bfloat16))
    with pytest.raises(Refused, match=r"value differs by 0\.\d+ in bfloat16, more than 0\.03"):
        proof.prove(sixteen_bits(1.1), case(dtype=torch.bfloat16))
    with pytest.raises(Refused, match=r"^TypeError: takes 16 bits$"):
        proof.prove(sixteen_bits(1.0), case())


def test_in_16_bits_a_peer_may_err_twice_as_much_as_eager():
    pairs = case("info_nce", torch.bfloat16)
    work, wide = pairs.work(), pairs.work(wide=True)
    right, got = LossStep(wide.eager, wide).results(), LossStep(work.eager, work).results()
    gradient = float((got[1] - right[1]).norm() / right[1].norm())
    assert proof.HALF < gradient <= proof._bar(by_hand(), pairs, work, right) / 1.9


def test_the_bar_in_tf32_is_for_a_gpu_and_still_shows_a_hundredth():
    tf32 = by_hand(1.004)._replace(tf32=True)
    with pytest.raises(Refused, match=r"more than 0\.001"):
        proof.prove(tf32, case())
    assert proof._bar(tf32, Case("", (), torch.float32, losses.mse, device="cuda"), None, []) == proof.TF32 < 0.01


@pytest.mark.parametrize(
    ("peer", "options", "reason"),
    [
        (made_up(F.cross_entropy), {"label_smoothing": 0.1}, "has no option label_smoothing"),
        (made_up(F.cross_entropy, "no-such-library"), {}, "not installed (pip install no-such-library)"),
        (made_up(F.cross_entropy, devices=("cuda",)), {}, "needs a GPU"),
        (made_up(lambda x, target: 1 / 0), {}, "ZeroDivisionError: division by zero"),
        (by_hand(1.5), {}, "computes another loss: gradient 1 differs by 0.5 in float32, more than 0.001"),
    ],
)
def test_a_peer_that_does_not_compute_the_loss_is_absent_with_the_reason(found, peer, options, reason):
    work = found(peer, case(**options))
    assert work.absent == {"made-up": reason}
    assert not work.peers


def test_a_library_without_the_loss_is_not_mentioned(found):
    work = found(by_hand(), case("info_nce"))
    assert not work.absent
    assert not work.peers


class InPlace(ByHand):
    """Writes the gradient over the logits, unseen by autograd, as Liger-Kernel does."""

    @staticmethod
    def backward(ctx, upstream):
        logits = ctx.saved_tensors[0].detach()
        return logits.copy_(ByHand.backward(ctx, upstream)[0]), None, None


def test_a_peer_that_overwrites_its_inputs_gets_a_copy_for_each_call(found):
    peer = made_up(lambda x, target: InPlace.apply(x, target, 1.0), fresh=("cross_entropy",))
    work = found(peer, case())
    assert work.fresh == ("made-up",)
    step = build("made-up", work)
    first, second = step.results(), step.results()
    assert all(map(torch.equal, first, second))
    assert found(peer._replace(fresh=()), case()).fresh == ()


def test_a_case_is_proven_once_for_all_draws(found, monkeypatch):
    proven = []
    monkeypatch.setattr(peers, "prove", lambda peer, case: proven.append(case.id))
    work = found(by_hand(), case())
    for what in (case(), case(dtype=torch.bfloat16), case(reduction="sum"), case()):
        peers.with_peers(what, work)
    assert len(proven) == 3


def test_one_peer_comes_without_a_proof(found):
    found(by_hand(2.0), case())
    work = peers.with_peer("made-up", case(), case().work())
    assert list(work.peers) == ["made-up"]
    with pytest.raises(Refused, match="has no option label_smoothing"):
        peers.with_peer("made-up", case(label_smoothing=0.1), case(label_smoothing=0.1).work())


def test_sizes_of_a_proof_are_small_and_stay_odd():
    assert proof.small((8192, 4096, 128257)) == (128, 64, 769)
    assert proof.small((8191, 4097, 50257)) == (255, 65, 593)
    assert proof.small((32, 10)) == (32, 10)


def test_only_adapters_import_the_libraries():
    roots = set()
    for path in Path(peers.__file__).parent.glob("*.py"):
        for line in ast.parse(path.read_text()).body:
            if isinstance(line, ast.Import):
                roots |= {name.name.partition(".")[0] for name in line.names}
            elif isinstance(line, ast.ImportFrom):
                roots.add(line.module.partition(".")[0])
    assert roots - sys.stdlib_module_names == {"torch", "tlkernels"}


LISTED = [(peer, loss) for peer in peers.PEERS for loss in peer.losses]
NAMES = [f"{peer.name}: {loss}" for peer, loss in LISTED]


@pytest.mark.parametrize(("peer", "loss"), LISTED, ids=NAMES)
def test_an_adapter_takes_what_the_case_of_its_loss_has(peer, loss):
    """A misspelt keyword would make a peer absent for ever."""
    parameters = inspect.signature(peer.losses[loss]).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    assert needed <= case(loss).work().data.keys() <= parameters.keys()


def test_contestants_have_names_of_their_own():
    names = [peer.name for peer in peers.PEERS]
    assert len({*names, "auto", "native", "triton", "reference", "eager", "compile", "floor"}) == len(names) + 7
    assert all(set(peer.fresh) <= peer.losses.keys() for peer in peers.PEERS)


SLOW = ("liger-kernel", "trl", "sentence-transformers")
"""They take seconds to import."""


def measured_here():
    """Every loss of every peer that runs on a CPU, by the time that a proof takes."""
    for peer, loss in LISTED:
        if "cpu" in peer.devices:
            slow = peer.compiles or peer.package in SLOW
            for option in ("forward_kl", *DIVERGENCES) if loss == "distillation" else ("",):
                marks = [pytest.mark.full] if slow else []
                yield pytest.param(peer, loss, option, marks=marks, id=f"{peer.name}: {loss} {option}".strip())


@DTYPES
@pytest.mark.parametrize(("peer", "loss", "divergence"), list(measured_here()))
def test_a_library_that_is_installed_computes_the_same_loss(found, peer, loss, divergence, dtype):
    if peer.package not in peers.versions():
        pytest.skip(f"{peer.package} is not installed")
    work = found(peer, case(loss, dtype, **({"divergence": divergence} if divergence else {})))
    if divergence == "tv":
        assert work.absent == {peer.name: "has no divergence 'tv'"}
    else:
        assert not work.absent
        assert peer.name in work.peers


@DTYPES
@pytest.mark.parametrize("name", ["torch chunked", "torch chunked accurate", "torch chunked compact"])
def test_rows_that_do_not_count_are_proven_too(name, dtype):
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    make, options = losses.masked_linear_cross_entropy, {"counted": 0.3}
    proof.prove(peer, Case("linear_cross_entropy", SHAPES["linear_cross_entropy"], dtype, make, options=options))


@pytest.mark.full
def test_the_auto_chunker_is_believed_only_where_it_chunks():
    chunked = case("linear_cross_entropy")
    square = Case("linear_cross_entropy", (64, 64, 3001), torch.float32, losses.linear_cross_entropy)
    for _ in range(2):  # the second time torch.compile has the lines
        build("torch auto-chunker", peers.with_peer("torch auto-chunker", chunked, chunked.work()))()
    for _ in range(2):
        with pytest.raises(Refused, match="chunks nothing"):
            build("torch auto-chunker", peers.with_peer("torch auto-chunker", square, square.work()))()


def test_cubic_memory_is_refused_before_it_is_allocated():
    pytest.importorskip("pytorch_metric_learning")
    many = Case("nt_xent", (1024, 96), torch.float32, losses.nt_xent)
    with pytest.raises(Refused, match=r"17 GiB for 1024 rows"):
        build("pytorch-metric-learning", peers.with_peer("pytorch-metric-learning", many, many.work()))()
