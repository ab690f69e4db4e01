"""`check_normalisation`: plain steps, transformers' Trainer, what is restored, and errors."""

import contextlib
import copy
import gc
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tlkernels.normalisation import Normalisation, NormalisationReport, check_normalisation

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 16
TARGET = torch.tensor(
    [0, 1, -100, -100, 2, -100, -100, -100, 3, 1, 2, 0, -100, 3, 3, 1]
)  # 2, 1, 4 and 3 count in fours


class Net(nn.Module):
    """With every kind of dropout, or none; `modes` is whether the network was in training mode when it was called."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body, self.head, self.drop = nn.Linear(8, 12), nn.Linear(12, 4), nn.Dropout(dropout)
        self.path = DropPath(dropout)
        self.modes, self.p = [], dropout

    def forward(self, x):
        self.modes.append(self.training)
        x = self.drop(self.body(x))
        x = functional.dropout(x, self.p, self.training)
        heads = x.view(1, -1, 3, 4)  # each row is a sequence of 3
        heads = heads.transpose(0, 1)
        x = functional.scaled_dot_product_attention(heads, heads, heads, None, self.p if self.training else 0.0)
        return self.head(self.path(x.flatten(1)))


class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * (torch.rand(len(x), 1, dtype=x.dtype) >= self.p) if self.training else x


def inputs(dtype=torch.float32):
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def global_mean(total, count, counted, pieces):
    return total / counted


def mean_of_means(total, count, counted, pieces):
    return total / count / pieces


def sum_of_means(total, count, counted, pieces):
    return total / count


def step_of(model, normalise, x=None, before=lambda: None):
    """Return a step that calls `before` and the model in training mode, with a loss of the sum over a micro-batch."""
    x = inputs() if x is None else x

    def step(pieces):
        before()
        model.train()
        for rows, target in zip(x.chunk(pieces), TARGET.chunk(pieces), strict=True):
            total = functional.cross_entropy(model(rows), target, reduction="sum")
            normalise(total, (target != -100).sum(), (TARGET != -100).sum(), pieces).backward()

    return step


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def compared(gradient, whole):
    return float(gradient @ whole / (whole @ whole)), float((gradient - whole).norm() / whole.norm())


def expected(model, loss_of, pieces):
    """Return factor and difference of the sum of the losses' gradients in float64, with nothing random."""
    model = copy.deepcopy(model).double().eval()

    def gradient(count):
        losses = [loss_of(model, rows) for rows in torch.arange(ROWS).chunk(count)]
        return flat(torch.autograd.grad(sum(losses), list(model.parameters()), materialize_grads=True))

    return compared(gradient(pieces), gradient(1))


def expected_mean_of_means(model, pieces):
    x = inputs(torch.float64)
    return expected(model, lambda m, rows: functional.cross_entropy(m(x[rows]), TARGET[rows]) / pieces_of(rows), pieces)


def pieces_of(rows):
    return ROWS // len(rows)


# ---- plain steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sum_over_all_micro_batches_divided_by_the_global_count_is_ok(dtype):
    model = Net().to(dtype)
    report = check_normalisation(step_of(model, global_mean, inputs(dtype)), model, (1, 2, 4, 16))
    assert report.ok and [line.pieces for line in report.lines] == [1, 2, 4, 16]
    eps = torch.finfo(dtype).eps
    assert all(abs(line.factor - 1) <= 4 * eps and 8 * eps <= line.rounding < 64 * eps for line in report.lines)
    assert str(report).endswith(f"number of micro-batches, up to a rounding of {report.lines[0].rounding:.1e}.")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_mean_of_means_of_ragged_micro_batches_differs_as_computed_by_hand(dropout):
    model = Net(dropout)
    report = check_normalisation(step_of(model, mean_of_means), model)
    assert report.lines[0] == Normalisation(1, 1.0, 0.0, report.lines[0].rounding)
    for line in report.lines[1:]:
        factor, difference = expected_mean_of_means(model, line.pieces)
        assert not line.ok and difference > 0.05
        assert line.factor == pytest.approx(factor, rel=1e-5) and line.difference == pytest.approx(difference, rel=1e-5)
    assert all(model.modes)  # a loss that is different in training is the one that is checked
    assert "is not divided" not in str(report)


def test_dropout_gives_the_same_report_and_needs_no_seed():
    reports = []
    for dropout in (0.0, 0.9):
        torch.manual_seed(0)
        model = Net(dropout)
        reports.append(check_normalisation(step_of(model, mean_of_means), model))
    assert reports[0] == reports[1]


