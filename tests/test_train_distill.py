"""`tlkernels distill`: the gradient of a step, the cache, hints, the stages, resuming, and what is refused."""

import copy
import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from lm_cases import causal_tokenizer
from torch.nn import functional
from train_cases import (
    divergence_of,
    metrics,
    plain_step,
    quick,
    same_bits,
    shaken,
    sharpened,
    task_of,
    tiny_causal_model,
    tiny_distill_config,
    tiny_lm_config,
    tiny_masked_model,
    tiny_model,
    write_texts,
)

from tlkernels import timing
from tlkernels.train import UserError, checkpoint, compare, pipeline, report, teacher_cache
from tlkernels.train.batches import whole_batch
from tlkernels.train.checkpoint import Progress
from tlkernels.train.gradient import gradient
from tlkernels.train.loop import train
from tlkernels.train.paired import paired_difference

pytestmark = pytest.mark.usefixtures(quick.__name__)
CURVES = report._curves
TINY = {
    "vocab_size": 39, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("causal", "softcap", "scaled"):
        tiny_causal_model(folder / kind, dropout=0.1)
    capped = transformers.Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=2.0, sliding_window=64)
    transformers.Gemma2ForCausalLM(capped).save_pretrained(folder / "softcap")
    scaled = transformers.GraniteConfig(**TINY, logits_scaling=0.25)
    transformers.GraniteForCausalLM(scaled).save_pretrained(folder / "scaled")
    tiny_masked_model(folder / "masked")
    tiny_model(folder / "headless", dropout=0.1)
    return {kind: sharpened(folder / kind) for kind in ("causal", "softcap", "scaled", "masked", "headless")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 40)


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(models):
    """Do not wait for the disk, draw no curves, and let gc.collect pass over what the imports made."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpoint, teacher_cache):
            patch.setattr(module, "to_disk", lambda path: None)
        patch.setattr(report, "_curves", lambda *_: None)
        patch.setattr(compare, "interleaved", lambda ways, seconds, least: timing.interleaved(ways, 0.0, least))
        yield
    gc.unfreeze()


def configured(folder, teacher, data, **run):
    """Return a configuration without dropout, whose student is the first of two blocks."""
    return chosen(tiny_distill_config(folder, teacher, data, **run), student={"layers": 1, "dropout": False})


def chosen(config, **parts):
    """Set options, given as `part={option: value}`."""
    for part, options in parts.items():
        for name, value in options.items():
            assert hasattr(getattr(config, part), name), name
            setattr(getattr(config, part), name, value)
    return config


def logits_of(network, inputs):
    """The logits as transformers computes them, or of an encoder without a head its hidden states times embeddings."""
    if network.bias is None:
        return network.model(**inputs).logits
    hidden = network.model(**inputs).last_hidden_state
    return hidden @ network.model.get_input_embeddings().weight.T + network.bias


def in_float64(task):
    """Return the network that the task starts with, with noise, and its teacher, both in float64."""
    network = task.start()
    shaken(network.student, seed=3)
    network.double()
    return network, shaken(task.teacher.network, seed=4)


def expected_gradient(network, loss):
    parameters = dict(network.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def distance(network, right):
    """The largest difference of a gradient, as a share of the largest entry."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    assert found.keys() == right.keys()
    scale = max(float(value.abs().max()) for value in right.values())
    assert scale > 1e-3, "there is hardly a gradient"
    return max(float((found[name] - right[name]).abs().max()) for name in right) / scale


