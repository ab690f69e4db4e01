"""TRL's trainers and loss functions, with tlkernels and without."""

import importlib
import os
import random
import sys
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trl.experimental.cpo import cpo_trainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer import distillation_trainer, utils

import tlkernels as tlk
from tlkernels.integrations import hf, trl

CLASSES = 64
FUSED = utils._ChunkedLogProbFunction
SELECT, BOTH, ENTROPY = utils.selective_log_softmax, utils.selective_log_softmax_and_entropy, utils.entropy_from_logits
DIVERGENCE, JSD = distillation_trainer._chunked_divergence_loss, GKDTrainer.generalized_jsd_loss
SEAMS = {
    (utils, "_ChunkedLogProbFunction"), (utils, "_use_triton"), (utils, "selective_log_softmax"),
    (utils, "selective_log_softmax_and_entropy"), (utils, "entropy_from_logits"),
    (distillation_trainer, "_chunked_divergence_loss"), (GKDTrainer, "generalized_jsd_loss"),
    (cpo_trainer, "selective_log_softmax"),
}  # fmt: skip
LOSSES = (
    "linear_cross_entropy_stats", "selective_log_softmax", "cross_entropy_stats", "distillation", "linear_distillation",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _restored(one_thread):
    yield
    trl.unpatch()


@pytest.fixture
def calls(monkeypatch):
    """How often each loss was called, and the rows of the last call's first argument."""
    counts = dict.fromkeys(LOSSES, 0)

    def counted(name, function):
        def call(first, *args, **kwargs):
            counts[name] += 1
            counts["rows"] = first[..., 0].numel()
            return function(first, *args, **kwargs)

        return call

    for name in LOSSES:
        monkeypatch.setattr(tlk, name, counted(name, getattr(tlk, name)))
    return counts


def double(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def gradients(outputs, tensors):
    """The gradients of a weighted sum of all outputs that have one."""
    outputs = [output for output in outputs if output is not None and output.requires_grad]
    weights = [torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape) for output in outputs]
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, [tensor for tensor in tensors if tensor is not None])