def test_a_loss_that_is_not_divided_has_the_number_of_micro_batches_as_its_factor():
    model = nn.Linear(8, 4)
    x, target = inputs(), torch.arange(ROWS) % 4

    def step(pieces):
        for rows, labels in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
            functional.cross_entropy(model(rows), labels).backward()

    report = check_normalisation(step, model)
    assert not report.ok
    for line in report.lines:
        assert line.factor == pytest.approx(line.pieces, rel=1e-5)
        assert line.difference == pytest.approx(line.pieces - 1, rel=1e-5, abs=1e-5)
    assert str(report).splitlines()[3].split() == [
        "4",
        "4.000",
        "3.00e+00",
        f"{report.lines[0].rounding:.1e}",
        "NOT",
        "OK",
    ]
    assert str(report).endswith(
        "with a relative difference of 3; the loss is not divided by the number of micro-batches."
    )


def test_a_correct_step_is_ok_where_the_gradients_of_rows_cancel():
    # At the minimum rounding is a large part of the gradient: a fixed tolerance of some units would call it not ok.
    x, noise = torch.randn(2, 4096, 8, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + noise[:, :1]
    solution = torch.linalg.lstsq(x, y).solution.T
    x, y = x.float(), y.float()
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(solution * (1 + 1e-4))

    def step(pieces):
        for rows, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            ((model(rows) - target).square().sum() / 4096).backward()

    report = check_normalisation(step, model, (1, 2, 4, 64))
    assert report.ok and max(line.difference for line in report.lines) > 64 * torch.finfo(torch.float32).eps


def test_batch_normalisation_uses_its_running_statistics():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[1].running_mean.normal_()
    before = copy.deepcopy(model.state_dict())
    assert check_normalisation(step_of(model, global_mean), model).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_is_seen_and_rounding_is_that_of_its_dtype():
    model = Net()
    step = step_of(model, global_mean)

    def autocast(pieces):
        with torch.autocast("cpu", torch.bfloat16):
            step(pieces)

    report = check_normalisation(autocast, model)
    assert report.ok and report.lines[0].rounding >= 8 * torch.finfo(torch.bfloat16).eps


def test_a_parameter_without_a_gradient_and_a_sparse_gradient_are_compared():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.unused = nn.Embedding(20, 4, sparse=True), nn.Parameter(torch.ones(3))
            self.fixed = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x):
            return self.table(x) * self.fixed

    model = Table()
    words = torch.arange(ROWS) % 7
    report = check_normalisation(step_of(model, mean_of_means, words), model)
    loss = lambda m, rows: functional.cross_entropy(m(words[rows]), TARGET[rows]) / pieces_of(rows)  # noqa: E731
    model.table.sparse, model.fixed.requires_grad = False, True  # for `expected`; the latter has gradients then
    del model.fixed
    model.fixed = torch.ones(4)
    for line in report.lines[1:]:
        factor, difference = expected(model, loss, line.pieces)
        assert (line.factor, line.difference) == (pytest.approx(factor), pytest.approx(difference))


def test_a_step_that_uses_its_gradient_buffers_again_is_compared():
    model = nn.Linear(8, 4)
    buffers = [torch.zeros_like(parameter) for parameter in model.parameters()]
    inner = step_of(model, mean_of_means)

    def step(pieces):
        for parameter, buffer in zip(model.parameters(), buffers, strict=True):
            parameter.grad = buffer.zero_()
        inner(pieces)

    assert not check_normalisation(step, model).ok


def snapshot(model):
    """Return copies of all that must be the same afterwards."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(dict(vars(module)), list(module._forward_hooks)) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
        (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    )


def assert_same(model, before):
    weights, modules, gradients, states = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert modules == before[1]
    assert all(a is b for a, b in zip(gradients, before[2], strict=True))
    assert states == before[3]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_modes_gradients_buffers_and_random_states_are_restored(fails):
    model = Net(0.5)
    model.register_buffer("calls", torch.zeros(()))
    model.drop.eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    calls = []

    def draw():
        random.random(), np.random.rand(), torch.rand(1)
        model.calls += 1
        model.eval()
        calls.append(1)
        if fails and len(calls) == 3:  # while the bits of the weights are flipped
            raise RuntimeError("out of memory")

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        check_normalisation(step_of(model, mean_of_means, before=draw), model)
    model.modes.clear()
    assert_same(model, before)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(), (1,), (2, 4), (1, 4, 2), (1, 1, 2)])
def test_pieces_that_do_not_increase_from_1_are_an_error(pieces):
    model = Net()
    with pytest.raises(ValueError, match=r"^pieces: expected 1 and larger numbers in increasing order, got \["):
        check_normalisation(step_of(model, mean_of_means), model, pieces)


def test_a_missing_model_and_another_step_are_errors():
    with pytest.raises(TypeError, match=r"^model: expected the nn.Module that step trains, got NoneType$"):
        check_normalisation(step_of(Net(), mean_of_means))
    with pytest.raises(TypeError, match=r"^step: expected a function or a transformers.Trainer, got int$"):
        check_normalisation(3, Net())


def test_a_step_without_gradients_or_with_zero_or_infinite_ones_is_an_error():
    model, other = Net(), Net()
    with pytest.raises(ValueError, match=r"^step: no parameter of the model has a gradient after step\(1\)$"):
        check_normalisation(step_of(other, mean_of_means), model)
    with pytest.raises(ValueError, match=r"^step: the gradient of step\(1\) is zero$"):
        check_normalisation(step_of(model, lambda total, *_: 0 * total), model)
    with pytest.raises(ValueError, match=r"^step: the gradient of step\(4\) is not finite$"):
        check_normalisation(step_of(model, lambda total, a, b, pieces: total / (pieces != 4)), model)


def test_a_random_step_is_an_error():
    model = Net()
    noise = lambda total, *_: total * torch.rand(())  # noqa: E731
    with pytest.raises(ValueError, match=r"^step: expected the same gradient from two runs .* are random$"):
        check_normalisation(step_of(model, noise), model)


def test_a_step_of_the_optimiser_is_an_error():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    inner = step_of(model, global_mean)
    with pytest.raises(ValueError, match=r"^step: step\(1\) changed the weights; expected no step of the optimiser$"):
        check_normalisation(lambda pieces: (inner(pieces), optimizer.step()), model)


# ---- transformers' Trainer ---------------------------------------------------------------------------------------


@pytest.fixture
def no_collection(monkeypatch):
    """Accelerate collects garbage before each training: half a second with transformers loaded."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


