"""torchtitan's losses and ours, on its own Llama: one process, FSDP and tensor parallelism on two."""

import functools
from types import SimpleNamespace

import pytest
import spmd_types
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.tools.utils as titan_tools
from ranks import failures_of
from spmd_types.checker import typecheck
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

if not torch.accelerator.is_available():  # torchtitan takes a machine without an accelerator for one with CUDA
    titan_tools.device_type, titan_tools.device_module = "cpu", torch.cpu

from torchtitan.components import loss as titan
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as titan_utils
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.parallelize import parallelize_llama
from torchtitan.trainer import Trainer

from tlkernels.integrations import torchtitan as ours

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, CLASSES = 2, 2048
OURS = {
    "logits": ours.CrossEntropyLoss.Config(global_vocab_size=CLASSES),
    "hidden": ours.LinearCrossEntropyLoss.Config(global_vocab_size=CLASSES),
    "chunked": titan.ChunkedLossWrapper.Config(
        num_chunks=2, loss_fn=ours.CrossEntropyLoss.Config(global_vocab_size=CLASSES)
    ),
}
THEIRS = titan.ChunkedLossWrapper.Config(num_chunks=2, loss_fn=titan.CrossEntropyLoss.Config(global_vocab_size=CLASSES))


def llama(parallelism=None, dims=None, dtype=None, training=None):
    """A Llama of one layer, built and parallelised as the trainer does."""
    config = model_registry("debugmodel").model
    config.layers = config.layers[:1]
    config.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()  # the others need a GPU to train
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism or ParallelismConfig()))
    torch.manual_seed(0)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    if dims is not None:
        parallelize_llama(
            model, parallel_dims=dims, training=training or TrainingConfig(mixed_precision_param="float32"),
            parallelism=parallelism, compile_config=CompileConfig(), ac_config=None, dump_folder="",
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # Gloo has no other
    if dtype is not None:
        for parameter in model.parameters():  # not the rotary embedding's complex buffer
            parameter.data = parameter.data.to(dtype)
    return model


def batch(rows=4, length=16):
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(CLASSES, (rows, length), generator=generator) for _ in range(2))
    labels[:, 3] = -100
    return tokens, labels, {"positions": torch.arange(length).expand(rows, length)}


def wired(config, model):
    """Build a loss, and wire it to the model as the trainer does."""
    loss = config.build(compile_config=CompileConfig())
    if isinstance(loss, titan.ChunkedLossWrapper):
        loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    return loss


def train(config, model, rows):
    """Return the loss and every gradient."""
    loss_fn = wired(config, model)
    tokens, labels, extra = rows
    loss, metrics = loss_fn(model(tokens, **extra), labels, torch.tensor(60), **extra)
    loss.backward()
    assert metrics == {}
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in (loss, *gradients(model).values())]
    return whole[0].detach(), dict(zip(gradients(model), whole[1:], strict=True))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", OURS)
def test_a_model_gets_their_loss_and_gradients(name):
    found, expected = train(OURS[name], llama(), batch()), train(THEIRS, llama(), batch())
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_in_float64_it_is_the_sum_divided_by_the_tokens(name):
    # torchtitan's own rounds the logits to float32.
    tokens, labels, extra = batch()
    found, model = train(OURS[name], llama(dtype=torch.float64), batch()), llama(dtype=torch.float64)
    logits = model(tokens, **extra).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum") / 60
    expected.backward()
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found, (expected.detach(), gradients(model)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_of_bfloat16_the_loss_is_float32_and_the_gradients_are_theirs_to_rounding(name):
    found = train(OURS[name], llama(dtype=torch.bfloat16), batch())
    expected = train(titan.CrossEntropyLoss.Config(), llama(dtype=torch.bfloat16), batch())
    assert found[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=2e-4, atol=0)
    if name == "logits":  # the same logits
        torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    for key, grad in found[1].items():
        error = (grad.double() - expected[1][key].double()).norm() / expected[1][key].double().norm()
        assert grad.dtype == torch.bfloat16 and error < 0.02, (key, error)


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_in_validation_it_is_their_sum_without_a_graph(name):
    tokens, labels, extra = batch()
    losses = []
    for config in (OURS[name], THEIRS):
        model = llama()
        loss_fn = wired(config, model)
        with torch.no_grad():
            losses.append(loss_fn(model(tokens, **extra), labels)[0])
    assert not losses[0].requires_grad
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_it_is_compiled_where_the_configuration_says_so(name):
    model, (tokens, labels, extra) = llama(), batch()
    compiled = OURS[name].build(compile_config=CompileConfig(enable=True, components=["loss"], backend="aot_eager"))
    assert hasattr(compiled.fn, "_torchdynamo_orig_callable")
    if name == "hidden":
        compiled.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    found = compiled(model(tokens, **extra), labels, torch.tensor(60))[0]
    found.backward()
    torch.testing.assert_close(
        (found.detach(), gradients(model)), train(THEIRS, llama(), batch()), rtol=2e-5, atol=1e-8
    )


def test_the_trainers_configuration_takes_both():
    for kind in (ours.CrossEntropyLoss, ours.LinearCrossEntropyLoss):
        config = Trainer.Config(loss=kind.Config(global_vocab_size=CLASSES))
        assert type(config.loss.build(compile_config=config.compile)) is kind
        assert config.loss.to_dict() == {"global_vocab_size": CLASSES}
    assert issubclass(ours.LinearCrossEntropyLoss, titan.ChunkedLossWrapper)  # the trainer hands it the layer
    assert issubclass(ours.CrossEntropyLoss, titan.CrossEntropyLoss)


def test_no_logits_are_kept_for_the_backward():
    kept = {}
    configs = {"logits": OURS["logits"], "hidden": OURS["hidden"], "theirs": titan.CrossEntropyLoss.Config()}
    for name, config in configs.items():
        model, (tokens, labels, extra), sizes = llama(), batch(), []
        loss_fn = wired(config, model)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.shape), x)[1], lambda x: x
        ):
            loss_fn(model(tokens, **extra), labels)
        kept[name] = any(shape[-1:] == (CLASSES,) for shape in sizes)
    assert kept == {"logits": True, "hidden": False, "theirs": True}