def assert_same(ours, theirs, **tolerance):
    for left, right in zip(ours, theirs, strict=True):
        assert (left is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(left, right, **tolerance)


def like(ours, theirs):
    """Our results in the dtypes of TRL's, which are float32 where TRL computes in float32."""
    return [value if value is None else value.to(other.dtype) for value, other in zip(ours, theirs, strict=True)]


# ---- The functions


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (7,), (7, 2)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_selected_log_probabilities_are_those_of_trl(shape, temperature, masked):
    rows = shape[:2] if len(shape) > 2 or shape == (3, 5) else shape[:1]
    logits, index = double(*rows, CLASSES), torch.randint(CLASSES, shape)
    mask = torch.randint(2, shape) if masked else None
    trl.patch()
    ours, theirs = (f(logits, index, temperature, row_mask=mask) for f in (utils.selective_log_softmax, SELECT))
    assert_same([ours], [theirs], rtol=1e-9, atol=1e-12)
    assert_same(gradients([ours], [logits]), gradients([theirs], [logits]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_log_probabilities_with_entropy_are_those_of_trl(temperature, masked, differentiable):
    logits, index = double(3, 6, CLASSES), torch.randint(CLASSES, (3, 5))
    mask = torch.randint(2, (3, 5)).bool() if masked else None
    trl.patch()
    both = [
        f(logits[:, :-1], index, differentiable, temperature=temperature, row_mask=mask)
        for f in (utils.selective_log_softmax_and_entropy, BOTH)
    ]
    assert both[0][1].requires_grad == differentiable
    assert_same(*both, rtol=1e-9, atol=1e-12)
    assert_same(*(gradients(outputs, [logits]) for outputs in both), rtol=1e-9, atol=1e-12)
    ours, theirs = (f(logits, chunk_size=4) for f in (utils.entropy_from_logits, ENTROPY))
    assert_same([ours], [theirs], rtol=1e-9, atol=1e-12)
    assert_same(gradients([ours], [logits]), gradients([theirs], [logits]), rtol=1e-9, atol=1e-12)


def test_a_masked_row_is_not_read_and_a_temperature_of_zero_is_refused():
    logits, index, mask = double(2, 3, CLASSES), torch.randint(CLASSES, (2, 3)), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with torch.no_grad():
        logits[mask == 0] = torch.nan
    trl.patch()
    outputs = utils.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    assert all(output[mask == 0].eq(0).all() and output[mask == 1].ne(0).all() for output in outputs)
    (gradient,) = gradients(outputs, [logits])
    assert gradient[mask == 0].eq(0).all() and gradient.isfinite().all()
    with pytest.raises(ValueError, match="temperature"):
        utils.selective_log_softmax(logits, index, temperature=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_trl_on_a_cpu(dtype):
    logits, index = double(3, 5, CLASSES).to(dtype), torch.randint(CLASSES, (3, 5))
    trl.patch()
    for ours, theirs in ((utils.selective_log_softmax, SELECT), (utils.selective_log_softmax_and_entropy, BOTH)):
        results = [
            f(logits, index) if isinstance(f(logits, index), tuple) else (f(logits, index),) for f in (ours, theirs)
        ]
        assert_same(*results, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.0, "bias": True},
    "scale": {"scale": 0.25, "bias": True, "temperature": 1.5},
    "scaled-softcap": {"softcap": 2.0, "scale": 1 / 3, "bias": True, "temperature": 0.6},
    "negative-scale": {"scale": -0.5, "softcap": 3.0, "bias": True},
    "zero-scale": {"scale": 0.0},
}


def head_logits(hidden, weight, bias, scale=1.0, softcap=None):
    logits = scale * nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("log_probs", "entropy"), ("log_probs", *FUSED.forward.__defaults__[-1])]
)
def test_the_fused_head_gives_the_statistics_of_its_logits(head, outputs):
    options = {"temperature": 1.0, "scale": 1.0, "softcap": None, "bias": False} | HEADS[head]
    tensors = [double(9, 8), double(CLASSES, 8), double(CLASSES) if options["bias"] else None]
    targets = torch.randint(CLASSES, (9,))
    call = (targets, options["temperature"], 32, options["softcap"], options["scale"], outputs)
    trl.patch()
    with warnings.catch_warnings(action="ignore"):
        ours = utils._ChunkedLogProbFunction.apply(*tensors, *call)
    single = [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in tensors]
    theirs = FUSED.apply(*single, *call)
    assert_same(like(ours, theirs), theirs, rtol=1e-4, atol=1e-5)
    logits = head_logits(*tensors, options["scale"], options["softcap"])
    log_probs, entropy = BOTH(logits, targets, temperature=options["temperature"])
    expected = [log_probs, entropy if "entropy" in outputs else None]
    assert_same(ours[:2], expected, rtol=1e-9, atol=1e-11)
    assert_same(gradients(ours[:2], tensors), gradients(expected, tensors), rtol=1e-9, atol=1e-11)
    z = (logits / options["temperature"]).detach()
    if "mean_logits" in outputs:
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if options["softcap"] is None else {"rtol": 1e-4, "atol": 1e-5}
        assert_same([ours[2]], [z.log_softmax(-1).mul(2).logsumexp(-1)], rtol=1e-9, atol=1e-11)
        assert_same([ours[3].double()], [z.mean(-1)], **tolerance)
        assert ours[4].tolist() == (z.argmax(-1) == targets).tolist()
        assert not any(value.requires_grad for value in ours[2:])


def test_the_fused_head_refuses_an_output_that_it_does_not_know():
    trl.patch()
    with pytest.raises(NotImplementedError, match=r"outputs: expected a part of .* got {'margin'} too; call unpatch"):
        utils._ChunkedLogProbFunction.apply(
            double(2, 4), double(5, 4), None, torch.tensor([1, 2]), 1.0, 32, None, 1.0, ("log_probs", "margin")
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_statistics_of_a_16_bit_head_are_float32_as_trls_are(dtype, autocast):
    hidden, weight = double(9, 8).detach(), double(CLASSES, 8).detach()
    tensors = [t.to(torch.float32 if autocast else dtype).requires_grad_() for t in (hidden, weight)]
    call, outcome = (None, torch.randint(CLASSES, (9,)), 1.0, 64, None, 1.0, ("log_probs", "entropy", "is_top1")), []
    trl.patch()
    for function in (utils._ChunkedLogProbFunction, FUSED):
        with torch.autocast("cpu", dtype, enabled=autocast):
            results = function.apply(*tensors, *call)
        outcome.append((results, gradients(results[:2], tensors)))
    (ours, our_gradients), (theirs, their_gradients) = outcome
    assert ours[0].dtype == ours[1].dtype == torch.float32 and our_gradients[1].dtype == tensors[1].dtype
    assert_same(ours[:2], theirs[:2], rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert_same(our_gradients, their_gradients, rtol=0.02, atol=32 * torch.finfo(dtype).eps)


def test_a_head_without_a_position_to_score_has_zero_gradients():
    hidden, weight = double(0, 8), double(CLASSES, 8)
    trl.patch()
    log_probs, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.empty(0, dtype=torch.long), 1.0, 32)
    log_probs.sum().backward()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=str)
def test_generalized_jsd_loss_is_trls(beta, reduction, labelled, items):
    student, teacher, labels = double(3, 6, CLASSES), double(3, 6, CLASSES), None
    if labelled:
        labels = torch.randint(CLASSES, (3, 5)).masked_fill(torch.rand(3, 5) < 0.5, -100)
    call = {"labels": labels, "beta": beta, "temperature": 1.7, "reduction": reduction, "num_items_in_batch": items}
    trl.patch()
    with warnings.catch_warnings(action="ignore"):
        ours, theirs = (f(student[:, :-1], teacher[:, :-1], **call) for f in (GKDTrainer.generalized_jsd_loss, JSD))
    assert_same([ours], [theirs], rtol=1e-9, atol=1e-12)
    assert_same(*(gradients([loss], [student, teacher]) for loss in (ours, theirs)), rtol=1e-9, atol=1e-12)


def test_generalized_jsd_loss_without_a_position_is_zero_and_a_value_per_class_is_trls_own(calls):
    student, teacher = double(2, 3, CLASSES), double(2, 3, CLASSES)
    trl.patch()
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, torch.full((2, 3), -100))
    assert loss == 0 and gradients([loss], [student])[0].eq(0).all()
    assert calls["distillation"] == 1
    with pytest.warns(UserWarning, match="TRL's own code computes generalized_jsd_loss with reduction='none'"):
        assert GKDTrainer.generalized_jsd_loss(student, teacher, reduction="none").shape == student.shape
    with warnings.catch_warnings(action="error"):  # said once
        GKDTrainer.generalized_jsd_loss(student, teacher, reduction="none")
    assert calls["distillation"] == 1