def text_rows(labels):
    """Texts of 4 to 12 random tokens; `labels` is "class" or "token" (some tokens, of which the first)."""
    draw = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [draw.randrange(5, 50) for _ in range(draw.randint(4, 12))]
        tokens = [number if k < 2 or draw.random() < 0.3 else -100 for k, number in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": draw.randrange(4) if labels == "class" else tokens})
    return rows


def image_rows(_):
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": k % 4} for k in range(ROWS)]


def collate(rows):
    if "pixel_values" in rows[0]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    length = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, filler: torch.tensor([[*v, *[filler] * (length - len(v))] for v in values])  # noqa: E731
    ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else pad(labels, -100),
    }


def tiny(name):
    """Return a random model with dropout where it has any."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 16, "num_labels": 4, "pad_token_id": 0}
    if name.startswith("Bert"):
        config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    elif name.startswith("Llama"):
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, attention_dropout=0.3)
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=4, layer_type="basic"
        )
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


def trainer_of(name, folder, accumulation=4, bf16=False, **options):
    import transformers

    rows = (image_rows if name.startswith("ResNet") else text_rows)("class" if "Classif" in name else "token")
    args = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        bf16=bf16,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        max_grad_norm=0.0,
        max_steps=1,
    )
    options = {"model": tiny(name), "train_dataset": rows, "data_collator": collate} | options
    return transformers.Trainer(args=args, **options)


def mean_loss(name, batch):
    """Return the loss that the model's forward has without `num_items_in_batch`, from its logits: the mean."""

    def loss_of(model, rows):
        micro = {k: v[rows].double() if v.is_floating_point() else v[rows] for k, v in batch.items()}
        labels = micro.pop("labels")
        logits = model(**micro).logits
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return loss_of


# transformers 5.23: these forwards take **kwargs, so that the Trainer leaves the division to them, and do not divide.
NOT_DIVIDED = [
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "LlamaForSequenceClassification",
    "ResNetForImageClassification",
]


@pytest.mark.usefixtures(no_collection.__name__)
@pytest.mark.parametrize("name", NOT_DIVIDED)
def test_the_trainer_sums_the_means_of_micro_batches(name, tmp_path):
    trainer = trainer_of(name, tmp_path)
    report = check_normalisation(trainer)
    assert not report.ok
    for line in report.lines[1:]:
        factor, difference = expected(trainer.model, mean_loss(name, collate(trainer.train_dataset)), line.pieces)
        assert line.factor == pytest.approx(factor, rel=1e-4) and line.difference == pytest.approx(difference, rel=1e-4)
        if "Classification" in name:  # as many counted rows in each
            assert factor == pytest.approx(line.pieces)
    assert ("the loss is not divided" in str(report)) == ("Classification" in name)


@pytest.mark.usefixtures(no_collection.__name__)
def test_the_trainer_is_ok_with_a_causal_language_model(tmp_path):
    trainer = trainer_of("LlamaForCausalLM", tmp_path)
    means = expected_causal_mean_of_means(trainer)
    assert abs(means - 1) > 0.01  # the rows are ragged
    report = check_normalisation(trainer, pieces=(1, 2, 4, 8))
    assert report.ok and [line.factor for line in report.lines] == pytest.approx([1.0] * 4, rel=1e-5)


