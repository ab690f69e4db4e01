"""Reading the vocabulary head of a transformers model, and training on its hidden states."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_models import CACHED, CLASSES, GPT2, MODELS, SIZES, Shapes, batch, build, gradients, llama, whole
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

import tlkernels as tlk
from tlkernels.integrations.head import UnreadableHead, VocabularyHead, hidden_states, read_head

pytestmark = pytest.mark.usefixtures("one_thread")

UNTIED = {"Llama", "Qwen3", "Granite", "HyperCLOVAX"}


def loss_of(model, head, inputs, target):
    hidden = hidden_states(model, head, **inputs).flatten(0, 1)
    how = {"linear_bias": head.linear.bias, "temperature": head.temperature, "softcap": head.softcap}
    return tlk.linear_cross_entropy(hidden, head.linear.weight, target.flatten(), **how)


def plain_loss(model, inputs, target):
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_models_logits(name):
    cls, options, temperature, softcap = MODELS[name]
    model = build(cls, options)
    head = read_head(model)
    assert head.linear is model.get_output_embeddings()
    assert (head.temperature, head.softcap) == (pytest.approx(temperature), softcap)
    assert head.tied == (name not in UNTIED)
    inputs, target = batch()
    expected = plain_loss(model, inputs, target)
    expected_gradients = gradients(model, expected)
    with Shapes() as shapes:
        hidden_states(model, head, **inputs)
    assert (2, 7, head.linear.in_features) in shapes.seen
    assert not [shape for shape in shapes.seen if CLASSES in shape]
    loss = loss_of(model, head, inputs, target)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients(model, loss), expected_gradients, rtol=1e-7, atol=1e-12)


class Scaled(transformers.LlamaForCausalLM):
    """Its logits are `change(logits)`."""

    def change(self, logits):
        return self.config.output_multiplier * logits

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


class ScaledThenCapped(Scaled):
    def change(self, logits):
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(self.config.output_multiplier * logits / cap)


def test_a_scale_before_a_softcap():
    model = llama(ScaledThenCapped, output_multiplier=0.4, final_logit_softcapping=2.0)
    head = read_head(model)
    assert (head.temperature, head.softcap) == (pytest.approx(2.5), pytest.approx(5.0))
    inputs, target = batch()
    torch.testing.assert_close(loss_of(model, head, inputs, target), plain_loss(model, inputs, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["Gemma2", "Granite", "BERT"])
def test_the_head_is_read_in_the_models_dtype(name, dtype):
    cls, options, temperature, softcap = MODELS[name]
    head = read_head(build(cls, options, dtype))
    assert (head.temperature, head.softcap) == (pytest.approx(temperature), softcap)


def test_tiny_logits_do_not_hide_a_scale_or_a_softcap():
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**CACHED, initializer_range=1e-8))
    assert read_head(model).softcap == 30.0


def test_reading_changes_nothing():
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    read_head(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model.lm_head)


def test_the_layer_works_again_after_an_exception():
    model = llama()
    head = read_head(model)
    inputs, _ = batch()
    expected = model(**inputs).logits
    vars(model.lm_head)["forward"] = own = model.lm_head.forward  # as accelerate does
    for _ in range(2):
        with pytest.raises(IndexError):
            hidden_states(model, head, input_ids=inputs["input_ids"] + CLASSES)
        assert torch.equal(model(**inputs).logits, expected)
    assert vars(model.lm_head)["forward"] is own


def test_options_of_the_model_reach_it():
    """`logits_to_keep` keeps the last positions; a cache is built only if it is asked for."""
    model, caches = llama(), []
    head = read_head(model)
    inputs, _ = batch()
    whole = hidden_states(model, head, **inputs)
    assert torch.equal(hidden_states(model, head, **inputs, logits_to_keep=3), whole[:, -3:])
    model.model.register_forward_hook(lambda *call: caches.append(call[-1].past_key_values))
    hidden_states(model, head, **inputs)
    hidden_states(model, head, **inputs, use_cache=True)
    assert caches[0] is None and caches[1] is not None
    with pytest.raises(ValueError, match=r"labels: expected none, .* linear_cross_entropy"):
        hidden_states(model, head, **inputs, labels=inputs["input_ids"])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing():
    model = llama()
    inputs, target = batch()
    expected = gradients(model, plain_loss(model, inputs, target))
    model.gradient_checkpointing_enable()
    model.train()
    head = read_head(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model, loss_of(model, head, inputs, target)), expected)
    assert len(calls) == 2


def test_autocast():
    model = llama(dtype=torch.float32)
    inputs, target = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, read_head(model), inputs, target)
        expected = plain_loss(model, inputs, target)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=5e-2, atol=2e-3)


class Training(nn.Module):
    """A model and its loss, as one module to wrap."""

    def __init__(self, model, head):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, inputs, target):
        return loss_of(self.model, self.head, inputs, target)


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2", "FSDP2 around the model too"])
@pytest.mark.parametrize("name", ["Llama-tied", "BERT"])
def test_inside_a_wrapped_module(name, wrapped, one_process):
    from torch.distributed.fsdp import fully_shard

    model = build(*MODELS[name][:2])
    inputs, target = batch()
    expected = gradients(model, plain_loss(model, inputs, target))
    training = Training(model, read_head(model))
    if wrapped == "DDP":
        training = nn.parallel.DistributedDataParallel(training, find_unused_parameters=False)
    else:
        layers = model.model.layers if name.startswith("Llama") else model.bert.encoder.layer
        for layer in layers:
            fully_shard(layer, mesh=one_process)
        if wrapped != "FSDP2":
            fully_shard(model, mesh=one_process)
        fully_shard(training, mesh=one_process)
    if wrapped == "FSDP2 around the model too":
        with pytest.raises(UnreadableHead, match=r"head.weight is .*DTensor .*; expected a plain tensor, not sharded"):
            training(inputs, target)
        return
    for _ in range(2):
        training.zero_grad()  # before the forward pass, in which FSDP2 puts other parameters in place
        found = gradients(model, training(inputs, target))
        found = {key: whole(gradient) for key, gradient in found.items()}
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


class Doubled(Scaled):
    def change(self, logits):
        return 2 * logits


class SlightlyScaled(Scaled):
    def change(self, logits):
        return 1.01 * logits


class WidelyCapped(Scaled):
    def change(self, logits):
        return 20000 * torch.tanh(logits / 20000)


class Masked(Scaled):
    def change(self, logits):
        return logits.index_fill(-1, torch.tensor([11]), -torch.inf)


class Shifted(Scaled):
    def change(self, logits):
        return logits.roll(1, dims=1)


class Cut(Scaled):
    def change(self, logits):
        return logits[..., :90]


class Detached(Scaled):
    def change(self, logits):
        return logits.detach()


class Biased(Scaled):
    """As Luke: a bias of its own, which is zero before it is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.late = nn.Parameter(torch.zeros(config.vocab_size))

    def change(self, logits):
        return logits + 0 * self.late


