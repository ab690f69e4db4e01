"""What the trainer's tests share: a tiny random model, made-up rows and a small configuration."""

import csv
import itertools
import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch

# Of "forkserver" processes: one imports these, and those of the tests are forked from it.
multiprocessing.set_forkserver_preload([
    "tlkernels.train.pipeline", "tlkernels.train.tasks.classify", "tlkernels.train.tasks.lm", "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
])  # fmt: skip

WORDS = {
    "river": ["water", "flows", "bank", "fish", "boat", "bridge", "wet", "stream"],
    "oven": ["bread", "bakes", "flour", "hot", "yeast", "crust", "loaf", "warm"],
    "chess": ["rook", "bishop", "mate", "board", "pawn", "queen", "castle", "check"],
}
FILLER = ["the", "a", "of", "and", "in", "on", "with", "then", "it", "is", "was", "very"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One thread, since a tiny model gains nothing from more; no time spent on measuring the loss; a separate cache."""
    import datasets

    from tlkernels.train import report

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
        patch.setattr(report, "LOSS_SECONDS", 0.0)
        yield
    torch.set_num_threads(threads)


def tiny_model(folder, dropout=0.0):
    """Save a BERT with 2 layers of width 32, random weights and a tokenizer of the words above; return the folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *itertools.chain(*WORDS.values())]
    vocabulary = {word: number for number, word in enumerate(words)}
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def made_rows(count, seed=0):
    """Return rows of a text and its class, the classes in turn; texts have 4 to 16 words."""
    draw = random.Random(seed)
    names = list(WORDS)
    rows = []
    for number in range(count):
        name = names[number % len(names)]
        words = [draw.choice(WORDS[name] if draw.random() < 0.5 else FILLER) for _ in range(draw.randint(4, 16))]
        rows.append({"text": " ".join(words), "label": name})
    return rows


def write_csv(path, rows):
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def tiny_config(folder, model, data, **run):
    """Return a configuration with six steps of 8 rows and an evaluation every two steps."""
    from tlkernels.train import Config

    return _tiny(Config(), folder, model, data, run)


def _tiny(config, folder, model, data, run, **data_options):
    config.model.path, config.data.path = model, data
    config.optim.lr = 1e-3
    config.run.folder, config.run.device = str(folder), "cpu"
    config.run.batch_size, config.run.micro_batch, config.run.steps, config.run.eval_every = 8, 3, 6, 2
    for options, values in ((config.run, run), (config.data, data_options)):
        for name, value in values.items():
            assert hasattr(options, name), name
            setattr(options, name, value)
    return config


def task_of(config):
    """Return the task of a configuration, which has read its data."""
    from tlkernels.train import pipeline

    config.check()
    return pipeline.prepare(config, pipeline.start(config))


def metrics(folder):
    """Return the lines of a training's metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(folder):
    """Return the saved tensors of the encoder and the head in a model folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors") | load_file(Path(folder) / "head.safetensors")


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tiny_causal_model(folder, dropout=0.0):
    """Save a Llama with 2 layers of width 32, an untied head and a tokenizer of the words above; return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", *FILLER, *itertools.chain(*WORDS.values())]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_dropout=dropout, pad_token_id=0, eos_token_id=2,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tiny_masked_model(folder):
    """Save the network of `tiny_model` with a masked language model's head; return the folder."""
    from transformers import AutoConfig, BertForMaskedLM

    tiny_model(folder)
    torch.manual_seed(2)
    BertForMaskedLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def write_texts(path, count, seed=0):
    """Write documents of 4 to 48 words as JSON lines; return the path."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        rows = made_rows(3, seed=draw.randrange(1 << 30))
        lines.append(json.dumps({"text": " ".join(row["text"] for row in rows[: draw.randint(1, 3)])}))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def tiny_lm_config(folder, model, data, **run):
    """Return a configuration of language modelling with six steps of 8 rows of 24 tokens."""
    from tlkernels.train import LmConfig

    config = _tiny(LmConfig(), folder, model, data, run, length=24)
    config.model.dropout = True  # of the tiny models that have it
    return config