def test_the_layer_has_its_own_forward_again():
    model, (tokens, labels, extra) = llama(), batch()
    wired(OURS["hidden"], model)(model(tokens, **extra), labels)
    assert "forward" not in vars(model.lm_head)
    assert model.lm_head(torch.randn(2, 256)).shape == (2, CLASSES)


def test_the_layers_forward_comes_back_after_an_error():
    model, (tokens, _, extra) = llama(), batch()
    loss_fn = wired(OURS["hidden"], model)
    with pytest.raises(ValueError, match="target"):
        loss_fn(model(tokens, **extra), torch.zeros(3, dtype=torch.int64))
    assert "forward" not in vars(model.lm_head)


class Adapted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def head(kind=nn.Linear, **options):
    return kind(8, CLASSES, **options)


def hooked():
    layer = head()
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def replaced():
    layer = head()
    layer.forward = lambda input: F.linear(input, 2 * layer.weight)
    return layer


REFUSED = {
    "a layer with a forward of its own": (lambda: head(Adapted), NotImplementedError, "lm_head .*Adapted.*: expected"),
    "no linear layer": (lambda: nn.Sequential(head()), NotImplementedError, "lm_head .*Sequential.*: expected"),
    "a replaced forward": (replaced, NotImplementedError, "lm_head .*Linear.*: expected"),
    "forward hooks": (hooked, NotImplementedError, "expected no forward hooks"),
    "another number of classes": (lambda: nn.Linear(8, 7), ValueError, "global_vocab_size: expected .* 7 classes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_would_train_something_else_is_refused(name):
    make, error, message = REFUSED[name]
    loss_fn = OURS["hidden"].build()
    with pytest.raises(error, match=message):
        loss_fn.set_lm_head(make())
    loss_fn.lm_head = make()  # or changed afterwards
    with pytest.raises(error, match=message):
        loss_fn(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64))


def test_a_layer_with_a_part_of_its_weight_is_refused():
    loss_fn, layer = OURS["hidden"].build(), head()
    loss_fn.set_lm_head(layer)
    layer.weight = nn.Parameter(layer.weight[:1024].detach())
    with pytest.raises(NotImplementedError, match="expected the whole layer on each rank"):
        loss_fn(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64))


def test_misuse_is_named():
    hidden, labels = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    loss_fn = OURS["hidden"].build()
    with pytest.raises(ValueError, match="lm_head: expected set_lm_head"):
        loss_fn(hidden, labels)
    loss_fn.set_lm_head(head())
    with pytest.raises(TypeError, match="advantages: expected no other inputs"):
        loss_fn(hidden, labels, advantages=labels)
    with pytest.raises(ValueError, match="global_vocab_size: expected 2048 classes on this rank"):
        OURS["logits"].build()(torch.randn(2, 3, 7), labels)
    for each, input in ((loss_fn, hidden), (OURS["logits"].build(), torch.randn(2, 3, CLASSES))):
        with typecheck(), pytest.raises(NotImplementedError, match="spmd_typechecking"):
            assert spmd_types.is_type_checking()
            each(input, labels)


def share(rows, rank):
    tokens, labels, extra = rows
    return tokens.chunk(RANKS)[rank], labels.chunk(RANKS)[rank], {k: v.chunk(RANKS)[rank] for k, v in extra.items()}


@functools.cache
def dimensions(backend, tensor_parallel):
    """torchtitan compares meshes by identity."""
    degrees = {"tp": RANKS, "dp_shard": 1} if tensor_parallel else {"tp": 1, "dp_shard": RANKS}
    dims = ParallelDims(dp_replicate=1, cp=1, pp=1, ep=1, world_size=RANKS, spmd_backend=backend, **degrees)
    dims.build_mesh()
    return dims


