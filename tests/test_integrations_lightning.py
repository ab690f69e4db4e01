"""Lightning: the mean over the rows of a whole step, and `tlkernels.cross_entropy` as a drop-in."""

import logging
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import GradientAccumulationScheduler  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy  # noqa: E402

import tlkernels as tlk  # noqa: E402
from tlkernels.integrations.lightning import WholeBatchMean, whole_batch_mean  # noqa: E402

ROWS, WIDTH, CLASSES = 6, 5, 7
COUNTED = [6, 1, 0, 3, 2, 5, 4, 1, 6, 2]  # of the ten micro-batches


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    environment = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)
    if dist.is_initialized():  # DDP that is refused when the fit starts has a process group already
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def batches(counted=COUNTED, dtype=torch.float64):
    """Micro-batches of six rows, of which the given numbers count."""
    draw = torch.Generator().manual_seed(0)
    data = []
    for count in counted:
        target = torch.randint(CLASSES, (ROWS,), generator=draw)
        target[torch.randperm(ROWS, generator=draw)[count:]] = -100
        data.append((torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64).to(dtype), target))
    return data


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


class Kept(torch.optim.SGD):
    """SGD that keeps the gradients of its steps, as they are after the clipping."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.kept = []
        self.register_step_post_hook(lambda *_: self.kept.append(flat(self.param_groups[0]["params"])))


def flat(parameters):
    return torch.cat([p.grad.flatten() for p in parameters]).clone()


class Module(L.LightningModule):
    """`loss_of(module, logits, target)` is the loss of a step."""

    def __init__(self, loss_of, dtype=torch.float64):
        super().__init__()
        self.network, self.loss_of, self.losses, self.validation = network(dtype), loss_of, [], []

    def training_step(self, batch, batch_idx):
        loss = self.loss_of(self, self.network(batch[0]), batch[1])
        if loss is not None:
            self.losses.append(loss.detach())
            self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validation.append(self.loss_of(self, self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        self.optimizer = Kept(self.parameters(), lr=0.5)
        return self.optimizer


def ours(module, logits, target):
    return whole_batch_mean(module, tlk.cross_entropy(logits, target, reduction="sum"), (target != -100).sum())


def fit(module, data, callbacks=None, epochs=1, validation=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[WholeBatchMean()] if callbacks is None else callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1} | options,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, validation and torch.utils.data.DataLoader(validation, batch_size=None))
    return trainer


def windows(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def whole_batches(groups, clip=None):
    """Return the gradients of the steps of plain PyTorch, where each group of micro-batches is one batch."""
    model = network()
    optimizer = Kept(model.parameters(), lr=0.5)
    for group in groups:
        x, target = (torch.cat(tensors) for tensors in zip(*group, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.stack(optimizer.kept)


def assert_same(found, expected):
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 10, 16])
def test_gradients_are_those_of_the_whole_batch_with_an_incomplete_last_window(accumulation):
    module = Module(ours)
    fit(module, batches(), accumulate_grad_batches=accumulation)
    assert_same(module.optimizer.kept, whole_batches(windows(batches(), accumulation)))


def test_the_mean_of_micro_batches_has_other_gradients():
    module = Module(lambda module, logits, target: F.cross_entropy(logits, target).nan_to_num())
    fit(module, batches(), [], accumulate_grad_batches=4)
    expected = whole_batches(windows(batches(), 4))
    assert ((module.optimizer.kept[0] - expected[0]).norm() / expected[0].norm()) > 0.2


def test_the_last_window_of_lightning_is_divided_by_the_whole_number():
    """Of ten micro-batches with equal counts, the two of the last window are divided by four: half the gradient."""
    data = batches([4] * 10)
    module = Module(lambda module, logits, target: F.cross_entropy(logits, target))
    fit(module, data, [], accumulate_grad_batches=4)
    expected = whole_batches(windows(data, 4))
    torch.testing.assert_close(torch.stack(module.optimizer.kept[:2]), expected[:2], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(module.optimizer.kept[2], expected[2] / 2, rtol=1e-9, atol=1e-14)


def test_the_number_of_micro_batches_may_change_between_epochs():
    module = Module(ours)
    schedule = GradientAccumulationScheduler({0: 4, 1: 3, 2: 1})
    fit(module, batches(), [schedule, WholeBatchMean()], epochs=3)
    groups = [group for size in (4, 3, 1) for group in windows(batches(), size)]
    assert_same(module.optimizer.kept, whole_batches(groups))


def test_the_number_of_micro_batches_may_change_within_a_window():
    class Change(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.accumulate_grad_batches = 4 if batch_idx < 2 else 3

    module = Module(ours)
    fit(module, batches()[:3], [Change(), WholeBatchMean()])
    assert_same(module.optimizer.kept, whole_batches([batches()[:3]]))


@pytest.mark.parametrize("counted", [[3, 5, 0, 0, 2, 1], [0, 0, 3, 5, 2, 1]])
def test_a_window_without_counted_rows_has_zero_gradients_and_losses(counted):
    module = Module(ours)
    fit(module, batches(counted), accumulate_grad_batches=2)
    kept, empty = module.optimizer.kept, counted.index(0) // 2
    assert [bool(gradient.any()) for gradient in kept] == [k != empty for k in range(3)]
    assert [float(loss) for loss in module.losses[2 * empty :][:2]] == [0, 0]
    assert_same(kept, whole_batches(windows(batches(counted), 2)))


def test_gradients_are_clipped_after_they_are_scaled():
    module = Module(ours)
    fit(module, batches(), accumulate_grad_batches=4, gradient_clip_val=0.1)
    assert_same(module.optimizer.kept, whole_batches(windows(batches(), 4), clip=0.1))
    norms = torch.stack(module.optimizer.kept).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 0.1, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_loss_of_a_step_is_the_mean_of_its_micro_batch():
    module = Module(ours)
    trainer = fit(module, batches(), accumulate_grad_batches=16, validation=batches())
    model = network()
    means = torch.stack([F.cross_entropy(model(x), target).nan_to_num() for x, target in batches()])
    torch.testing.assert_close(torch.stack(module.losses), means.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(trainer.logged_metrics["loss"], means[-1].detach(), rtol=1e-9, atol=0)
    after = torch.stack([F.cross_entropy(module.network(x), target).nan_to_num() for x, target in batches()])
    torch.testing.assert_close(torch.stack(module.validation[-10:]), after, rtol=1e-9, atol=0)
    plain = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)  # without the callback
    plain.validate(module, torch.utils.data.DataLoader(batches(), batch_size=None), verbose=False)
    torch.testing.assert_close(torch.stack(module.validation[-10:]), after, rtol=1e-9, atol=0)


def test_class_weights_are_counted_as_the_mean_of_pytorch_counts_them():
    weight = torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)

    def weighted(module, logits, target):
        total = tlk.cross_entropy(logits, target, weight, reduction="sum")
        return whole_batch_mean(module, total, torch.where(target >= 0, weight[target.clamp(min=0)], 0).sum())

    module, model = Module(weighted), network()
    fit(module, batches(), accumulate_grad_batches=16)
    x, target = (torch.cat(tensors) for tensors in zip(*batches(), strict=True))
    F.cross_entropy(model(x), target, weight).backward()
    assert_same(module.optimizer.kept, flat(model.parameters()).unsqueeze(0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_precision_plugins(precision):
    module = Module(ours, torch.float32)
    fit(module, batches(dtype=torch.float32), accumulate_grad_batches=4, precision=precision)
    found, expected = torch.stack(module.optimizer.kept).double(), whole_batches(windows(batches(), 4))
    assert ((found[0] - expected[0]).norm() / expected[0].norm()) < 0.02
    assert module.losses[0].dtype == torch.float32


def test_a_scaler_has_unscaled_the_gradients():
    """Here on a CPU; `Trainer(precision="16-mixed")` makes the same plugin on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Module(ours, torch.float32)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    data = batches(dtype=torch.float32)
    fit(module, data, accumulate_grad_batches=4, plugins=[plugin], gradient_clip_val=0.1)
    found, expected = torch.stack(module.optimizer.kept).double(), whole_batches(windows(batches(), 4), clip=0.1)
    assert scaler.get_scale() == 2.0**10 and len(found) == 3
    assert ((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_factor_is_not_rounded_to_the_gradients_dtype(dtype):
    from tlkernels.integrations.lightning import _scale

    for shape in ((64,), (), (3, 4)):
        grad = torch.rand(shape, dtype=torch.float64).to(dtype)
        expected = (grad.double() * (1 / 3)).to(dtype)
        _scale(grad, torch.tensor(1 / 3, dtype=torch.float64))
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=0)


def test_sparse_gradients_are_scaled():
    class Sparse(Module):
        def __init__(self, loss_of, sparse):
            super().__init__(loss_of)
            self.network = nn.Embedding(9, CLASSES, sparse=sparse, dtype=torch.float64)
            self.grads = []

        def on_before_optimizer_step(self, optimizer):
            self.grads.append(self.network.weight.grad.to_dense().clone())

    ids = torch.randint(9, (10, ROWS), generator=torch.Generator().manual_seed(0))
    data = [(row, target) for row, (_, target) in zip(ids, batches(), strict=True)]
    modules = []
    for sparse in (True, False):
        torch.manual_seed(0)
        modules.append(Sparse(ours, sparse))
        modules[-1].configure_optimizers = lambda module=modules[-1]: torch.optim.SGD(module.parameters(), lr=0.5)
        fit(modules[-1], data, accumulate_grad_batches=4)
    torch.testing.assert_close(*(torch.stack(module.grads) for module in modules), rtol=1e-9, atol=1e-14)


class OfRank(Module):
    """Process r of n takes rows r, r + n, ... of each micro-batch."""

    def training_step(self, batch, batch_idx):
        part = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return super().training_step(tuple(tensor[part] for tensor in batch), batch_idx)

    def on_train_end(self):
        torch.save(self.optimizer.kept, self.folder / f"{self.trainer.global_rank}.pt")


def test_two_processes(tmp_path):
    """Forked; their micro-batches have different numbers of counted rows, and one of a process has none."""
    if sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    module = OfRank(ours)
    module.folder = tmp_path
    data = batches()[5:] + batches()[:5]  # of the first, three rows count in one process and two in the other
    fit(module, data, accumulate_grad_batches=4, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    for rank in range(2):
        kept = torch.load(tmp_path / f"{rank}.pt")
        assert_same(kept, whole_batches(windows(data, 4)))


def test_skipped_steps_and_unfinished_windows_leave_nothing_behind():
    """In the first epoch the second step returns None, and the second window ends before its step."""
    seen = []

    def some(module, logits, target):
        seen.append(loss := ours(module, logits, target))
        return None if len(seen) == 2 else loss

    class Stops(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.trainer.current_epoch == 0 and batch_idx == 7 else None

    module, data = Stops(some), batches()
    fit(module, data, epochs=2, accumulate_grad_batches=4)
    assert len(seen) == 17
    assert_same(module.optimizer.kept, whole_batches([[data[0], *data[2:4]], *windows(data, 4)]))


def test_as_a_drop_in_the_training_is_that_of_pytorchs_loss():
    weights = []
    for loss in (F.cross_entropy, tlk.cross_entropy):
        module = Module(lambda module, logits, target, loss=loss: loss(logits, target, label_smoothing=0.1))
        fit(module, batches([3] * 10), [], epochs=3, accumulate_grad_batches=2, gradient_clip_val=0.5)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert (weights[0] - torch.cat([p.detach().flatten() for p in network().parameters()])).norm() > 0.5
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-14)


# ---- what is refused ---------------------------------------------------------------------------------------------


def manual(module):
    module.automatic_optimization = False
    return module


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: manual(Module(ours)), {}, r"Module.automatic_optimization: expected True, got False"),
        (lambda: Module(ours), {"callbacks": [WholeBatchMean(), WholeBatchMean()]}, "one WholeBatchMean, got 2"),
        (
            lambda: Module(ours),
            {"strategy": DDPStrategy(process_group_backend="gloo", ddp_comm_hook=print), "devices": 1},
            "ddp_comm_hook: expected None, which averages gradients over all processes, got <built-in function print>",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused_when_the_fit_starts(make, options, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        fit(module, batches(), **options)
    assert not module.losses


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            FSDPStrategy,
            "strategy: expected SingleDeviceStrategy or DDPStrategy, got FSDPStrategy, .*'ddp'",
        ),
        (lambda: DDPStrategy(process_group="pairs"), "process_group: expected None, .* got pairs"),
    ],
)
def test_other_strategies_are_refused(strategy, message):
    """FSDP needs a GPU, and DDP that group, so the hook is called alone."""
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback := WholeBatchMean()], logger=False)
    trainer._accelerator_connector.strategy = strategy()
    with pytest.raises(ValueError, match=message):
        callback.on_fit_start(trainer, Module(ours))


