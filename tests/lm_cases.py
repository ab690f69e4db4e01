"""What the tests of language modelling share: documents, tokenizers and tiny random models."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tlkernels.train.documents_files import Documents

WORDS = ["river", "water", "bank", "boat", "stone", "bread", "oven", "flour", "yeast", "crust"]
ENDINGS = ["##s", "##ing", "##ed"]
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


def documents(texts=None, chats=None):
    return Documents(texts, chats, "document {}".format, "test")


def masked_tokenizer():
    """Return a WordPiece tokenizer: [CLS] text [SEP], and words of one or more tokens."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *ENDINGS]
    return transformers.BertTokenizerFast(vocab={token: number for number, token in enumerate(tokens)})


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def causal_tokenizer(before="<s>", eos="</s>", template=TEMPLATE):
    """Return a tokenizer of single characters that puts `before` in front of a text and knows a chat template."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    characters = [chr(number) for number in range(32, 127)]
    backend = Tokenizer(models.WordLevel({c: n for n, c in enumerate([*special, "\n", *characters])}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    if before:
        backend.post_processor = processors.TemplateProcessing(single=f"{before} $A", special_tokens=[(before, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


MODELS = {
    "bert": (transformers.BertForMaskedLM, lambda: transformers.BertConfig(**SMALL)),
    "roberta": (transformers.RobertaForMaskedLM, lambda: transformers.RobertaConfig(**SMALL)),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        lambda: transformers.ModernBertConfig(
            **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
    ),
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**SMALL)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    ),
}
CAUSAL = ("llama", "gpt2")


def tiny(name, attention="sdpa"):
    """Return a random model in evaluation mode, with weights large enough that attention matters."""
    model_class, config = MODELS[name]
    model = model_class._from_config(config(), attn_implementation=attention).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=draw)
    return model
