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
    "tlkernels.train.tasks.contrast", "tlkernels.train.tasks.distill", "tlkernels.train.tasks.distill_classifier",
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
    """One thread, since a tiny model gains nothing from more; a separate cache.

    No time is spent on measuring the loss, nor on the garbage collection before the memory is measured, which takes
    a second for all that the tests have imported.
    """
    import datasets

    from tlkernels.train import pipeline, report

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
        patch.setattr(report, "LOSS_SECONDS", 0.0)
        patch.setattr(pipeline, "reset_peak", lambda: None)
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
    (config.teacher if hasattr(config, "teacher") else config.model).path, config.data.path = model, data
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


def tiny_distill_config(folder, teacher, data, **run):
    """Return a configuration of distillation; the student, with dropout, is the first block of the teacher."""
    from tlkernels.train.distill_config import DistillConfig

    config = _tiny(DistillConfig(), folder, teacher, data, run, length=24)
    config.student.layers, config.student.dropout = [0], True
    return config


def tiny_soft_config(folder, teacher, data, **run):
    """Return a configuration of `distill-classifier`; `teacher` is the run folder of a `tlkernels finetune`."""
    from tlkernels.train.distill_config import DistillClassifierConfig

    config = _tiny(DistillClassifierConfig(), folder, teacher, data, {"compare": False, **run})
    config.student.layers, config.student.dropout = [0], True
    return config


def tiny_contrast_config(folder, model, data, **run):
    """Return a configuration of contrastive training, with dropout."""
    from tlkernels.train.contrast_config import ContrastConfig

    config = _tiny(ContrastConfig(), folder, model, data, run)
    config.model.dropout = True
    return config


def write_pairs(path, count, negatives=1, seed=0):
    """Write rows of a query, a key, hard negatives, an id and a label as JSON lines; return the path.

    Of nine rows, two have the same id.
    """
    draw, names = random.Random(seed), list(WORDS)
    lines = []
    for number in range(count):
        label = names[number % len(names)]

        def text(words, label=label, number=number):
            chosen = [draw.choice(WORDS[label] + FILLER) for _ in range(words)]
            return " ".join([*chosen, names[number % 3], *[FILLER[int(digit)] for digit in str(number)]])

        row = {"query": text(draw.randint(2, 9)), "key": text(draw.randint(2, 16)) + " castle", "label": label}
        row["id"] = f"row {number - 1 if number % 9 == 8 else number}"
        if negatives:
            row["negative"] = [text(draw.randint(2, 12)) for _ in range(negatives)]
        lines.append(json.dumps(row))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_translations(path, count, negatives=0, repeats=True):
    """Write pairs as JSON lines, and return the path: a key has a translation of its query's words, in reverse.

    Three of 18 words are a query, the first up to three times. With `repeats`, every tenth row has the query of the row
    before it.
    """
    draw, words = random.Random(0), [*FILLER, *itertools.chain(*WORDS.values())]
    triples = draw.sample(list(itertools.permutations(range(18), 3)), count)
    key = lambda triple: " ".join(words[18 + number] for number in reversed(triple))  # noqa: E731
    rows = []
    for number, triple in enumerate(triples):
        hard = [key((*triple[:2], draw.randrange(18))) for _ in range(negatives)]
        query = " ".join(words[place] for place in (*triple, *[triple[0]] * (number % 3)))
        if repeats and number % 10 == 9:
            query = rows[-1]["query"]
        rows.append({"query": query, "key": key(triple), **({"negative": hard} if negatives else {})})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contrast_formula(loss, q, k, negatives, ids, labels, scale, bias):
    """Return the loss of a batch as it is written in the papers, for a `ContrastLossConfig`."""
    mean = lambda values: torch.stack(list(values)).mean()  # noqa: E731
    rows = range(len(q))
    if loss.name == "sigmoid":
        sign = 2 * torch.eye(len(q), dtype=q.dtype) - 1
        return (1 + (-sign * (scale * q @ k.T + bias)).exp()).log().sum() / len(q)
    if loss.name in ("nt_xent", "sup_con"):
        z = torch.cat([q, k]) if loss.name == "nt_xent" else q
        same = torch.arange(len(q)).repeat(2) if loss.name == "nt_xent" else labels
        itself = torch.eye(len(z), dtype=torch.bool)
        e, positive = (scale * z @ z.T).exp(), (same[:, None] == same) & ~itself
        log_p = [(e[row] / e[row][~itself[row]].sum()).log() for row in range(len(z))]
        return mean(-log_p[row][positive[row]].mean() for row in range(len(z)) if positive[row].any())

    def one_way(mine, others):
        losses = []
        for row in rows:
            known = [other for other in rows if other != row and ids[other] == ids[row]]
            kept = [other for other in range(len(others)) if other not in known]
            log_p = (scale * others[kept] @ mine[row]).log_softmax(0)
            target = log_p[kept.index(row)]
            losses.append(-(1 - loss.label_smoothing) * target - loss.label_smoothing * log_p.mean())
        return mean(losses)

    forward = one_way(q, k if negatives is None else torch.cat([k, negatives]))
    return (forward + one_way(k, q)) / 2 if loss.symmetric else forward


def untrained_classifier(folder, model, data):
    """Write what `distill-classifier` reads of a finished run of `tlkernels finetune`; return the folder."""
    task = task_of(tiny_config(folder, model, data))
    best = Path(folder) / "finetuned/best"
    best.mkdir(parents=True)
    task.save(best, task.start())
    (Path(folder) / "config.json").write_text(task.config.to_json())
    return str(folder)


def sharpened(folder, factor=4.0):
    """Multiply the matrices of a saved model, so that networks differ by more than rounding; return the folder."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    tensors = {name: value * factor if value.dim() > 1 else value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


def divergence_of(name, student, teacher, temperature, beta=0.5):
    """Return the divergence of each row's logits times the squared temperature, in plain PyTorch."""
    q, p = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    mixture = beta * q + (1 - beta) * p
    values = {
        "forward_kl": lambda: q * (q / p).log(),
        "reverse_kl": lambda: p * (p / q).log(),
        "js": lambda: beta * q * (q / mixture).log() + (1 - beta) * p * (p / mixture).log(),
        "tv": lambda: (p - q).abs() / 2,
    }[name]()
    return temperature**2 * values.sum(-1)


def shaken(network, seed=3):
    """Add noise to the weights, in float64; return the network."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.double().parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return network


def ranks_by_hand(queries, keys, query_ids, key_ids, same):
    """Return for each query the rank of the first key with its id, or 0; of equal keys, others come first."""
    found = []
    queries, keys, query_ids, key_ids = (values.tolist() for values in (queries, keys, query_ids, key_ids))
    for i, query in enumerate(queries):
        similarity = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        candidates = [j for j in range(len(keys)) if not (same and i == j)]
        own = [similarity[j] for j in candidates if key_ids[j] == query_ids[i]]
        others = [similarity[j] for j in candidates if key_ids[j] != query_ids[i]]
        found.append(1 + sum(other >= max(own) for other in others) if own else 0)
    return found


def plain_step(network, optimizer, loss, step):
    """Do step `step` of the six of the tiny configurations in plain PyTorch: clipping, one step of warm-up, linear."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1.0 if step == 0 else 1 - (step - 1) / 5)
    optimizer.step()
    optimizer.zero_grad()
