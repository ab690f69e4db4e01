"""The students of `tlkernels distill`: blocks of the teacher, configurations, hints and vocabularies."""

import copy
import itertools
import json
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_cases import quick, same_bits

from tlkernels.train.blocks import (
    BlockOutputs,
    block_list,
    chosen_blocks,
    from_config,
    same_vocabulary,
    with_blocks,
)
from tlkernels.train.errors import RunError, UserError

pytestmark = pytest.mark.usefixtures(quick.__name__)

LAYERS, VOCABULARY = 6, 97
WIDE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = WIDE | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
DECODER = SIZES | {"num_key_value_heads": 2}
CACHED = DECODER | {"head_dim": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
IMAGES = WIDE | {"image_size": 16, "patch_size": 4}

# The options of a configuration.
MODELS = {
    "LlamaForCausalLM": CACHED,
    "MistralForCausalLM": CACHED | {"sliding_window": 4},
    "Qwen2ForCausalLM": DECODER | WINDOW,
    "Qwen3ForCausalLM": CACHED | WINDOW,
    "Gemma2ForCausalLM": CACHED | {"sliding_window": 4},
    "Gemma3ForCausalLM": CACHED | {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 3},
    "GraniteForCausalLM": DECODER,
    "CohereForCausalLM": DECODER,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": SIZES | OPT,
    "Phi3ForCausalLM": DECODER,
    "SmolLM3ForCausalLM": DECODER | {"no_rope_layer_interval": 3},
    "FuyuForCausalLM": SIZES | {"text_config": SIZES | {"model_type": "persimmon"}},
    "BertForMaskedLM": SIZES,
    "BertModel": SIZES,
    "RobertaForMaskedLM": SIZES,
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY},
    "ElectraForMaskedLM": SIZES | {"embedding_size": 16},
    "MPNetForMaskedLM": SIZES,
    "ModernBertForMaskedLM": SIZES | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    "DebertaV2ForMaskedLM": SIZES | RELATIVE,
    "ViTModel": IMAGES,
    "Dinov2Model": IMAGES,
}
QUICK = {"LlamaForCausalLM", "Gemma2ForCausalLM", "BertForMaskedLM", "ModernBertForMaskedLM", "ViTModel"}
TUPLES = {"MPNetForMaskedLM", "DebertaV2ForMaskedLM"}  # their blocks return tuples
# Their forward reads the kind of attention from the configuration, by the number of a block.
READ_BY_NUMBER = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"}


def build(name, options):
    """A model with random weights in evaluation mode, none of them 0 or 1."""
    cls = getattr(transformers, name)
    torch.manual_seed(3)
    model = cls(cls.config_class(**{"bos_token_id": 1, "eos_token_id": 2} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def llama(**options):
    return build("LlamaForCausalLM", CACHED | options)


def batch(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 16, 16)}
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 20)), "attention_mask": mask}


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


class Nothing(nn.Module):
    """A block that returns its input."""

    attention_type = "full_attention"  # ModernBERT reads it

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden, *_, **__):
        return (hidden, None) if self.as_tuple else hidden


def kept(model, blocks, name):
    """A copy of `model` in which each other block is replaced by one that does nothing, so that numbers stay."""
    model = copy.deepcopy(model)
    model.config.use_cache = False
    layers = block_list(model)[1]
    for number in set(range(LAYERS)) - set(blocks):
        layers[number] = Nothing(name in TUPLES)
    return model