def setting(backend, **options):
    titan_utils.set_spmd_backend(backend)
    parallelism = ParallelismConfig(spmd_backend=backend, **options)
    dims = dimensions(backend, parallelism.tensor_parallel_degree > 1)
    return parallelism, dims, titan_utils.get_spmd_context(parallel_dims=dims, spmd_typechecking=False)


def check_fsdp(rank, reshard, mixed):
    """The mean over the ranks of the losses, and the gradients, are those of the whole batch; also as torchtitan's."""
    parallelism, dims, context = setting(
        "spmd_types", data_parallel_shard_degree=RANKS, fsdp_reshard_after_forward=reshard
    )
    training = TrainingConfig(mixed_precision_param="bfloat16" if mixed else "float32")
    runs = {}
    for name, config in {**OURS, "theirs": THEIRS}.items():
        model = llama(parallelism, dims, training=training)
        forward = model.lm_head.forward  # parallelize() has installed it
        with context():
            loss, grads = train(config, model, share(batch(), rank))
        assert vars(model.lm_head)["forward"] is forward, name
        dist.all_reduce(loss)
        assert loss.dtype == torch.float32, name
        runs[name] = loss, grads
    whole = train(titan.CrossEntropyLoss.Config(), llama(), batch())
    for name in OURS:
        if mixed:
            torch.testing.assert_close(runs[name][0], runs["theirs"][0], rtol=1e-3, atol=0, msg=name)
            for key, grad in runs[name][1].items():
                assert (grad - whole[1][key]).norm() < 0.05 * whole[1][key].norm(), (name, key)
        else:
            torch.testing.assert_close(runs[name], runs["theirs"], rtol=2e-5, atol=1e-8)
            torch.testing.assert_close(runs[name], whole, rtol=2e-5, atol=1e-8)


def check_tensor_parallel(rank, backend):
    parallelism, dims, context = setting(backend, tensor_parallel_degree=RANKS, data_parallel_shard_degree=1)
    whole = train(titan.CrossEntropyLoss.Config(), llama(), batch())
    for name, config in OURS.items():
        model = llama(parallelism, dims)
        with context():
            if name == "hidden":
                with pytest.raises(NotImplementedError, match="lm_head under tensor parallelism"):
                    train(config, model, batch())
            else:
                torch.testing.assert_close(train(config, model, batch()), whole, rtol=5e-5, atol=1e-8)
    if backend == "spmd_types":  # a layer that is not split: its hidden states still have a gradient to be summed
        loss_fn = OURS["hidden"].build()
        loss_fn.set_lm_head(head())
        with context(), pytest.raises(NotImplementedError, match="lm_head under tensor parallelism"):
            loss_fn(torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64))


def check_uneven_classes(rank):
    """Classes in parts of different sizes, with labels as plain tensors and as DTensors, in float64."""
    titan_utils.set_spmd_backend("partial_dtensor")
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[1, 2] = -100
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    for target in (labels, distribute_tensor(labels, mesh, [Replicate()])):
        split = distribute_tensor(logits, mesh, [Shard(2)]).detach().requires_grad_()
        mine, theirs = ours.cross_entropy_loss(split, target), titan.cross_entropy_loss(split, target)
        assert type(mine) is type(theirs)
        mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
        mine.backward()
        torch.testing.assert_close(mine.detach(), expected.detach(), rtol=1e-10, atol=0)
        assert split.grad.placements == (Shard(2),)
        torch.testing.assert_close(split.grad.full_tensor(), plain.grad, rtol=1e-10, atol=1e-14)


def check_split_rows(rank):
    """A batch split over the ranks as DTensors: the loss is a partial sum, as torchtitan's."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    logits, labels = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(4)), torch.full((4, 5), 3)
    split, target = distribute_tensor(logits, mesh, [Shard(0)]), distribute_tensor(labels, mesh, [Shard(0)])
    mine, theirs = (function(split, target) for function in (ours.cross_entropy_loss, titan.cross_entropy_loss))
    assert mine.placements == theirs.placements
    torch.testing.assert_close(mine.full_tensor(), theirs.full_tensor(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="labels: expected placements"):
        ours.cross_entropy_loss(split, distribute_tensor(labels, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="pred: expected classes split over the mesh"):
        ours.cross_entropy_loss(split, labels)
    loss_fn = OURS["hidden"].build()
    loss_fn.set_lm_head(head())
    with pytest.raises(NotImplementedError, match="hidden states or labels as DTensors"):
        loss_fn(distribute_tensor(torch.randn(2, 3, 8), mesh, [Replicate()]), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: expected a plain tensor"):
        ours.cross_entropy_loss(logits, target)


CHECKS = {
    "fsdp": (check_fsdp, "default", False),
    "fsdp-resharded-bfloat16": (check_fsdp, "always", True),
    "tensor-parallel-spmd_types": (check_tensor_parallel, "spmd_types"),
    "tensor-parallel-partial_dtensor": (check_tensor_parallel, "partial_dtensor"),
    "uneven-classes": (check_uneven_classes,),
    "split-rows": (check_split_rows,),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return failures_of(CHECKS, RANKS, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(failures, name):
    assert name not in failures, "\n".join(failures[name])