def expected_causal_mean_of_means(trainer):
    batch = collate(trainer.train_dataset)

    def loss_of(model, rows):
        logits = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows]).logits
        labels = batch["labels"][rows, 1:]
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()) / pieces_of(rows)

    factor, difference = expected(trainer.model, loss_of, 4)
    return factor + difference


@pytest.mark.usefixtures(no_collection.__name__)
def test_the_report_is_that_of_real_trainings(tmp_path):
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(flat([p.grad for p in model.parameters() if p.grad is not None]))

    name, gradients = "BertForMaskedLM", []
    for accumulation in (1, 4):
        model = tiny(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer_of(name, tmp_path, accumulation, model=model, callbacks=[Record()]).train()
    factor, difference = compared(gradients[1], gradients[0])
    line = check_normalisation(trainer_of(name, tmp_path), pieces=(1, 4)).lines[1]
    assert line.factor == pytest.approx(factor, rel=1e-5) and line.difference == pytest.approx(difference, rel=1e-5)


@pytest.mark.usefixtures(no_collection.__name__)
def test_a_loss_function_of_the_user_is_the_one_that_is_checked(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        total = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / num_items_in_batch

    assert check_normalisation(trainer_of("BertForMaskedLM", tmp_path, compute_loss_func=loss)).ok


def held(accelerator):
    return (
        list(accelerator._models),
        list(accelerator._optimizers),
        list(accelerator.gradient_state.dataloader_references),
    )


@pytest.mark.usefixtures(no_collection.__name__)
@pytest.mark.parametrize("trained", [False, True])
def test_the_trainer_and_its_model_are_unchanged(trained, tmp_path):
    from transformers import TrainerCallback

    class Refuse(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert not checking

    checking = False
    trainer = trainer_of("ResNetForImageClassification", tmp_path, 2, bf16=True, callbacks=[Refuse()])
    if trained:
        trainer.train()
    model = trainer.model
    before, attributes, prepared = snapshot(model), dict(vars(trainer)), held(trainer.accelerator)
    words = {name: repr(getattr(trainer, name)) for name in ("args", "state", "control")}
    config, optimizer = copy.deepcopy(model.config), trainer.optimizer and repr(trainer.optimizer.state_dict())
    checking = True
    report = check_normalisation(trainer, pieces=(1, 4))
    checking = False
    assert report.lines[1].factor == pytest.approx(4, rel=0.1)  # bfloat16
    assert_same(model, before)
    assert vars(trainer).keys() == attributes.keys() and held(trainer.accelerator) == prepared
    assert all(value is attributes[name] for name, value in vars(trainer).items())
    assert words == {name: repr(getattr(trainer, name)) for name in words}
    assert (
        vars(model.config) == vars(config) and (trainer.optimizer and repr(trainer.optimizer.state_dict())) == optimizer
    )
    assert not list(Path(tmp_path, "trainer").glob("checkpoint*"))
    trainer.train()


@pytest.mark.usefixtures(no_collection.__name__)
def test_a_random_collator_is_called_once(tmp_path):
    calls = []

    def mask(rows):
        calls.append(len(rows))
        batch = collate(rows)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
        return batch | {"return_dict": True}

    assert not check_normalisation(trainer_of("BertForMaskedLM", tmp_path, data_collator=mask)).ok
    assert calls == [ROWS]


@pytest.mark.usefixtures(no_collection.__name__)
def test_batches_that_cannot_be_cut_and_a_second_model_are_errors(tmp_path):
    name = "BertForSequenceClassification"
    trainer = trainer_of(name, tmp_path)
    with pytest.raises(TypeError, match=r"^model: expected None with a Trainer, got BertForSequenceClassification$"):
        check_normalisation(trainer, trainer.model)
    expected_rows = math.lcm(1, 32)
    with pytest.raises(ValueError, match=rf"^step: expected {expected_rows} rows .*, got 16 in 'input_ids'$"):
        check_normalisation(trainer, pieces=(1, 32))
    packed = lambda rows: {"input_ids": torch.tensor([[number for row in rows for number in row["input_ids"]]])}  # noqa: E731
    with pytest.raises(ValueError, match=r"^step: expected 16 rows .*, got 1 in 'input_ids'$"):
        check_normalisation(trainer_of(name, tmp_path, data_collator=packed))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"^step: expected a Trainer on one process and device .* n_gpu=2$"):
        check_normalisation(trainer)


def test_a_report_is_ok_if_all_its_lines_are():
    lines = (Normalisation(1, 1.0, 0.0, 1e-6), Normalisation(2, 1.0, 1e-6, 1e-6))
    assert NormalisationReport(lines).ok
    assert not NormalisationReport((*lines, Normalisation(4, 1.0, 2e-6, 1e-6))).ok