SIDES = {
    "plain": {},
    "bias": {"student_lm_head_bias": True, "teacher_lm_head_bias": True},
    "temperature": {"temperature": 1.7},
    "items": {"num_items_in_batch": 11, "temperature": 0.8},
    "items-tensor": {"num_items_in_batch": torch.tensor(11.0)},
    "scales": {"student_logit_scale": 0.25, "teacher_logit_scale": 1 / 3, "student_lm_head_bias": True},
    "softcaps": {
        "student_final_logit_softcapping": 2.0, "teacher_final_logit_softcapping": 3.0, "teacher_logit_scale": 0.5,
        "teacher_lm_head_bias": True, "temperature": 1.3,
    },
    "one-softcap": {"teacher_final_logit_softcapping": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("options", SIDES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_of_distillation_trainer_is_that_of_its_logits(options, beta):
    options = dict(SIDES[options])
    student, teacher = [double(2, 5, 8), double(CLASSES, 8), None], [double(2, 5, 6), double(CLASSES, 6), None]
    for side, tensors in (("student", student), ("teacher", teacher)):
        if options.pop(f"{side}_lm_head_bias", False):
            tensors[2] = options[f"{side}_lm_head_bias"] = double(CLASSES)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]])
    trl.patch()
    call = (student[0], teacher[0], student[1], teacher[1], mask, beta)
    ours = distillation_trainer._chunked_divergence_loss(*call, **options)
    theirs = DIVERGENCE(*call, **options)  # in float32
    assert_same(like(ours, theirs), theirs, rtol=1e-5, atol=1e-6)
    logits = [
        head_logits(*tensors, options.get(f"{side}_logit_scale", 1.0), options.get(f"{side}_final_logit_softcapping"))
        for side, tensors in (("student", student), ("teacher", teacher))
    ]
    temperature, items = options.get("temperature", 1.0), options.get("num_items_in_batch")
    expected = JSD(
        *logits, labels=torch.where(mask == 0, -100, 0), beta=beta, temperature=temperature, num_items_in_batch=items
    )
    assert_same(
        [ours[0], ours[1]], [expected, (ENTROPY(logits[0] / temperature) * mask).sum().detach()], rtol=1e-9, atol=1e-12
    )
    assert_same(gradients(ours, student), gradients([expected], student), rtol=1e-9, atol=1e-12)
    assert ours[2] == mask.sum()
    assert all(gradient is None for gradient in torch.autograd.grad(ours[0], teacher[:2], allow_unused=True))