# ---- the gradient with the teacher -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tokens", "divergence", "step"), [
    ("causal", "all", "forward_kl", 0),
    ("causal", "all", "reverse_kl", 2),
    ("causal", "all", "tv", 4),
    ("softcap", "all", "forward_kl", 2),
    ("scaled", "all", "js", 2),
    ("masked", "all", "js", 4),
    ("headless", "all", "forward_kl", 2),
    ("headless", "masked", "reverse_kl", 0),
])  # fmt: skip
def test_the_gradient_of_a_step_is_that_of_the_batchs_mean(kind, tokens, divergence, step, models, data, tmp_path):
    """From transformers' logits of all rows at once, in float64, with schedules."""
    config = configured(tmp_path, models[kind], data, steps=5)
    chosen(config, loss={"divergence": divergence, "tokens": tokens, "beta": 0.3, "temperature": 1.0,
                         "temperature_end": 3.0, "hard_weight": 0.6, "hard_weight_end": 0.2})  # fmt: skip
    task = task_of(config)
    network, teacher = in_float64(task)
    batch = whole_batch(step, 8, len(task.rows["train"]), 0)
    inputs, masked_target, *_ = task.inputs("train", batch, step)
    rows = task.rows["train"].batch(batch)
    if kind in ("masked", "headless"):
        ordinary = ~torch.isin(rows.ids, torch.tensor(task.tokenizer.all_special_ids))
        counted = ordinary if tokens == "all" else masked_target != -100
        assert (inputs["input_ids"] != rows.ids).any(), "no token is masked"
        assert tokens == "all" or 0 < int(counted.sum()) < 0.3 * int(ordinary.sum())
        label = rows.ids.long()
    else:  # the next token of the same text
        label = rows.ids.long().roll(-1, 1)
        counted = (rows.piece == rows.piece.roll(-1, 1)) & (rows.piece >= 0)
        counted[:, -1] = False
    with torch.no_grad():
        taught = logits_of(teacher, inputs)[counted]
    guess = logits_of(network.student, inputs)[counted]
    temperature, share = {0: (1.0, 0.6), 2: (2.0, 0.4), 4: (3.0, 0.2)}[step]
    soft = divergence_of(divergence, guess, taught, temperature, 0.3)
    hard = functional.cross_entropy(guess, label[counted], reduction="none")
    loss = ((1 - share) * soft + share * hard).mean()
    right = expected_gradient(network, loss)
    assert task.divisor(batch, step) == int(counted.sum())
    assert float(gradient(task, network.train(), batch, step, Progress())) == pytest.approx(loss.item(), rel=1e-6)
    assert distance(network, right) < 1e-6  # transformers normalises in float32
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_training_step_of_sgd_subtracts_the_gradient(models, data, tmp_path):
    config = configured(tmp_path, models["causal"], data, steps=1, eval_every=1)
    chosen(config, optim={"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip_norm": None})
    chosen(config, schedule={"name": "constant", "warmup": 0.0})
    task = task_of(config)
    network, teacher = in_float64(task)
    before = copy.deepcopy(network)
    inputs, target, *_ = task.inputs("train", whole_batch(0, 8, len(task.rows["train"]), 0), 0)
    guess, taught = (logits_of(of, inputs)[target >= 0] for of in (network.student, teacher))
    loss = functional.kl_div(guess.log_softmax(-1), taught.detach().softmax(-1), reduction="batchmean")
    right = expected_gradient(network, loss)
    train(task, tmp_path / "run", lambda: network)
    after = dict(network.named_parameters())
    for name, old in before.named_parameters():
        torch.testing.assert_close(old.detach() - after[name].detach(), right[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["causal", "headless"])
def test_hints_add_the_mean_squared_error_of_hidden_states(kind, models, data, tmp_path):
    """Between networks of different width; the hidden states are those that transformers returns."""
    options = TINY | {"hidden_size": 16, "vocab_size": 39 if kind == "causal" else 41}
    options.pop("num_key_value_heads")
    cls = {"causal": transformers.LlamaConfig, "headless": transformers.BertConfig}[kind]
    cls(**options).save_pretrained(tmp_path / "small")
    config = configured(tmp_path, models[kind], data)
    chosen(config, student={"layers": None, "config": str(tmp_path / "small")})
    chosen(config, hints={"blocks": [(0, 0)] if kind == "causal" else [(0, 1), (1, 0)], "weight": 0.7})
    task = task_of(config)
    network, teacher = in_float64(task)
    assert [tuple(one.weight.shape) for one in network.maps] == [(32, 16)] * len(config.hints.blocks)
    batch = whole_batch(0, 8, len(task.rows["train"]), 0)
    inputs, target, *_ = task.inputs("train", batch, 0)
    counted = target != -100
    own = network.student.model(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        told = teacher.model(**inputs, output_hidden_states=True).hidden_states
        taught = logits_of(teacher, inputs)[counted]
    loss = divergence_of("forward_kl", logits_of(network.student, inputs)[counted], taught, 1.0).mean()
    for one, (mine, its) in zip(network.maps, config.hints.blocks, strict=True):
        guess = own[mine + 1][counted] @ one.weight.T + one.bias
        loss = loss + 0.7 * functional.mse_loss(guess, told[its + 1][counted])
    right = expected_gradient(network, loss)
    assert float(gradient(task, network.train(), batch, 0, Progress())) == pytest.approx(loss.item(), rel=1e-6)
    assert distance(network, right) < 1e-6  # transformers normalises in float32
    assert float(network.maps[0].weight.grad.abs().max()) > 1e-4


# ---- the gradient from a cache -----------------------------------------------------------------------------------


def with_rest(log_probs):
    return torch.cat([log_probs, torch.log1p(-log_probs.exp().sum(-1, keepdim=True))], -1)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore", "none"])
def test_the_gradient_from_a_cache(tail, models, data, tmp_path):
    """With all classes ("none") it is the live one but for the rounding of float16."""
    top_k = 39 if tail == "none" else 5
    config = chosen(configured(tmp_path, models["causal"], data), teacher={"top_k": top_k})
    chosen(config, loss={"temperature": 2.0, "hard_weight": 0.3, "tail": "bucket" if tail == "none" else tail})
    task = task_of(config)
    with torch.no_grad():
        batch = whole_batch(1, 8, len(task.rows["train"]), 0)
        task.write_answers()
        inputs, target, _, lesson = task.inputs("train", batch, 1)
        counted = target >= 0
        taught = logits_of(task.teacher.network, inputs)[counted].double()
    best, index = taught.log_softmax(-1).topk(top_k, -1)
    torch.testing.assert_close(lesson.log_probs.double(), best, rtol=2**-10, atol=1e-5)
    network = task.start()
    shaken(network.student)
    guess = logits_of(network.student, inputs)[counted]
    if tail == "none":
        soft = divergence_of("forward_kl", guess, taught, 2.0)
    elif tail == "renormalize":
        soft = divergence_of("forward_kl", guess.gather(-1, index), best, 2.0)
    else:
        log_q = (with_rest(best) / 2).log_softmax(-1)
        log_p = with_rest((guess / 2).log_softmax(-1).gather(-1, index))
        terms = 4 * log_q.exp() * (log_q - log_p)
        soft = terms.sum(-1) if tail == "bucket" else terms[:, :-1].sum(-1)
    loss = (0.7 * soft + 0.3 * functional.cross_entropy(guess, target[counted], reduction="none")).mean()
    right = expected_gradient(network, loss)
    assert float(gradient(task, network, batch, 1, Progress())) == pytest.approx(loss.item(), rel=2e-3)
    assert distance(network, right) < 2e-3


@pytest.mark.full
def test_a_shared_cache_is_not_written_again_and_gives_the_same_training(models, data, tmp_path):
    cache = tmp_path / "cache"
    for name, teacher in (("first", {"top_k": 5, "cache": str(cache)}), ("second", {"cache": str(cache)})):
        pipeline.run(chosen(configured(tmp_path / name, models["causal"], data, steps=2), teacher=teacher))
        times = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
        if name == "first":
            written = times
    assert times == written and "manifest.json" in times
    assert not (tmp_path / "second/teacher-cache").exists()
    assert metrics(tmp_path / "first/distilled") == metrics(tmp_path / "second/distilled")

    def refused(match, teacher=models["causal"], rows=data, **options):
        config = configured(tmp_path / "refused", teacher, rows, compare=True)
        with pytest.raises(UserError, match=match):
            pipeline.run(chosen(config, teacher={"cache": str(cache)} | options))
        assert not (tmp_path / "refused").exists(), "the run began"

    other = tiny_causal_model(tmp_path / "other", dropout=0.1)
    refused("was written by another teacher", teacher=other)
    refused("was written for other training rows", rows=write_texts(tmp_path / "rows.jsonl", 40, seed=9))
    refused("--teacher.top_k must be 5, as in the cache .*, or be left out; got 4", top_k=4)


@pytest.mark.full
def test_the_teacher_is_released_while_the_student_trains_from_the_cache(models, data, tmp_path, monkeypatch):
    seen, real = {}, pipeline.loop.gradient

    def watched(task, *arguments):
        gc.collect()
        seen[task.way] = any(network() is not None for network in teachers)
        return real(task, *arguments)

    teachers, new = [], pipeline.task_class("distill")._read_teacher

    def read(self):
        network = new(self)
        teachers.append(weakref.ref(network))
        return network

    monkeypatch.setattr(pipeline.loop, "gradient", watched)
    monkeypatch.setattr(pipeline.task_class("distill"), "_read_teacher", read)
    config = chosen(configured(tmp_path, models["causal"], data, steps=1), teacher={"top_k": 5})
    chosen(config, run={"compare": True})
    pipeline.run(config)
    assert teachers and seen == {"text": False, "cached": False, "live": True}


def test_the_teacher_is_neither_copied_nor_saved_nor_trained(models, data, tmp_path):
    task = task_of(configured(tmp_path, models["causal"], data, steps=2))
    network, before = task.start(), copy.deepcopy(task.teacher.network.state_dict())
    copied = copy.deepcopy(network)
    assert copied.teacher is network.teacher and copied.student is not network.student
    assert set(network.state_dict()) == {f"student.{name}" for name in network.student.state_dict()}
    train(task, tmp_path / "run", lambda: network)
    assert same_bits(before, task.teacher.network.state_dict())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run/best/model.safetensors")
    assert not any(".layers.1." in name for name in saved) and any(".layers.0." in name for name in saved)


# ---- which tokens count, and which student -----------------------------------------------------------------------


def test_only_the_assistants_tokens_of_a_chat_count(tmp_path):
    tokenizer = causal_tokenizer(before=None)
    tokenizer.save_pretrained(tmp_path / "chats")
    config = transformers.LlamaConfig(**TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 256})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "chats")
    sharpened(tmp_path / "chats")
    answers = [f"answer {number} " + "yes" * (number % 4) for number in range(20)]
    chats = [
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}] for answer in answers
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    config = configured(tmp_path / "run", str(tmp_path / "chats"), str(tmp_path / "chats.jsonl"))
    task = task_of(chosen(config, data={"length": 128, "pack": False}))
    network, teacher = in_float64(task)
    batch = whole_batch(0, 8, len(task.rows["train"]), 0)
    inputs, target, count, _ = task.inputs("train", batch, 0)
    said = {"".join(tokenizer.convert_ids_to_tokens(row[row >= 0])) for row in target}
    assert len(said) == 8 and said <= {f"{answer}<|im_end|>" for answer in answers}
    assert count == int((target >= 0).sum()) < 0.6 * int(inputs["attention_mask"].sum())
    with torch.no_grad():
        taught = logits_of(teacher, inputs)
    soft = divergence_of("forward_kl", logits_of(network.student, inputs), taught, 1.0)
    loss = soft[target >= 0].mean()
    assert loss.item() != pytest.approx(soft.mean().item(), rel=1e-2)
    right = expected_gradient(network, loss)
    gradient(task, network, batch, 0, Progress())
    assert distance(network, right) < 1e-6