class Added(Scaled):
    def change(self, logits):
        return logits + 0.1


class CalledTwice(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class NotCalled(transformers.LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Doubled, "Doubled's forward does something else to the logits: 0 combinations of .*output_multiplier=3.0"),
        (SlightlyScaled, "SlightlyScaled's forward does something else to the logits"),
        (WidelyCapped, "WidelyCapped's forward does something else to the logits"),
        (Added, "Added's forward does something else to the logits"),
        (Masked, "Masked's forward does something else to the logits"),
        (Shifted, "Shifted's forward does something else to the logits"),
        (Cut, r"Cut's logits are of shape \(2, 8, 90\); expected its head's, \(2, 8, 97\)"),
        (Detached, "Detached's logits have no gradient"),
        (Biased, "Biased's logits also depend on late; expected"),
        (
            CalledTwice,
            r"CalledTwice called its head on tensors of shapes \[\(2, 8, 32\), \(2, 8, 32\)\]; expected one call",
        ),
        (NotCalled, r"NotCalled called its head on tensors of shapes \[\]; expected one call: \[\(2, 8, 32\)\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_treats_the_logits_otherwise_is_refused(cls, message, dtype):
    with pytest.raises(UnreadableHead, match=message):
        read_head(llama(cls, dtype, output_multiplier=3.0))


class Adapted(nn.Linear):
    pass


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(CLASSES, 32, dtype=torch.int8))


def with_head(layer):
    model = llama(dtype=torch.float32)
    model.lm_head = layer
    return model


def changed_forward():
    model = llama()
    vars(model.lm_head)["forward"] = lambda hidden: 2 * F.linear(hidden, model.lm_head.weight)
    return model


def empty_weight():
    """As ZeRO-3 leaves it."""
    model = llama()
    model.lm_head.weight.data = torch.empty(0, dtype=torch.float64)
    return model


def double_headed():
    return build("GPT2DoubleHeadsModel", GPT2 | {"num_labels": 1})


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": CLASSES}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_head(Adapted(32, CLASSES)), "LlamaForCausalLM's head is .*Adapted; expected torch.nn.Linear"),
        (lambda: with_head(Quantised()), "LlamaForCausalLM's head is .*Quantised; expected torch.nn.Linear"),
        (
            lambda: with_head(nn.Linear(32, CLASSES, device="meta")),
            r"head.weight is .*Parameter \(97, 32\) of torch.float32 on meta",
        ),
        (
            lambda: with_head(nn.Linear(32, CLASSES).to(torch.float8_e4m3fn)),
            r"head.weight is .*Parameter \(97, 32\) of torch.float8_e4m3fn on cpu",
        ),
        (empty_weight, r"head.weight is .*Parameter \(0,\) of .*; expected a whole floating tensor \(97, 32\)"),
        (changed_forward, r"LlamaForCausalLM's head does not return F.linear\(hidden, weight, bias\)"),
        (lambda: build("T5ForConditionalGeneration", T5), "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: build("BertModel", SIZES), r"BertModel.get_output_embeddings\(\) is None"),
        (
            lambda: build("BertForPreTraining", SIZES),
            "BertForPreTraining returned .*BertForPreTrainingOutput without logits",
        ),
        (double_headed, "GPT2DoubleHeadsModel has several heads: its output has mc_logits"),
        (lambda: build("EsmForMaskedLM", SIZES), "EsmForMaskedLM's logits also depend on lm_head.bias"),
        (lambda: nn.Linear(3, 3), "model: expected a transformers.PreTrainedModel, got Linear"),
    ],
)
def test_a_head_that_is_not_one_plain_linear_layer_is_refused(make, message):
    with pytest.raises(UnreadableHead, match=message):
        read_head(make())


def test_a_sharded_weight_is_refused(one_process):
    model = llama()
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), one_process, [Replicate()]))
    with pytest.raises(
        UnreadableHead, match=re.escape("LlamaForCausalLM's head.weight is torch.distributed.tensor.DTensor (97, 32)")
    ):
        read_head(model)


def test_a_head_that_was_replaced_after_reading_is_refused():
    model = llama()
    head = read_head(model)
    model.resize_token_embeddings(CLASSES + 3, mean_resizing=False)
    assert isinstance(head, VocabularyHead)
    with pytest.raises(UnreadableHead, match="not the layer that was read; call read_head again"):
        hidden_states(model, head, input_ids=torch.tensor([[5, 6]]))