def test_distillation_trainers_loss_without_a_position_is_zero():
    weight = double(CLASSES, 8)
    trl.patch()
    mask = torch.zeros(2, 5, dtype=torch.long)
    loss, entropy, count = distillation_trainer._chunked_divergence_loss(
        double(2, 5, 8), double(2, 5, 8), weight, double(CLASSES, 8), mask, 0.5
    )
    assert loss == 0 and entropy == 0 and count == 0 and gradients([loss], [weight])[0].eq(0).all()


# ---- What patch() replaces


def found():
    return {(owner.__name__, name): vars(owner)[name] for owner, name in SEAMS}


def test_patching_twice_replaces_once_and_unpatching_restores_what_was_there():
    before = found()
    trl.unpatch()
    assert found() == before
    trl.patch()
    patched = found()
    assert all(patched[seam] is not before[seam] for seam in before)
    trl.patch()
    assert found() == patched
    trl.unpatch()
    trl.unpatch()
    assert all(value is before[seam] for seam, value in found().items())
    assert FUSED is sys.modules["trl.kernels"].ChunkedLogProbFunction is utils._ChunkedLogProbFunction


def test_a_module_imported_while_patched_has_our_function_and_afterwards_trls(monkeypatch):
    for name in ("trl.experimental.tpo.tpo_trainer", "trl.experimental.orpo.orpo_trainer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    trl.patch()
    tpo = importlib.import_module("trl.experimental.tpo.tpo_trainer")
    orpo = importlib.import_module("trl.experimental.orpo.orpo_trainer")
    assert tpo.selective_log_softmax_and_entropy is utils.selective_log_softmax_and_entropy is not BOTH
    assert orpo.selective_log_softmax is utils.selective_log_softmax is not SELECT
    trl.unpatch()
    assert tpo.selective_log_softmax_and_entropy is BOTH and orpo.selective_log_softmax is SELECT


def test_what_someone_else_put_there_stays(monkeypatch):
    def own(logits, index):
        return SELECT(logits, index)

    monkeypatch.setattr(cpo_trainer, "selective_log_softmax", own)
    trl.patch()
    assert cpo_trainer.selective_log_softmax is own and SELECT is not utils.selective_log_softmax
    trl.unpatch()
    assert cpo_trainer.selective_log_softmax is own


@pytest.mark.parametrize(("owner", "name"), [(utils, "_ChunkedLogProbFunction"), (GKDTrainer, "generalized_jsd_loss")])
def test_a_version_of_trl_without_a_function_is_refused_and_nothing_is_replaced(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(
        AttributeError, match=rf"TRL .* has no .*{owner.__name__}\.{name}; expected them as in TRL 1\.16"
    ):
        trl.patch()
    assert utils.selective_log_softmax is SELECT and cpo_trainer.selective_log_softmax is SELECT


def test_trls_own_function_serves_a_head_that_zero_3_partitions_and_says_so_once(calls):
    weight, hidden = nn.Parameter(double(CLASSES, 8).detach()), double(4, 8)
    weight.ds_id = 0
    trl.patch()
    with pytest.warns(
        UserWarning, match="TRL's own code computes the losses of a vocabulary head that DeepSpeed ZeRO-3"
    ):
        ours = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(4), 1.0, 32)
    with warnings.catch_warnings(action="error"):
        distillation_trainer._chunked_divergence_loss(hidden[None], hidden[None], weight, weight, torch.ones(1, 4), 0.5)
    assert sum(calls.values()) == 0
    assert_same(ours, FUSED.apply(hidden, weight, None, torch.arange(4), 1.0, 32), rtol=0, atol=0)


def test_positions_without_a_label_are_not_multiplied(calls):
    model, ids = build(), torch.randint(3, CLASSES, (2, 8))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = ids.masked_fill(torch.arange(8) < 6, -100)
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
    trl.patch()
    ours = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert calls["rows"] == 4
    for name, value in expected.items():
        torch.testing.assert_close(ours[name].to(value.dtype), value, rtol=1e-5, atol=1e-6)


# ---- Trainers


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(CLASSES - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    whole.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    return whole


def build(seed=0, name="Llama", **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": CLASSES, "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8}
    tokens = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes | tokens | options)
    return getattr(transformers, f"{name}ForCausalLM")(config).double()


def text(count, first=" "):
    return first + " ".join(f"w{random.randrange(CLASSES - 3)}" for _ in range(count))


def rows(**columns):
    random.seed(0)
    return Dataset.from_list([{name: column(i) for name, column in columns.items()} for i in range(8)])


PROMPT = {"prompt": lambda i: text(3, "")}
PAIRS = PROMPT | {"chosen": lambda i: text(4 + i % 3), "rejected": lambda i: text(3 + i % 2)}
COMPLETION = PROMPT | {"completion": lambda i: text(4 + i % 3)}
CHAT = {"messages": lambda i: [{"role": r, "content": text(3 + i % 3)} for r in ("user", "assistant")]}
GEMMA = {"name": "Gemma2", "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
COHERE = {"name": "Cohere", "logit_scale": 0.25}
ONLINE = {"num_generations": 2, "max_completion_length": 6, "num_iterations": 2, "temperature": 0.8}


def reward(completions, **kwargs):
    return [float(sum(map(ord, completion)) % 17) for completion in completions]


def teacher(**options):
    return lambda: {"teacher_model": build(1, **options)}


def reference(**options):
    return lambda: {"ref_model": build(1, **options)}


def rewarded():
    return {"reward_funcs": reward}


HEAD = {"linear_cross_entropy_stats"}
WEIGHTED = {"use_weighting": True, "ld_alpha": 0.5}
WIDER, TEACHING = teacher(hidden_size=24, num_attention_heads=3, num_key_value_heads=3), HEAD | {"linear_distillation"}
GKD = {"max_new_tokens": 4, "max_length": 20, "lmbda": 0.5}
DISTILL = {"max_completion_length": 6, "temperature": 0.8, "learning_rate": 1.0}
# The trainer, options of its configuration, data, the model, other arguments, and the losses that it calls.
TRAINERS = {
    "SFT": ("SFT", {}, COMPLETION, {}, dict, HEAD),
    "SFT-dft": ("SFT", {"loss_type": "dft", "learning_rate": 1.0}, COMPLETION, COHERE, dict, HEAD),
    "SFT-lora": ("SFT", {}, COMPLETION, GEMMA, lambda: {"peft_config": LoraConfig(r=2)}, HEAD),
    "DPO": ("DPO", {}, PAIRS, {}, reference(), HEAD),
    "DPO-weighted": ("DPO", WEIGHTED, PAIRS, GEMMA, reference(**GEMMA), HEAD),
    "KTO": ("KTO", {}, COMPLETION | {"label": lambda i: bool(i % 2)}, {}, reference(), HEAD),
    "GRPO": ("GRPO", ONLINE | {"entropy_coef": 0.1}, PROMPT, {}, rewarded, HEAD),
    "RLOO": ("RLOO", ONLINE | {"beta": 0.0}, PROMPT, {}, rewarded, HEAD),
    "ORPO": ("ORPO", {"max_length": 20}, PAIRS, {}, dict, {"selective_log_softmax"}),
    "CPO": ("CPO", {"max_length": 20}, PAIRS, GEMMA, dict, {"selective_log_softmax"}),
    "TPO": ("TPO", {}, PAIRS | {"reference": lambda i: text(3)}, {}, dict, {"cross_entropy_stats"}),
    "GKD": ("GKD", GKD | {"beta": 0.3}, CHAT, {}, teacher(), {"distillation"}),
    "Distillation": ("Distillation", DISTILL | {"beta": 0.3}, PROMPT, COHERE, WIDER, TEACHING),
    "Distillation-reverse": ("Distillation", DISTILL, PROMPT, {}, teacher(), TEACHING),
}
QUICK = {"SFT", "DPO-weighted", "GRPO", "CPO", "GKD", "Distillation"}


def trained(name, folder, wrap=lambda model: model):
    """Train two steps; return the weights and the history of losses and metrics, that of an evaluation included."""
    kind, options, columns, model, others, _ = TRAINERS[name]
    module = f"trl.experimental.{kind.lower()}" if kind in ("CPO", "GKD", "ORPO", "TPO") else "trl"
    trainer, config = (getattr(importlib.import_module(module), kind + part) for part in ("Trainer", "Config"))
    common = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "optim": "sgd",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05, "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "activation_checkpointing": False,
    }  # fmt: skip
    data = rows(**columns)
    run = trainer(
        model=wrap(build(**model)), args=config(**common | options), train_dataset=data, processing_class=tokenizer(),
        **others(),
    )  # fmt: skip
    run.train()
    if name.startswith("SFT"):
        run.state.log_history.append(run.evaluate(run.train_dataset))
    timed = ("time", "second", "runtime")
    history = [
        {key: value for key, value in step.items() if not any(part in key for part in timed)}
        for step in run.state.log_history
    ]
    return {key: value.detach().clone() for key, value in run.model.state_dict().items()}, history


def assert_same_training(ours, theirs, tolerance):
    for key, weight in theirs[0].items():
        torch.testing.assert_close(ours[0][key], weight, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")
    assert len(ours[1]) == len(theirs[1])
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in TRAINERS]
)
def test_a_trainer_learns_the_same_and_reports_the_same_metrics(name, tmp_path, calls):
    theirs = trained(name, tmp_path)
    assert sum(calls.values()) == 0
    trl.patch()
    ours = trained(name, tmp_path)
    assert {loss for loss in LOSSES if calls[loss]} == TRAINERS[name][-1]
    start = build(**TRAINERS[name][3]).state_dict()
    moved = [(theirs[0][key] - start[key]).abs().max() for key in start if key in theirs[0]]
    assert "lora" in name or max(moved) > 1e-3
    assert_same_training(ours, theirs, 1e-10 if name == "GKD" else 5e-7)  # the others are float32 in TRL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patched", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_model_that_hf_has_patched_learns_the_same_in_sft_trainer(patched, tmp_path, calls):
    theirs = trained("SFT", tmp_path)
    if patched:
        trl.patch()
    ours = trained("SFT", tmp_path, hf.patch)
    assert (calls["linear_cross_entropy_stats"] > 0) == patched
    assert_same_training(ours, theirs, 5e-7)


@pytest.mark.full
def test_a_compiled_model_gives_the_same_loss_and_gradient(calls):
    ids, outcome = torch.randint(3, CLASSES, (2, 8)), []
    trl.patch()
    for compiled in (False, True):
        model = build()
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        forward = torch.compile(model, backend="eager") if compiled else model
        output = forward(input_ids=ids, labels=ids, fused_lm_head=True)
        outcome.append(((output.loss, output.entropy), torch.autograd.grad(output.loss, list(model.parameters()))))
    for ours, theirs in zip(*outcome, strict=True):
        assert_same(ours, theirs, rtol=1e-9, atol=1e-12)