def test_an_evaluation_scores_masked_tokens_alone(models, data, tmp_path):
    task = task_of(configured(tmp_path, models["headless"], data))
    network = task.start()
    scores = task.scores(network, "eval")
    rows = task.rows["eval"]
    inputs, target, count, lesson = task.inputs("eval", torch.arange(len(rows)), None)
    changed = inputs["input_ids"] != rows.batch(torch.arange(len(rows))).ids
    assert lesson is None and bool((target[changed] >= 0).all()) and changed.any()
    assert scores.count == count == int((target >= 0).sum()) < 0.3 * int(rows.counts.sum())
    with torch.no_grad():
        loss = functional.cross_entropy(logits_of(network.student.eval(), inputs)[target >= 0], target[target >= 0])
    assert scores.values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_student_begins_with_the_chosen_weights(models, data, tmp_path):
    teacher = transformers.LlamaForCausalLM.from_pretrained(models["causal"]).state_dict()

    def student(**options):
        config = configured(tmp_path, models["causal"], data)
        network = task_of(chosen(config, student={"layers": None} | options)).new_student()
        assert all(parameter.requires_grad for parameter in network.parameters())
        return network.model.state_dict()

    for layers, blocks in ((None, [0]), (1, [0]), (2, [0, 1]), ([1], [1])):
        cut = student(layers=layers)
        assert len({name.split(".")[2] for name in cut if ".layers." in name}) == len(blocks)
        for name, value in cut.items():
            parts = name.split(".")
            if ".layers." in name:
                parts[2] = str(blocks[int(parts[2])])
            assert torch.equal(value, teacher[".".join(parts)]), name
    assert same_bits(student(path=models["causal"]), teacher)
    transformers.LlamaConfig(**TINY | {"hidden_size": 16}).save_pretrained(tmp_path / "small")
    new = student(config=str(tmp_path / "small"))
    assert new["lm_head.weight"].shape == (39, 16) and same_bits(new, student(config=str(tmp_path / "small")))


