"""open_clip's losses and ours: the same values and gradients, on one process and on two."""

import copy
import math
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip_train.params import parse_args
from open_clip_train.train import train_one_epoch
from ranks import failures_of
from torch.nn.parallel import DistributedDataParallel

from tlkernels.integrations import open_clip as ours

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, ROWS, D = 2, 5, 4
WHOLE = RANKS * ROWS
VISION = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
TOGETHER = ("--local-loss", "--gather-with-grad")

KINDS = {
    "clip": ["--model=ViT-B-32"],
    "siglip": ["--model=ViT-B-32", "--siglip"],
    "coca": ["--model=coca_ViT-B-32", "--coca-caption-loss-weight=2", "--coca-contrastive-loss-weight=0.5"],
    "coca-captions-only": ["--model=coca_ViT-B-32", "--coca-contrastive-loss-weight=0"],
    "distill": ["--model=ViT-B-32", "--distill-model=ViT-L-14", "--distill-pretrained=openai"],
}


def arguments(kind, *flags, rank=0, world_size=1):
    """The training script's arguments, and what its main() adds to them."""
    args = parse_args([*KINDS[kind], *flags])
    args.distill = args.distill_model is not None
    args.rank, args.world_size = rank, world_size
    return args


def batch():
    """Inputs of linear encoders, whose weights are the parameters, and the logits of a decoder."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(1, 7, (WHOLE, 6), generator=generator)
    labels[:, 4:] = 0  # the padding, as many on each rank
    return {
        "image": normal(WHOLE, 6), "text": normal(WHOLE, 6), "logits": normal(WHOLE, 6, 7), "labels": labels,
        "dist_image": normal(WHOLE, D), "dist_text": normal(WHOLE, D),
    }  # fmt: skip


def parameters():
    generator = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(D, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = torch.tensor(9.0).double(), torch.tensor(-3.0).double()
    values = {"images": images, "texts": texts, "scale": scale, "bias": bias, "decoder": torch.ones(7).double()}
    return {name: value.requires_grad_() for name, value in values.items()}


def outputs(kind, rows, p, bias=True):
    """What a model hands to its loss: `loss(**outputs)`."""
    given = {
        "image_features": F.normalize(rows["image"] @ p["images"].T, dim=-1),
        "text_features": F.normalize(rows["text"] @ p["texts"].T, dim=-1),
        "logit_scale": p["scale"],
    }
    if kind in ("clip", "siglip") and bias is not None:
        given["logit_bias"] = p["bias"] if bias else None
    if kind.startswith("coca"):
        given |= {"logits": rows["logits"] * p["decoder"], "labels": rows["labels"]}
    if kind == "distill":
        given |= {f"dist_{name}_features": F.normalize(rows[f"dist_{name}"], dim=-1) for name in ("image", "text")}
        given["dist_logit_scale"] = torch.tensor(20.0).double()
    return given


def results(loss, kind, rows, bias=True):
    """Return the losses by name, and the gradients of their sum by parameter."""
    p = parameters()
    losses = loss(**outputs(kind, rows, p, bias), output_dict=True)
    grads = torch.autograd.grad(sum(losses.values()), list(p.values()), allow_unused=True)
    grads = {name: torch.zeros_like(q) if g is None else g for (name, q), g in zip(p.items(), grads, strict=True)}
    return {name: value.detach() for name, value in losses.items()}, grads


def assert_same(found, expected, rtol=1e-9):
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine) == list(theirs)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=1e-12, check_dtype=False, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_has_their_values_and_gradients(kind):
    args = arguments(kind)
    loss = ours.create_loss(args)
    assert isinstance(loss, type(open_clip.create_loss(args)))
    assert type(loss).__module__ == ours.__name__
    assert_same(results(loss, kind, batch()), results(open_clip.create_loss(args), kind, batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_dictionary_the_losses_come_as_theirs_do(kind):
    args, p = arguments(kind), parameters()
    found, expected = (make(args)(**outputs(kind, batch(), p)) for make in (ours.create_loss, open_clip.create_loss))
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0, check_dtype=False)


def test_siglip_without_a_bias_is_theirs():
    args = arguments("siglip")
    found, expected = (
        results(make(args), "siglip", batch(), False) for make in (ours.create_loss, open_clip.create_loss)
    )
    assert_same(found, expected)


def test_clip_without_a_bias_is_theirs_and_a_scale_may_have_shape_1():
    p, args = parameters(), arguments("clip")
    p["scale"] = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    losses = [make(args)(**outputs("clip", batch(), p, None)) for make in (ours.create_loss, open_clip.create_loss)]
    grads = [torch.autograd.grad(loss, p["scale"])[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=0)


def test_a_distillation_teacher_gets_their_gradient_too():
    args, grads = arguments("distill"), []
    for make in (ours.create_loss, open_clip.create_loss):
        given = outputs("distill", batch(), parameters())
        leaves = [given[name].requires_grad_() for name in ("dist_image_features", "dist_logit_scale")]
        grads.append(torch.autograd.grad(make(args)(**given)[1], leaves))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-12)


def test_no_n_by_n_matrix_is_made():
    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.most = max([self.most, *sizes])
            return result

    rows = {
        "image_features": torch.randn(600, 8),
        "text_features": torch.randn(600, 8),
        "logit_scale": torch.tensor(1.0),
    }
    sizes = {}
    for make in (ours.create_loss, open_clip.create_loss):
        with Widest() as widest:
            make(arguments("clip"))(**{name: value.clone().requires_grad_() for name, value in rows.items()}).backward()
        sizes[make] = widest.most
    assert sizes[open_clip.create_loss] == 600 * 600
    assert sizes[ours.create_loss] < 600 * 20


REFUSED = {
    "horovod": ("clip", ["--horovod"], "--horovod"),
    "ring": ("siglip", ["--siglip", "--loss-dist-impl=shift"], "--loss-dist-impl.*'gather'.*'shift'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_not_served_is_refused_by_name(name):
    kind, flags, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        ours.create_loss(arguments(kind, *flags))


@pytest.mark.parametrize("kind", ["clip", "coca", "distill"])
@pytest.mark.parametrize("flags", [(), ("--local-loss",), ("--gather-with-grad",)], ids=lambda flags: "".join(flags))
def test_flags_that_train_something_else_are_refused_on_several_processes(kind, flags):
    with pytest.raises(NotImplementedError, match=r"--local-loss --gather-with-grad|--local-loss, --gather-with-grad"):
        ours.create_loss(arguments(kind, *flags, world_size=2))
    ours.create_loss(arguments(kind, *flags))


def test_a_loss_for_more_processes_than_there_are_raises():
    with pytest.raises(ValueError, match=r"world_size: expected 1 .* got 2"):
        results(ours.create_loss(arguments("clip", *TOGETHER, world_size=2)), "clip", batch())


def tiny(kind, dtype=torch.float64):
    torch.manual_seed(3)
    if kind == "coca":
        decoder = {"width": 16, "heads": 2, "layers": 1, "context_length": 5, "vocab_size": 30}
        text = TEXT | {"embed_cls": True, "output_tokens": True}
        vision = VISION | {
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 4,
            "output_tokens": True,
        }
        model = CoCa(16, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    else:
        model = open_clip.CLIP(8, VISION, TEXT, init_logit_bias=-10.0 if kind == "siglip" else None, output_dict=True)
    with torch.no_grad():  # open_clip leaves some of CoCa's parameters uninitialised
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype)


def pairs(kind, count=6):
    generator = torch.Generator().manual_seed(4)
    texts = torch.randint(1, 30, (count, 5 if kind == "coca" else 6), generator=generator)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64), texts


class Loader(list):
    """Two batches, as the training script's loader has them."""

    num_batches, num_samples = 2, 12


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_their_training_loop_trains_the_same_model(kind, accumulation):
    args = arguments(kind, f"--accum-freq={accumulation}", "--precision=fp32", "--device=cpu", "--log-every-n-steps=1")
    args.distill = args.wandb = False
    args.distributed = args.skip_scheduler = False
    trained = []
    for make in (ours.create_loss, open_clip.create_loss):
        model = tiny(kind)
        loader = Loader([pairs(kind), tuple(part.flip(0) for part in pairs(kind))])
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_one_epoch(model, data, make(args), 0, optimizer, None, lambda step: None, None, args)
        trained.append({name: value.detach() for name, value in model.named_parameters()})
    start = dict(tiny(kind).named_parameters())
    assert not any(torch.equal(start[name], trained[1][name]) for name in ("logit_scale", "visual.proj"))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca", "distill"])
