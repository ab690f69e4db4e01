"""Patched models of transformers: the numbers of the unpatched model, no logits, and what is refused."""

import copy
import gc
import pickle
import re
import weakref

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_models import CACHED, CLASSES, GPT2, MODELS, RESNET, SIZES, Shapes, batch, build, gradients, llama, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

import tlkernels as tlk
from tlkernels.integrations import hf

pytestmark = pytest.mark.usefixtures("one_thread")

LABELLED = SIZES | {"num_labels": 5}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
MODERN = {"cls_token_id": 1, "sep_token_id": 2}
MIXTRAL = CACHED | {"num_local_experts": 4, "num_experts_per_tok": 2}
CLASSIFIERS = {
    "BERT": ("BertForSequenceClassification", LABELLED),
    "BERT-regression": ("BertForSequenceClassification", LABELLED | {"num_labels": 1}),
    "BERT-several-values": ("BertForSequenceClassification", LABELLED | {"problem_type": "regression"}),
    "RoBERTa-several-labels": (
        "RobertaForSequenceClassification",
        LABELLED | {"problem_type": "multi_label_classification"},
    ),
    "ModernBERT": ("ModernBertForSequenceClassification", LABELLED | MODERN),
    "Llama": ("LlamaForSequenceClassification", CACHED | {"num_labels": 5}),
    "Gemma2": ("Gemma2ForSequenceClassification", CACHED | {"num_labels": 5}),
    "BERT-tokens": ("BertForTokenClassification", LABELLED),
    "Llama-tokens": ("LlamaForTokenClassification", CACHED | {"num_labels": 5}),
    "BERT-answers": ("BertForQuestionAnswering", SIZES),
    "Llama-answers": ("LlamaForQuestionAnswering", CACHED),
    "ViT": ("ViTForImageClassification", VIT),
    "ResNet": ("ResNetForImageClassification", RESNET),
}