def test_what_cannot_be_distilled_is_refused_in_one_line(models, data, tmp_path):
    def refused(match, kind="causal", **parts):
        config = chosen(configured(tmp_path / "run", models[kind], data), **parts)
        with pytest.raises(UserError, match=match) as caught:
            pipeline.run(config)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    def small(name, **options):
        transformers.LlamaConfig(**TINY | options).save_pretrained(tmp_path / name)
        return {"layers": None, "config": str(tmp_path / name)}

    other = tiny_causal_model(tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace('"river"', '"oven"').replace('"water": ', '"fire": '))
    refused("--student.layers must be from 1 to 2, the teacher's number of blocks, got 5", student={"layers": 5})
    refused("--student.layers and --student.path exclude each other", student={"layers": 1, "path": "x"})
    refused("--student.config: vocab_size must be 39, as in the teacher, got 40", student=small("forty", vocab_size=40))
    refused("another vocabulary: the token", student={"layers": None, "path": other})
    refused(
        "--data.length must be at most 16, the student's positions, got 24",
        student=small("short", max_position_embeddings=16),
    )
    refused("--student.path must be causal", student={"layers": None, "path": models["masked"]})
    refused(r"--hints.blocks: the student has the blocks 0 to 0, got 1 in \[1, 0\]", hints={"blocks": [(1, 0)]})
    refused(r"--hints.blocks: the teacher has the blocks 0 to 1, got 2 in \[0, 2\]", hints={"blocks": [(0, 2)]})
    refused("--hints.blocks needs the teacher", hints={"blocks": [(0, 0)]}, teacher={"top_k": 5})
    refused("--teacher.top_k and --teacher.cache apply to causal models", "masked", teacher={"top_k": 5})
    refused(r"--loss.tail applies to a cache \(--teacher.top_k\)", loss={"tail": "ignore"})
    refused("--loss.tokens applies to masked models; this one is causal", loss={"tokens": "masked"})
    refused("--loss.temperature_end must be above 0, got 0", loss={"temperature_end": 0.0})
    refused("--loss.hard_weight must be 0 <= share <= 1, got 2", loss={"hard_weight": 2.0})