def test_mixed_precision_has_their_loss_to_rounding(kind):
    args, (images, texts) = arguments(kind), pairs(kind)
    model = tiny(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(images.float(), texts)
        if kind == "distill":
            with torch.no_grad():
                given |= {
                    f"dist_{name}": value for name, value in tiny(kind, torch.float32)(images.float(), texts).items()
                }
        found, expected = (make(args)(**given, output_dict=True) for make in (ours.create_loss, open_clip.create_loss))
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name].float(), rtol=2e-2, atol=0)
    sum(found.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def share(rows, rank):
    return {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in rows.items()}


def averaged(loss, kind, rank):
    """Return the mean over the ranks of losses and gradients, as data-parallel training has them."""
    losses, grads = results(loss, kind, share(batch(), rank))
    for value in (*losses.values(), *grads.values()):
        if value.is_floating_point():
            dist.all_reduce(value)
            value /= RANKS
    return losses, grads


def check_ours(rank, kind, flags):
    whole = results(open_clip.create_loss(arguments(kind)), kind, batch())
    args = arguments(kind, *flags, rank=rank, world_size=RANKS)
    assert_same(averaged(ours.create_loss(args), kind, rank), whole)
    assert_same(
        results(ours.create_loss(args), kind, share(batch(), rank)),
        results(open_clip.create_loss(args), kind, share(batch(), rank)),
    )


def check_theirs(rank, flags, encoders, direction):
    """Compare the gradient of open_clip's loss with the whole batch's: the factor of its length, and its direction."""
    _, whole = results(open_clip.create_loss(arguments("clip")), "clip", batch())
    _, found = averaged(open_clip.create_loss(arguments("clip", *flags, rank=rank, world_size=RANKS)), "clip", rank)
    for name in ("images", "texts"):
        factor = (found[name].norm() / whole[name].norm()).item()
        cosine = F.cosine_similarity(found[name].flatten(), whole[name].flatten(), dim=0).item()
        if direction:
            assert math.isclose(factor, encoders, rel_tol=1e-9) and cosine > 1 - 1e-12, (name, factor, cosine)
        else:
            assert cosine < 0.99, (name, factor, cosine)
    torch.testing.assert_close(found["scale"], whole["scale"], rtol=1e-9, atol=1e-12)


def check_their_coca(rank):
    """By default the encoders' gradient is half of the whole batch's, the caption's is right: the weights change."""
    _, whole = results(open_clip.create_loss(arguments("coca")), "coca", batch())
    _, found = averaged(open_clip.create_loss(arguments("coca", rank=rank, world_size=RANKS)), "coca", rank)
    for name, factor in {"images": 1 / RANKS, "texts": 1 / RANKS, "decoder": 1.0}.items():
        torch.testing.assert_close(found[name], factor * whole[name], rtol=1e-9, atol=1e-12)


def check_exchange(rank, way):
    whole = results(open_clip.create_loss(arguments("siglip")), "siglip", batch())
    args = arguments("siglip", f"--loss-dist-impl={way}", rank=rank, world_size=RANKS)
    assert_same(averaged(open_clip.create_loss(args), "siglip", rank), whole)


def check_model(rank, kind):
    """A model of open_clip in DistributedDataParallel: the gradients are those of the whole batch on one process."""
    images, texts = pairs(kind)
    whole, model = tiny(kind), tiny(kind)
    sum(open_clip.create_loss(arguments(kind))(**whole(images, texts), output_dict=True).values()).backward()
    args = arguments(kind, *TOGETHER, rank=rank, world_size=RANKS)
    parallel = DistributedDataParallel(model)
    half = slice(rank * 3, rank * 3 + 3)
    sum(ours.create_loss(args)(**parallel(images[half], texts[half]), output_dict=True).values()).backward()
    expected = {name: value.grad for name, value in whole.named_parameters()}
    torch.testing.assert_close({n: v.grad for n, v in model.named_parameters()}, expected, rtol=1e-8, atol=1e-12)


def check_bias_of_clip(rank):
    """CLIP with a bias in DistributedDataParallel, which raises in the second step if a parameter has no gradient."""
    model = DistributedDataParallel(open_clip.CLIP(8, VISION, TEXT, init_logit_bias=-1.0, output_dict=True).double())
    loss, (images, texts) = ours.create_loss(arguments("clip", *TOGETHER, rank=rank, world_size=RANKS)), pairs("clip")
    for _ in range(2):
        loss(**model(images, texts)).backward()
    assert model.module.logit_bias.grad == 0


def check_wrong_rank(rank):
    args = arguments("clip", *TOGETHER, rank=1 - rank, world_size=RANKS)
    with pytest.raises(ValueError, match="rank, world_size"):
        results(ours.create_loss(args), "clip", share(batch(), rank))


CHECKS = {
    **{f"ours-{kind}": (check_ours, kind, TOGETHER) for kind in KINDS},
    "ours-siglip-gather": (check_ours, "siglip", ("--loss-dist-impl=gather",)),
    "theirs-by-default-half-the-gradient": (check_theirs, (), 1 / RANKS, True),
    "theirs-local-another-direction": (check_theirs, ("--local-loss",), None, False),
    "theirs-gather-right": (check_theirs, ("--gather-with-grad",), 1.0, True),
    "theirs-coca-by-default-other-weights": (check_their_coca,),
    "theirs-both-right": (check_theirs, TOGETHER, 1.0, True),
    **{f"theirs-siglip-{way}": (check_exchange, way) for way in ("bidir", "shift", "reduce", "gather")},
    **{f"model-{kind}": (check_model, kind) for kind in ("clip", "siglip", "coca")},
    "bias-of-clip": (check_bias_of_clip,),
    "wrong-rank": (check_wrong_rank,),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return failures_of(CHECKS, RANKS, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(failures, name):
    assert name not in failures, "\n".join(failures[name])


def test_copies_and_pickles_of_a_loss_work(tmp_path):
    loss = ours.create_loss(arguments("clip"))
    torch.save(loss, tmp_path / "loss.pt")
    for other in (copy.deepcopy(loss), torch.load(tmp_path / "loss.pt", weights_only=False)):
        assert_same(results(other, "clip", batch()), results(loss, "clip", batch()), rtol=0)