def test_a_missing_callback_or_call_is_an_error():
    with pytest.raises(ValueError, match="callbacks: expected the Trainer to have one WholeBatchMean, got 0"):
        fit(Module(ours), batches(), [])
    plain = Module(lambda module, logits, target: F.cross_entropy(logits, target))
    with pytest.raises(RuntimeError, match=r"Module.training_step: expected it to return whole_batch_mean\(...\)"):
        fit(plain, batches())


def test_a_second_backward_after_the_step_is_an_error():
    module = Module(ours)
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), max_iter=3)
    fit(module, batches([3] * 4))
    with pytest.raises(RuntimeError, match="expected gradients to be set to zero after a step, got another backward"):
        fit(module, batches([3] * 4), accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("total", "count", "error", "message"),
    [
        (1.0, 1, TypeError, "total: expected a Tensor, got float"),
        (torch.ones(2), 1, ValueError, r"total: expected shape \(\), a loss with reduction='sum', got \(2,\)"),
        (torch.ones(()), None, TypeError, "num_valid: expected a number or a Tensor, got NoneType"),
        (torch.ones(()), True, TypeError, "num_valid: expected a number or a Tensor, got bool"),
        (torch.ones(()), torch.ones(2), ValueError, r"num_valid: expected shape \(\), got \(2,\)"),
    ],
)
def test_bad_arguments(total, count, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        whole_batch_mean(Module(ours), total, count)