def trained(model):
    """The model in training mode without dropout, so that two passes can be compared."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        for name in ("p", "dropout_prob", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def labelled(model):
    """Inputs and labels of a task, some labels ignored."""
    inputs, target = batch()
    task = type(model).__name__
    if task.endswith("ImageClassification"):
        return {"pixel_values": torch.randn(3, 3, 32, 32, dtype=model.dtype)}, {"labels": torch.tensor([4, 0, 2])}
    if task.endswith("QuestionAnswering"):
        return inputs, {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 9])}
    if task.endswith("TokenClassification"):
        return inputs, {"labels": torch.tensor([[0, 1, -100, 3, 4, 0, 1], [2, -100, 2, 3, 1, -100, -100]])}
    if task.endswith("SequenceClassification"):
        classes, kind = model.config.num_labels, model.config.problem_type
        if classes == 1:
            return inputs, {"labels": torch.randn(2, dtype=model.dtype)}
        if kind == "regression":
            return inputs, {"labels": torch.randn(2, classes, dtype=model.dtype)}
        several = kind == "multi_label_classification"
        labels = torch.rand(2, classes).round().to(model.dtype) if several else torch.tensor([4, 1])
        return inputs, {"labels": labels}
    target[0, 2] = target[1, 4] = -100
    return inputs, {"labels": target}


def expected_loss(model, inputs, labels):
    """The loss of the model's logits in plain PyTorch, in the model's dtype; transformers' own is in float32."""
    target = labels["labels"]
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        target = F.pad(target[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("name", MODELS)
def test_language_models_train_on_the_loss_of_their_logits_and_make_none(name):
    model = trained(build(*MODELS[name][:2]))
    inputs, labels = labelled(model)
    expected = expected_loss(model, inputs, labels)
    wanted = gradients(model, expected)
    own = model(**inputs, **labels)
    assert hf.patch(model) is model
    with Shapes() as shapes:
        output = model(**inputs, **labels)
        found = gradients(model, output.loss)
    assert not [shape for shape in shapes.seen if CLASSES in shape[:-1] + shape[-1:] and len(shape) == 3]
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.loss.float(), own.loss.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)
    assert list(output) == list(own)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_train_on_their_own_loss(name):
    """Within float32, in which transformers computes some of these losses, and in float64 where it does."""
    model = trained(build(*CLASSIFIERS[name]))
    inputs, labels = labelled(model)
    own = model(**inputs, **labels)
    wanted, kind = gradients(model, own.loss), model.config.problem_type
    model.config.problem_type = CLASSIFIERS[name][1].get("problem_type")
    hf.patch(model)
    assert model.config.problem_type == CLASSIFIERS[name][1].get("problem_type")
    output = model(**inputs, **labels)
    exact = own.loss.dtype == torch.float64
    torch.testing.assert_close(output.loss.to(own.loss.dtype), own.loss, rtol=1e-9 if exact else 1e-6, atol=0)
    torch.testing.assert_close(
        gradients(model, output.loss), wanted, rtol=1e-7 if exact else 1e-5, atol=1e-12 if exact else 1e-7
    )
    assert list(output) == list(own) and model.config.problem_type == kind


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_every_implementation_and_the_losses_options(name, any_impl):
    model = trained(build(*MODELS[name][:2], dtype=torch.float32))
    inputs, labels = labelled(model)
    logits = model(**inputs).logits
    target = labels["labels"] if name == "BERT" else F.pad(labels["labels"][:, 1:], (0, 1), value=-100)
    rows, target = logits.flatten(0, 1), target.flatten()
    kept = target != -100
    expected = F.cross_entropy(rows, target, label_smoothing=0.1, reduction="sum") / 5
    expected = expected + 0.01 * rows[kept].logsumexp(1).square().sum() / 5
    hf.patch(model, label_smoothing=0.1, z_loss=0.01, impl=any_impl)
    found = model(**inputs, **labels, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["BERT", "ResNet", "BERT-tokens", "BERT-several-values", "RoBERTa-several-labels"])
def test_num_items_in_batch_divides_the_sum_in_every_task(name):
    model = trained(build(*CLASSIFIERS[name]))
    inputs, labels = labelled(model)
    count = int((labels["labels"] != -100).sum())
    expected = model(**inputs, **labels).loss * count / 10
    found = hf.patch(model)(**inputs, **labels, num_items_in_batch=10).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_num_items_in_batch_divides_the_sum_of_answers():
    model = trained(build(*CLASSIFIERS["BERT-answers"]))
    inputs, labels = labelled(model)
    output = model(**inputs)
    starts = F.cross_entropy(output.start_logits, labels["start_positions"], reduction="sum")
    ends = F.cross_entropy(output.end_logits[:1], labels["end_positions"][:1], reduction="sum")  # the other is outside
    found = hf.patch(model)(**inputs, **labels, num_items_in_batch=10).loss
    torch.testing.assert_close(found, (starts + ends) / 20, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_the_loss_of_a_16_bit_model_is_float32(name, dtype):
    model = trained(build(*MODELS[name][:2], dtype=dtype))
    inputs, labels = labelled(model)
    expected = F.cross_entropy(
        model(**inputs).logits.flatten(0, 1).float(),
        (F.pad(labels["labels"][:, 1:], (0, 1), value=-100) if name == "Llama" else labels["labels"]).flatten(),
    )
    hf.patch(model)
    loss = model(**inputs, **labels).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert all(gradient.dtype == dtype for gradient in gradients(model, loss).values())
    assert model.eval()(**inputs, **labels).loss.dtype == torch.float32


def test_evaluation_and_passes_without_labels_make_logits():
    model = trained(llama())
    inputs, labels = labelled(model)
    logits = model(**inputs).logits
    hf.patch(model)
    assert torch.equal(model(**inputs).logits, logits)
    model.eval()
    output = model(**inputs, **labels, num_items_in_batch=4)
    assert torch.equal(output.logits, logits)
    target = F.pad(labels["labels"][:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / 4
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model.generate(inputs["input_ids"][:1], max_new_tokens=3)[:, :7], inputs["input_ids"][:1])


@pytest.mark.parametrize("name", ["Gemma2", "Granite", "BERT"])
def test_lazy_logits_are_the_models_with_their_gradient(name):
    model = trained(build(*MODELS[name][:2]))
    inputs, labels = labelled(model)
    logits = model(**inputs).logits
    wanted = gradients(model, logits.square().mean())
    lazy = hf.patch(model)(**inputs, **labels).logits
    assert isinstance(lazy, hf.LazyLogits)
    assert (lazy.shape, lazy.size(-1), lazy.dtype, lazy.ndim, lazy.dim()) == (logits.shape, CLASSES, logits.dtype, 3, 3)
    assert lazy._made is None and lazy.float().dtype == torch.float32 and lazy._made is None
    torch.testing.assert_close(lazy[:, :-1], logits[:, :-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.softmax(lazy, -1), logits.softmax(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((2 * lazy - 1).argmax(-1), (2 * logits - 1).argmax(-1))
    torch.testing.assert_close(lazy.float().tensor(), logits.float())
    lazy = model(**inputs, **labels).logits
    with torch.no_grad():
        assert not lazy.mean().requires_grad
    torch.testing.assert_close(gradients(model, lazy.square().mean()), wanted, rtol=1e-7, atol=1e-12)


def test_lazy_logits_are_not_those_of_changed_weights():
    model = hf.patch(trained(llama()))
    inputs, labels = labelled(model)
    output = model(**inputs, **labels)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="logits: the head has changed since the forward pass"):
        output.logits.mean()


def test_logits_can_be_left_out():
    model = hf.patch(trained(llama()), logits=None)
    inputs, labels = labelled(model)
    output = model(**inputs, **labels, use_cache=False)
    assert output.logits is None and list(output) == ["loss"]
    assert model(**inputs, **labels, use_cache=False, return_dict=False) == output.to_tuple()
    model = hf.patch(trained(build(*MODELS["BERT"][:2])), logits=None)
    output = model(**inputs, **labels)
    model.config.return_dict = False
    assert model(**inputs, **labels) == output.to_tuple()
    assert model(**inputs, **labels, return_dict=True).loss == output.loss


def test_arguments_by_position_shifted_labels_and_another_ignored_class():
    model = trained(llama())
    inputs, labels = labelled(model)
    target = F.pad(labels["labels"][:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels["labels"], shift_labels=target).loss
    hf.patch(model)
    found = model(inputs["input_ids"], inputs["attention_mask"], labels=labels["labels"], shift_labels=target).loss
    torch.testing.assert_close(found.float(), expected)
    other = torch.where(labels["labels"] == -100, 7, labels["labels"])
    unpatched = hf.unpatch(copy.deepcopy(model))
    torch.testing.assert_close(
        model(**inputs, labels=other, ignore_index=7).loss.float(),
        unpatched(**inputs, labels=other, ignore_index=7).loss,
    )


def test_a_mixture_of_experts_adds_its_routers_loss():
    model = trained(build("MixtralForCausalLM", MIXTRAL | {"output_router_logits": True}, torch.float32))
    inputs, labels = labelled(model)
    expected = model(**inputs, **labels)
    assert expected.aux_loss > 0.1
    found = hf.patch(model)(**inputs, **labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    model = hf.patch(trained(build("MixtralForCausalLM", MIXTRAL, torch.float32)))
    model(**inputs, **labels)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM returned aux_loss; .* config.output_router_logits=True"):
        model(**inputs, **labels, output_router_logits=True)


def test_unpatch_gives_the_model_back():
    model = llama()
    cls, names = type(model), set(vars(model))
    hf.patch(model)
    assert type(model) is not cls and isinstance(model, cls) and type(model).__name__ == cls.__name__
    captured = model.forward  # as accelerate and TRL do
    hf.patch(model, logits=None)
    assert type(model).__bases__ == (cls,)
    assert hf.unpatch(hf.unpatch(model)) is model
    assert type(model) is cls and set(vars(model)) == names
    inputs, labels = labelled(trained(model))
    assert torch.equal(captured(**inputs, **labels).loss, model(**inputs, **labels).loss)
    assert captured(**inputs, **labels).loss.dtype == torch.float32  # transformers' own


def test_a_head_that_was_replaced_is_served_and_the_old_one_is_let_go():
    model = hf.patch(trained(llama()))
    old = weakref.ref(model.lm_head.weight)
    model.resize_token_embeddings(CLASSES + 3, mean_resizing=False)
    inputs, labels = labelled(model)
    expected = expected_loss(model, inputs, labels)
    torch.testing.assert_close(model(**inputs, **labels).loss, expected, rtol=1e-9, atol=0)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("way", ["copied", "pickled", "saved"])
def test_a_patched_model_is_copied_pickled_and_saved(way, tmp_path):
    model = hf.patch(trained(llama()))
    inputs, labels = labelled(model)
    expected = model(**inputs, **labels).loss
    if way == "copied":
        other = copy.deepcopy(model)
    elif way == "pickled":
        other = pickle.loads(pickle.dumps(model))
    else:
        model.save_pretrained(tmp_path)
        other = trained(hf.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # not shared
    assert torch.equal(other(**inputs, **labels).loss, expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compile():
    model = trained(llama(dtype=torch.float32))
    inputs, labels = labelled(model)
    expected = hf.patch(model)(**inputs, **labels).loss
    wanted = gradients(model, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**inputs, **labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(model, output.loss), wanted)


def test_autocast_and_checkpointing():
    model = trained(llama(dtype=torch.float32))
    inputs, labels = labelled(model)
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs, **labels).loss
        wanted = gradients(model, expected)
        output = hf.patch(model)(**inputs, **labels)
    torch.testing.assert_close(output.loss, expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients(model, output.loss), wanted, rtol=5e-2, atol=2e-3)
    assert output.logits.tensor().dtype == torch.bfloat16


@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["Llama-tied", "BERT"])
def test_in_data_parallelism(name, wrapped, one_process):
    model = trained(build(*MODELS[name][:2]))
    inputs, labels = labelled(model)
    wanted = gradients(model, expected_loss(model, inputs, labels))
    model.zero_grad()
    parallel = hf.patch(model)
    if wrapped == "DDP":
        parallel = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in model.model.layers if name.startswith("Llama") else model.bert.encoder.layer:
            fully_shard(layer, mesh=one_process)
        fully_shard(model, mesh=one_process)
        with pytest.raises(ValueError, match=r"FSDP.* was patched and then sharded; unpatch it before that"):
            hf.unpatch(model)
    loss = parallel(**inputs, **labels).loss
    found = {key: whole(gradient) for key, gradient in gradients(model, loss).items()}
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_a_head_that_is_sharded_by_itself_is_refused(one_process):
    model = hf.patch(trained(llama()))
    fully_shard(model.lm_head, mesh=one_process)
    fully_shard(model, mesh=one_process)
    inputs, labels = labelled(model)
    with pytest.raises(hf.UnreadableHead, match=r"head is .*FSDPLinear; expected torch.nn.Linear"):
        model(**inputs, **labels)


def lora(modules, **options):
    config = peft.LoraConfig(target_modules=modules, r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return lambda model: peft.get_peft_model(model, config)


def test_lora_beside_the_head_trains_as_unpatched():
    model = trained(llama())
    inputs, labels = labelled(model)
    torch.manual_seed(1)
    plain = trained(lora(["q_proj", "v_proj"])(copy.deepcopy(model)))
    torch.manual_seed(1)
    adapted = trained(lora(["q_proj", "v_proj"])(hf.patch(model)))
    wanted = gradients(plain, expected_loss(plain.base_model.model, inputs, labels))
    found = gradients(adapted, adapted(**inputs, **labels).loss)
    assert wanted and found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("wrap", [lora(["lm_head"]), lora(["q_proj"], modules_to_save=["lm_head"])])
def test_lora_on_the_head_is_refused_before_and_after(wrap):
    adapted = wrap(llama())
    with pytest.raises(TypeError, match=r"model: expected a transformers.PreTrainedModel, got PeftModel.*inside it"):
        hf.patch(adapted)
    remedy = r"LlamaForCausalLM's head is peft.*; expected torch.nn.Linear, not .* Keep adapters, .*compute_loss_func"
    with pytest.raises(hf.UnreadableHead, match=remedy):
        hf.patch(adapted.base_model.model)
    later = wrap(hf.patch(llama())).train()
    inputs, labels = labelled(llama())
    with pytest.raises(hf.UnreadableHead, match=remedy):
        later(**inputs, **labels)
    # the loss of the logits serves it
    loss = hf.compute_loss_func(adapted.base_model.model)
    trained(adapted)
    expected = expected_loss(adapted.base_model.model, inputs, labels)
    torch.testing.assert_close(loss(adapted(**inputs), labels["labels"]), expected)


class Smoothed(transformers.LlamaForCausalLM):
    """Its own loss is another one."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            rows, target = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = F.cross_entropy(rows, target, label_smoothing=0.1)
        return output


class Weighted(transformers.BertForSequenceClassification):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            weight = torch.arange(1.0, 6, dtype=self.dtype)
            output["loss"] = F.cross_entropy(output.logits, labels, weight, reduction="sum")
        return output


def replaced_forward():
    model = llama()
    vars(model)["forward"] = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llama(Smoothed), "Smoothed's loss on made-up inputs is .*; expected that of ForCausalLM"),
        (lambda: build(Weighted, LABELLED), "Weighted's loss on made-up .* that of ForSequenceClassification"),
        (lambda: build("BertModel", SIZES), "BertModel is no model of a task that is known here"),
        (lambda: build("BertForPreTraining", SIZES), "BertForPreTraining returned no loss for labels"),
        (lambda: build("T5ForConditionalGeneration", {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": CLASSES,
        }), "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: build("LlamaForSequenceClassification", CACHED | {"pad_token_id": None, "num_labels": 5}),
         "LlamaForSequenceClassification does not run on input_ids and labels: ValueError: Cannot handle batch sizes"),
        (lambda: build("BartForCausalLM", {
            "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 97,
        }), "BartForCausalLM does not shift its labels, but Trainer counts them as if it did"),
        (replaced_forward, "LlamaForCausalLM.forward has been replaced on this object, as accelerate and TRL do"),
    ],
)  # fmt: skip
def test_a_model_whose_loss_is_not_known_is_refused(make, message):
    model = make()
    cls = type(model)
    with pytest.raises(hf.UnknownLoss, match=message):
        hf.patch(model)
    assert type(model) is cls


def test_other_refusals():
    with pytest.raises(TypeError, match=re.escape("model: expected a transformers.PreTrainedModel, got str")):
        hf.patch("llama")
    with pytest.raises(ValueError, match="logits: expected 'lazy' or None, got 'none'"):
        hf.patch(llama(), logits="none")
    with pytest.raises(ValueError, match="label_smoothing"):
        hf.patch(llama(), label_smoothing=2.0)
    with pytest.raises(ValueError, match=r"impl: expected one of .*, got 'cuda'"):
        hf.patch(llama(), impl="cuda")
    with pytest.raises(ValueError, match="Trainer passes no labels of BertForQuestionAnswering to compute_loss_func"):
        hf.compute_loss_func(build("BertForQuestionAnswering", SIZES))
    with pytest.raises(ValueError, match="labels: expected a tensor, got None"):
        hf.compute_loss_func(llama())({}, None)


def test_fused_calls_of_trl_pass_through():
    """TRL asks the model that it has changed for its own output; see `trl.trainer.utils.add_fused_lm_head`."""
    seen = []

    class Fused(transformers.LlamaForCausalLM):
        def forward(self, *args, fused_lm_head=False, **kwargs):
            seen.append((fused_lm_head, "labels" in kwargs))
            return super().forward(*args, **kwargs)

    model = hf.patch(trained(llama(Fused)))
    inputs, labels = labelled(model)
    seen.clear()
    model(**inputs, **labels, fused_lm_head=True)
    model(**inputs, **labels)
    assert seen == [(True, True), (False, False)]


def test_the_loss_is_ours(monkeypatch):
    calls = []
    for name in ("cross_entropy", "linear_cross_entropy", "mse"):
        function = getattr(tlk, name)
        monkeypatch.setattr(tlk, name, lambda *a, f=function, n=name, **k: (calls.append(n), f(*a, **k))[1])
    for made, expected in (
        (llama(), "linear_cross_entropy"),
        (build("GPT2LMHeadModel", GPT2), "linear_cross_entropy"),
        (build("ViTForImageClassification", VIT), "cross_entropy"),
        (build(*CLASSIFIERS["BERT-regression"]), "mse"),
    ):
        model = hf.patch(made).train()
        calls.clear()
        inputs, labels = labelled(model)
        model(**inputs, **labels)
        assert set(calls) == {expected}