def deleted(model, blocks):
    """A copy of `model` whose list has only the blocks; their numbers change."""
    model = copy.deepcopy(model)
    model.config.use_cache = False
    layers = block_list(model)[1]
    chosen = [layers[number] for number in blocks]
    del layers[:]
    layers.extend(chosen)
    return model


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.full] * (m not in QUICK)) for m in MODELS])
def test_a_student_computes_what_its_blocks_compute_in_the_teacher(name, tmp_path):
    teacher, blocks = build(name, MODELS[name]), [0, 2, 5]
    inputs, before = batch(teacher), copy.deepcopy(teacher.state_dict())
    student = with_blocks(teacher, blocks)
    assert type(student) is type(teacher) and len(block_list(student)[1]) == 3
    assert student.config.get_text_config().num_hidden_layers == 3
    found = output(student, inputs)
    torch.testing.assert_close(found, output(kept(teacher, blocks, name), inputs))
    if name in READ_BY_NUMBER:
        assert not torch.allclose(found, output(deleted(teacher, blocks), inputs), rtol=1e-2)
    else:
        torch.testing.assert_close(found, output(deleted(teacher, blocks), inputs))
    assert not torch.allclose(found, output(teacher, inputs), rtol=1e-2)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), found)
    assert same_bits(again.state_dict(), student.state_dict())
    if (head := teacher.get_output_embeddings()) is not None:
        tied = head.weight is teacher.get_input_embeddings().weight
        assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert same_bits(teacher.state_dict(), before)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "SmolLM3ForCausalLM"])
def test_a_student_generates_the_same_tokens_with_a_cache(name):
    teacher, blocks = build(name, MODELS[name]), [1, 3, 4]
    student, tokens = with_blocks(teacher, blocks), torch.randint(3, VOCABULARY, (1, 5))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = student.generate(input_ids=tokens, use_cache=True, **options)
    expected, reference = tokens, kept(teacher, blocks, name)
    for _ in range(12):
        logits = output(reference, {"input_ids": expected})[:, -1]
        logits[:, 2] = -torch.inf  # the end, which min_new_tokens forbids
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == expected.tolist()


def test_each_block_keeps_the_kind_of_attention_that_its_number_had():
    teacher = build("Gemma3ForCausalLM", MODELS["Gemma3ForCausalLM"] | {"sliding_window": 4096})
    student = with_blocks(teacher, [1, 2, 5])
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert student.config.layer_types == kinds
    assert [block.self_attn.is_sliding for block in student.model.layers] == [True, False, True]
    assert [block.self_attn.layer_idx for block in student.model.layers] == [0, 1, 2]


def test_lists_of_the_configuration_that_are_not_of_layers_are_kept():
    ends = list(range(3, 3 + LAYERS))
    student = with_blocks(llama(eos_token_id=ends), [0, 3])
    assert student.config.eos_token_id == ends and student.generation_config.eos_token_id == ends


def test_making_a_student_changes_neither_the_teachers_mode_nor_the_random_numbers():
    teacher = llama(attention_dropout=0.5).train()
    teacher.requires_grad_(False)
    before = torch.get_rng_state()
    student = with_blocks(teacher, [0, 5])
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.training and student.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_student_has_the_teachers_generation_options_and_attention_code():
    teacher = llama(attn_implementation="eager")
    teacher.generation_config.top_k = 7
    student = with_blocks(teacher, [0, 5])
    assert student.generation_config.top_k == 7 and student.generation_config is not teacher.generation_config
    assert teacher.config._attn_implementation == student.config._attn_implementation == "eager"


class Numbered(transformers.LlamaForCausalLM):
    """A Llama whose logits depend on its number of layers."""

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = result.logits * self.config.num_hidden_layers
        return result


def test_a_student_that_would_not_compute_the_same_is_refused():
    with pytest.raises(UserError, match=r"--student.layers: Numbered cannot be cut .* 0, 2: its output differs by"):
        with_blocks(Numbered(transformers.LlamaConfig(**CACHED)), [0, 2])