def test_the_run_of_a_finished_lm_is_a_teacher(models, data, tmp_path):
    """Of an encoder without a head, its bias is trained and belongs to it."""
    config = tiny_lm_config(tmp_path / "lm", models["headless"], data, steps=3, eval_every=3)
    config.optim.lr = 0.1
    pipeline.run(config)
    trained = json.loads((tmp_path / "lm/trained/result.json").read_text())
    task = task_of(configured(tmp_path / "run", str(tmp_path / "lm"), data))
    line = task.stages()["teacher"].measure()
    assert line["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-6) and line["count"] == trained["count"]
    assert float(task.teacher.network.bias.abs().max()) > 0.01
    assert torch.equal(task.new_student().bias, task.teacher.network.bias)


# ---- whole runs --------------------------------------------------------------------------------------------------


def tensors(folder):
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def same_training(left, right):
    assert metrics(left) == metrics(right)
    for kept in ("best", "last"):
        assert same_bits(tensors(left / kept), tensors(right / kept))
    lines = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    for name in ("perplexity", "accuracy", "each", "best_step", "steps"):
        assert lines[0][name] == lines[1][name]
    return lines[0]


@pytest.fixture(scope="module")
def compared(models, data, tmp_path_factory):
    """A run from a cache with everything to compare it with, with dropout."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_curves", CURVES)
        config = tiny_distill_config(folder, models["causal"], data, compare=True, compare_loss=3)
        pipeline.run(chosen(config, teacher={"top_k": 5}, loss={"hard_weight": 0.5}))
    return folder


def test_the_table_and_the_results(compared):
    results = json.loads((compared / "results.json").read_text())
    lines = {line["stage"]: line for line in results["results"]}
    assert list(lines) == ["teacher", "student", "cache", "distilled", "text", "live"]
    assert all(lines[name]["peak_bytes"] > 0 for name in ("text", "distilled", "live"))
    assert 0 < lines["cache"]["mass"] < 1 and lines["cache"]["top_k"] == 5
    assert lines["cache"]["cache_bytes"] == lines["distilled"]["cache_bytes"] > 5 * 4
    assert "cache_bytes" not in lines["text"] and "cache_bytes" not in lines["live"]
    verdict = results["verdict"].splitlines()
    assert f"from {lines['student']['perplexity']:.2f} to {lines['distilled']['perplexity']:.2f}" in verdict[0]
    assert f"the teacher's is {lines['teacher']['perplexity']:.2f}" in verdict[0]
    assert f"for {lines['cache']['mass']:.1%} of the teacher's probability" in verdict[1]
    assert verdict[2].startswith("Distilled from the cache ") and verdict[3].startswith("Distilled live ")
    assert list(results["comparison"]["losses"]) == ["tlkernels", "eager"]


@pytest.mark.parametrize(("kind", "options", "titles"), [
    ("causal", {"run": {"compare": True}}, {
        "teacher": "teacher", "student": "student before", "cache": "the teacher's 32 best classes on disk",
        "distilled": "student distilled live", "text": "student trained on text alone",
        "cached": "student distilled from the cache"}),
    ("causal", {"teacher": {"top_k": 3}}, {
        "teacher": "teacher", "student": "student before", "cache": "the teacher's 3 best classes on disk",
        "distilled": "student distilled from the cache"}),
    ("masked", {"run": {"compare": True}}, {
        "teacher": "teacher", "student": "student before", "distilled": "student distilled live",
        "text": "student trained on text alone"}),
    ("masked", {}, {"teacher": "teacher", "student": "student before", "distilled": "student distilled live"}),
])  # fmt: skip
def test_the_stages(kind, options, titles, models, data, tmp_path):
    task = task_of(chosen(configured(tmp_path, models[kind], data), **options))
    assert {name: stage.title for name, stage in task.stages().items()} == titles
    assert list(task.stages()) == list(titles)


def test_the_text_alone_is_learned_as_by_lm(compared, models, data, tmp_path):
    """The same student, dropout and rows: bit for bit."""
    task = task_of(tiny_distill_config(tmp_path, models["causal"], data))
    task._sibling("text").save(tmp_path / "student", task.start())
    pipeline.run(tiny_lm_config(tmp_path / "lm", str(tmp_path / "student"), data))
    same_training(tmp_path / "lm/trained", compared / "text")


@pytest.mark.full
def test_a_stopped_and_resumed_comparison_is_the_unbroken_one(compared, models, data, tmp_path):
    config = tiny_distill_config(tmp_path / "run", models["causal"], data, compare=True)
    pipeline.run(chosen(config, teacher={"top_k": 5}, loss={"hard_weight": 0.5}), until=3)
    assert not (tmp_path / "run/results.json").exists()
    pipeline.resume(tmp_path / "run", until=5)
    pipeline.resume(tmp_path / "run")
    for stage in ("text", "distilled", "live"):
        same_training(compared / stage, tmp_path / "run" / stage)
    verdicts = [json.loads((folder / "results.json").read_text())["verdict"] for folder in (compared, tmp_path / "run")]
    assert verdicts[0] == verdicts[1]


@pytest.mark.full
def test_a_stopped_and_resumed_run_with_hints_is_the_unbroken_one(models, data, tmp_path):
    """With dropout, and a teacher whose loading draws random numbers."""
    for name in ("whole", "stopped"):
        config = tiny_distill_config(tmp_path / name, models["headless"], data)
        chosen(config, hints={"blocks": [(0, 1)]}, run={"steps": 4, "eval_every": 2})
        pipeline.run(config, until=3 if name == "stopped" else None)
    pipeline.resume(tmp_path / "stopped")
    same_training(tmp_path / "whole/distilled", tmp_path / "stopped/distilled")
    maps = [tensors(tmp_path / "whole/distilled" / kept)["hints.safetensors 0.weight"] for kept in ("best", "last")]
    starts = []
    for loaded in (False, True):
        task = task_of(chosen(config, run={"folder": str(tmp_path / "again")}))
        assert not loaded or task.teacher.network is not None
        starts.append(task.start().maps[0].weight)
    assert not torch.equal(maps[1], starts[0]), "the maps are not trained"
    assert torch.equal(*starts), "what the maps begin with depends on when the teacher is loaded"


@pytest.mark.parametrize(
    "kind", ["causal", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("masked", "cached"))]
)
def test_the_losses_that_are_compared_agree_with_a_plain_loop(kind, models, data, tmp_path):
    config = configured(tmp_path, models["causal" if kind == "cached" else kind], data, compare_loss=3)
    chosen(config, loss={"temperature": 2.0, "hard_weight": 0.5}, teacher={"top_k": 39 if kind == "cached" else None})
    config.loss.tokens = "masked" if kind == "masked" else "all"
    task = task_of(config)
    rows = compare.compare_losses(task, tmp_path, lambda: task.start())["losses"]
    assert list(rows) == ["tlkernels", "eager", "eager on gathered rows"][: 2 + (kind == "masked")]
    assert all(row["difference"] < 1e-5 for row in rows.values())

    network, teacher = task.start().student.double().train(), task.teacher.network.double()
    matrices = [[p for p in network.parameters() if (p.ndim >= 2) == large] for large in (True, False)]
    groups = [{"params": matrices[0], "weight_decay": 0.01}, {"params": matrices[1], "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-3, foreach=False), []
    for step in range(3):
        inputs, target, *_ = task.inputs("train", whole_batch(step, 8, len(task.rows["train"]), 0), step)
        guess, taught = (logits_of(of, inputs)[target >= 0] for of in (network, teacher))
        soft = divergence_of("forward_kl", guess, taught.detach(), 2.0)
        loss = (soft + functional.cross_entropy(guess, target[target >= 0], reduction="none")).mean() / 2
        plain_step(network, optimizer, loss, step)
        losses.append(loss.item())
    assert rows["tlkernels"]["values"] == pytest.approx(losses, rel=1e-4 if kind == "cached" else 1e-5)


# ---- what is said about it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "noise", "said"), [
    (0.1, 0.0, "Distilled live is better than trained on text alone: perplexity 7.00 against 8.00, +0.100 ± "),
    (-0.1, 0.0, "Distilled live is worse than trained on text alone: perplexity 7.00 against 8.00, -0.100 ± "),
    (0.0, 3.0, "Distilled live and trained on text alone cannot be told apart: perplexity 7.00 against 8.00, "),
])  # fmt: skip
def test_what_is_said_of_a_gain(gain, noise, said, models, data, tmp_path):
    task = task_of(configured(tmp_path, models["causal"], data))
    counts = task.rows["test"].counts
    signs = torch.arange(len(counts)) % 2 * 2 - 1
    text = {"stage": "text", "perplexity": 8.0, "each": (counts * 2.0).tolist()}
    ours = {
        "stage": "distilled",
        "perplexity": 7.0,
        "count": 9,
        "each": (counts * (2.0 - gain) + noise * signs).tolist(),
    }
    others = [{"stage": name, "perplexity": 5.0} for name in ("teacher", "student")]
    line = task.verdict([*others, text, ours]).splitlines()[-1]
    assert line.startswith(said) and line.endswith(f"nats a token (95 %, {len(counts)} rows).")


def test_the_interval_of_paired_rows():
    """Of plain means, that of a textbook; of ratios, that of a bootstrap."""
    draw = torch.Generator().manual_seed(0)
    first, noise = torch.randn(300, generator=draw).double(), torch.randn(300, generator=draw).double()
    second = first + 0.3 * noise - 0.1
    mean, margin = paired_difference(first.tolist(), second.tolist())
    assert mean == pytest.approx(float((first - second).mean()))
    assert margin == pytest.approx(1.96 * float((first - second).std()) / math.sqrt(300))

    counts = torch.randint(1, 50, (300,), generator=draw)
    first, second = counts * 2 + first, counts * (2 - 0.02 * noise) + first
    mean, margin = paired_difference(first.tolist(), second.tolist(), counts)
    chosen_rows = torch.randint(300, (4000, 300), generator=draw)
    ratios = (first - second)[chosen_rows].sum(1) / counts[chosen_rows].sum(1)
    assert mean == pytest.approx(float((first - second).sum() / counts.sum()))
    assert margin == pytest.approx(1.96 * float(ratios.std()), rel=0.06)
