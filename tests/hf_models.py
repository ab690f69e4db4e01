"""Tiny random models of transformers, and what tests of them share."""

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLASSES = 97
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = WIDE | {"vocab_size": CLASSES, "max_position_embeddings": 64, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": CLASSES}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": CLASSES}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
CACHED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}

# The model, options of its config, and the temperature and the softcap that its forward has in transformers.
MODELS = {
    "Llama": ("LlamaForCausalLM", CACHED, 1.0, None),
    "Llama-tied": ("LlamaForCausalLM", CACHED | {"tie_word_embeddings": True}, 1.0, None),
    "Gemma2": ("Gemma2ForCausalLM", CACHED | {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "Gemma3": ("Gemma3ForCausalLM", CACHED | {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "Gemma3-uncapped": ("Gemma3ForCausalLM", CACHED, 1.0, None),
    "Qwen3": ("Qwen3ForCausalLM", CACHED, 1.0, None),
    "Cohere": ("CohereForCausalLM", CACHED | {"logit_scale": 0.25}, 4.0, None),
    "Granite": ("GraniteForCausalLM", CACHED | {"logits_scaling": 6.0}, 6.0, None),
    "HyperCLOVAX": ("HyperCLOVAXForCausalLM", CACHED | {"logits_scaling": 4.0}, 0.25, None),
    "GPT2": ("GPT2LMHeadModel", GPT2, 1.0, None),
    "BERT": ("BertForMaskedLM", SIZES, 1.0, None),
    "RoBERTa": ("RobertaForMaskedLM", SIZES, 1.0, None),
    "ModernBERT": ("ModernBertForMaskedLM", SIZES | {"cls_token_id": 1, "sep_token_id": 2}, 1.0, None),
    "DistilBERT": ("DistilBertForMaskedLM", DISTILBERT, 1.0, None),
    "ALBERT": ("AlbertForMaskedLM", SIZES | {"embedding_size": 16}, 1.0, None),
    "ELECTRA": ("ElectraForMaskedLM", SIZES | {"embedding_size": 16}, 1.0, None),
}


def build(name, options, dtype=torch.float64):
    """A model with random weights in evaluation mode. No bias is zero, and the logits are of the order of a softcap."""
    cls = getattr(transformers, name) if isinstance(name, str) else name
    model = cls(cls.config_class(**{"bos_token_id": 1, "eos_token_id": 2} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def llama(cls=None, dtype=torch.float64, **options):
    return build(cls or transformers.LlamaForCausalLM, CACHED | options, dtype)


def batch():
    ids, mask = torch.randint(3, CLASSES, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(CLASSES, (2, 7))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class Shapes(TorchDispatchMode):
    """Records the shapes of all results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def whole(gradient):
    """The whole tensor of a shard."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