ALBERT = ("AlbertForMaskedLM", SIZES | {"embedding_size": 16})
RESNET = ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]})
CONVNEXT = ("ConvNextModel", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32})
T5 = ("T5ForConditionalGeneration", {"d_model": 32, "num_layers": 6, "num_heads": 4, "d_ff": 48, "d_kv": 8})
REFUSED = {
    "shared blocks": (*ALBERT, [0, 2], "AlbertForMaskedLM has 0 lists of 6 blocks; expected one"),
    "stages": (*CONVNEXT, [0, 2], "ConvNextModel has no list of equal blocks"),
    "no blocks": (*RESNET, [0, 2], "ResNetModel has no list of equal blocks"),
    "two lists": (*T5, [0, 2], "T5ForConditionalGeneration has 2 lists of 6 blocks; expected one"),
    "a first block without a norm": (
        "ModernBertForMaskedLM", MODELS["ModernBertForMaskedLM"], [1, 2], "cut to the blocks 1, 2: .*attn_norm",
    ),
    "a scale by the number": (
        "GPT2LMHeadModel", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, [0, 2], "attn.scaling of block 2 would be",
    ),
    "experts by the number": (
        "Qwen2MoeForCausalLM",
        DECODER | {"num_experts": 4, "moe_intermediate_size": 8, "decoder_sparse_step": 2}, [1, 2], "cannot be cut",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_cut_are_refused_in_one_line(case):
    name, options, blocks, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        with_blocks(build(name, options), blocks)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_lists_inside_the_blocks_are_not_lists_of_blocks():
    model = build("T5EncoderModel", T5[1] | {"num_layers": 2})  # each block is a list of two modules
    name, blocks = block_list(model)
    assert name == "encoder.block" and blocks is model.encoder.block


def test_a_model_of_texts_and_images_is_refused():
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    options = {"text_config": CACHED, "vision_config": vision | {"image_size": 16, "patch_size": 4}}
    teacher = build("Gemma3ForConditionalGeneration", options | {"mm_tokens_per_image": 4})
    with pytest.raises(UserError, match=r"not a model of texts alone: its configuration has vision_config"):
        with_blocks(teacher, [0, 2])


def test_blocks_are_spread_evenly_from_the_first_to_the_last():
    assert chosen_blocks(6, 12) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert chosen_blocks(3, 12) == [0, 6, 11]
    assert chosen_blocks(1, 12) == [0]
    assert chosen_blocks(12, 12) == list(range(12))
    for total in range(1, 40):
        for count in range(2, total + 1):
            blocks = chosen_blocks(count, total)
            steps = {right - left for left, right in itertools.pairwise(blocks)}
            assert len(blocks) == count and (blocks[0], blocks[-1]) == (0, total - 1)
            assert min(steps) >= 1 and max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    "layers", [0, -1, 13, [], [0, 12], [-1, 3], [3, 1], [2, 2]], ids=lambda layers: str(layers).replace("-", "minus ")
)
def test_blocks_that_the_teacher_does_not_have_are_refused(layers):
    with pytest.raises(UserError, match=re.escape("--student.layers must be") + f".*got {re.escape(str(layers))}"):
        chosen_blocks(layers, 12)


def test_blocks_given_by_number_are_taken_as_they_are():
    assert chosen_blocks([1, 4, 11], 12) == [1, 4, 11]


@pytest.mark.parametrize(
    ("cls", "causal"), [("LlamaForCausalLM", True), ("BertForMaskedLM", False), ("BertModel", None)]
)
@pytest.mark.parametrize("file", ["", "config.json"], ids=["folder", "file"])
def test_a_configuration_gives_random_weights_that_depend_on_the_seed(cls, causal, file, tmp_path):
    teacher = build(cls, MODELS[cls])
    type(teacher.config)(**SIZES | {"hidden_size": 16, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (from_config(str(tmp_path / file), teacher, causal, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(first) is type(teacher) and first.config.hidden_size == 16 and first.dtype == torch.float32
    assert same_bits(first.state_dict(), again.state_dict())
    assert not same_bits(first.state_dict(), other.state_dict())


def test_configurations_that_are_no_student_are_refused(tmp_path):
    teacher = llama()
    with pytest.raises(UserError, match=r"--student.config: expected a config.json or its folder, got .*nothing"):
        from_config(str(tmp_path / "nothing"), teacher, True, 0)
    transformers.LlamaConfig(**SIZES | {"vocab_size": 98}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--student.config: vocab_size must be 97, as in the teacher, got 98"):
        from_config(str(tmp_path), teacher, True, 0)
    transformers.ViTConfig(**IMAGES).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vocab_size must be 97, as in the teacher, got None"):
        from_config(str(tmp_path), teacher, True, 0)
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--student.config: cannot make AutoModelForMaskedLM of "):
        from_config(str(tmp_path), teacher, False, 0)
    transformers.T5Config(vocab_size=VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is an encoder-decoder"):
        from_config(str(tmp_path), teacher, True, 0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"cannot load AutoConfig"):
        from_config(str(tmp_path), teacher, True, 0)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel", "DebertaV2ForMaskedLM", "MPNetForMaskedLM"])
def test_the_outputs_of_blocks_are_the_models_hidden_states(name):
    model = build(name, MODELS[name])
    inputs = batch(model)
    with BlockOutputs(model, [1, 4]) as outputs:
        model(**inputs)
    expected = model(**inputs, output_hidden_states=True).hidden_states  # the first is that of the embeddings
    assert list(outputs.values) == [1, 4]
    for number, value in outputs.values.items():
        torch.testing.assert_close(value, expected[number + 1], rtol=0, atol=0)
    weight = next(block_list(model)[1][1].parameters())
    gradients = [torch.autograd.grad(value.square().sum(), weight)[0] for value in (outputs.values[4], expected[5])]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_hooks_are_removed_after_an_error_too():
    model = llama()
    with pytest.raises(IndexError), BlockOutputs(model, [0]):
        model(input_ids=torch.tensor([[VOCABULARY]]))
    with BlockOutputs(model, [0]) as outputs, torch.no_grad():
        model(**batch(model))
    assert not outputs.values[0].requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_block_that_is_not_called_exactly_once_is_an_error():
    model = llama()
    unused = r"LlamaForCausalLM did not call its blocks 2, 5; expected one call of each"
    with pytest.raises(RunError, match=unused), BlockOutputs(model, [2, 5]):
        pass
    twice = r"LlamaForCausalLM called its block 2 twice; expected one call"
    with pytest.raises(RunError, match=twice), BlockOutputs(model, [2, 5]):
        for _ in range(2):
            model(**batch(model))


class Hint(nn.Module):
    """Returns a sum of a block's output, with the model inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        with BlockOutputs(self.model, [2]) as outputs:
            self.model(**inputs)
        return outputs.values[2].square().sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*is deprecated")
def test_gradients_of_a_hint_with_activation_checkpointing_and_in_a_data_parallel_module(tmp_path):
    model = build("BertModel", SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    inputs = batch(model)
    expected = gradients(model, model(**inputs, output_hidden_states=True).hidden_states[3].square().sum())
    assert len(expected) > 16 * 3
    model.train()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, Hint(model)(inputs)), expected)
    model.gradient_checkpointing_disable()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(Hint(model), find_unused_parameters=True)
        found = gradients(model, parallel(inputs))
    finally:
        dist.destroy_process_group()
    used = {name: gradient for name, gradient in found.items() if name in expected}
    torch.testing.assert_close(used, expected)


class Words:
    """A tokenizer of whole words."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


def test_vocabularies_must_number_their_tokens_alike():
    same_vocabulary(Words("a", "b", "c"), Words("a", "b", "c"), 4, 4)
    start = "the student has another vocabulary: "
    cases = {
        "the token 'b' is 1 in the teacher and 2 in the student": (Words("a", "c", "b"), 4),
        "the token 'c' is 2 in the teacher and missing in the student": (Words("a", "b"), 4),
        "the token 'd' is missing in the teacher and 3 in the student": (Words("a", "b", "c", "d"), 4),
        "its head has 5 rows, that of the teacher 4": (Words("a", "b", "c"), 5),
    }
    for message, (student, rows) in cases.items():
        with pytest.raises(UserError, match=re.escape(start + message)):
            same_vocabulary(Words("a", "b", "c"), student, 4, rows)
