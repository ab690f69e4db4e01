"""timm's criteria and tasks and ours: the same values and gradients, in its tasks and after patch()."""

import copy
import pickle
import subprocess
import sys
import types

import pytest
import timm
import timm.loss
import timm.task
import torch
from timm.data import Mixup
from timm.loss import _loss_factory, cross_entropy
from torch import nn

import tlkernels as tlk
from tlkernels.integrations import timm as ours

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 11


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    ours.unpatch()


def logits(*shape, dtype=torch.float64):
    return (3 * torch.randn(*shape, CLASSES, dtype=torch.float64)).to(dtype).requires_grad_()


def value_and_gradient(criterion, x, target):
    loss = criterion(x, target)
    return loss.detach(), *torch.autograd.grad(loss, x)


def assert_same(mine, theirs, x, target, rtol=1e-10):
    found, expected = value_and_gradient(mine, x, target), value_and_gradient(theirs, x, target)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_has_their_values_and_gradients(smoothing):
    mine, theirs = ours.LabelSmoothingCrossEntropy(smoothing), cross_entropy.LabelSmoothingCrossEntropy(smoothing)
    assert isinstance(mine, cross_entropy.LabelSmoothingCrossEntropy)
    assert_same(mine, theirs, logits(9), torch.randint(CLASSES, (9,)))


def test_label_smoothing_has_their_default():
    assert ours.LabelSmoothingCrossEntropy().smoothing == cross_entropy.LabelSmoothingCrossEntropy().smoothing


@pytest.mark.parametrize("shape", [(9,), (2, 4), ()], ids=str)
def test_soft_targets_have_their_values_and_gradients(shape):
    mine, theirs = ours.SoftTargetCrossEntropy(), cross_entropy.SoftTargetCrossEntropy()
    assert isinstance(mine, cross_entropy.SoftTargetCrossEntropy)
    target = torch.rand(*shape, CLASSES, dtype=torch.float64)  # the rows do not sum to 1
    assert_same(mine, theirs, logits(*shape), target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_targets_have_their_values_and_gradients(smoothing):
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=CLASSES)
    _, target = mixup(torch.randn(8, 3, 16, 16), torch.randint(CLASSES, (8,)))
    x = logits(8, dtype=torch.float32)
    assert_same(ours.SoftTargetCrossEntropy(), cross_entropy.SoftTargetCrossEntropy(), x, target, rtol=1e-5)


def test_what_timm_does_not_ignore_is_not_ignored():
    target = torch.tensor([1, -100])
    for criterion in (cross_entropy.LabelSmoothingCrossEntropy(), ours.LabelSmoothingCrossEntropy()):
        with pytest.raises((IndexError, RuntimeError), match=r"-100|out of (range|bounds)"):
            criterion(logits(2), target)


def test_a_confidence_that_does_not_fit_is_refused():
    criterion = ours.LabelSmoothingCrossEntropy(0.1)
    criterion.smoothing = 0.3
    with pytest.raises(ValueError, match=r"confidence: expected 1 - smoothing = 0.7, got 0.9"):
        criterion(logits(2), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        ours.LabelSmoothingCrossEntropy(1.0)  # timm's own check


def test_shapes_that_would_mean_something_else_are_refused():
    with pytest.raises(ValueError, match="x: expected shape"):
        ours.LabelSmoothingCrossEntropy()(logits(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target: expected the logits' shape"):
        ours.SoftTargetCrossEntropy()(logits(2), torch.rand(CLASSES))
    with pytest.raises(TypeError, match="target: expected class probabilities"):
        ours.SoftTargetCrossEntropy()(logits(2), torch.ones(2, CLASSES, dtype=torch.int64))


OPTIONS = {
    "plain": ({}, tlk.CrossEntropyLoss),
    "smoothing": ({"smoothing": 0.2}, ours.LabelSmoothingCrossEntropy),
    "soft": ({"soft_targets": True, "smoothing": 0.2}, ours.SoftTargetCrossEntropy),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_their_factory_of_criteria_gives_ours(name):
    options, kind = OPTIONS[name]
    mine, theirs = ours.create_classification_loss(**options), _loss_factory.create_classification_loss(**options)
    assert type(mine) is kind and type(theirs) is not kind
    target = torch.rand(9, CLASSES).double() if name == "soft" else torch.randint(CLASSES, (9,))
    assert_same(mine, theirs, logits(9), target)


OTHERS = {
    "bce": {}, "asl": {}, "poly": {}, "jsd": {"jsd_splits": 3}, "twoway": {"multi_label": True},
    "zlpr": {"multi_label": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_criteria_stay_timms(name):
    made = ours.create_classification_loss(loss_type=name, **OTHERS[name])
    assert type(made).__module__.startswith("timm.")
    assert type(made) is type(_loss_factory.create_classification_loss(loss_type=name, **OTHERS[name]))


def model(name="test_vit", seed=0):
    torch.manual_seed(seed)
    options = {"num_classes": CLASSES, "img_size": 32} if "vit" in name or "deit" in name else {"num_classes": CLASSES}
    made = timm.create_model(name, pretrained=False, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def deit(seed=0):
    torch.manual_seed(seed)
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    made = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, **small).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def images():
    return torch.randn(5, 3, 32, 32, dtype=torch.float64), torch.randint(CLASSES, (5,))


def steps(task, batches):
    """Train for two steps; return what the task said in each, and the parameters."""
    optimizer, said = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05), []
    for input, target in batches:
        result = task(input, target)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        said.append({name: value.detach() for name, value in result.items()})
    return said, {name: value.detach() for name, value in task.get_trainable_module().named_parameters()}


def assert_trained_alike(mine, theirs):
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_distillation_trains_the_same_student(weights, temperature):
    batches, runs = [images(), images()], []
    for kind in (ours.LogitDistillationTask, timm.task.LogitDistillationTask):
        task = kind(model(seed=1), model(seed=2), nn.CrossEntropyLoss(), temperature=temperature, verbose=False,
                    dtype=torch.float64, **weights)  # fmt: skip
        runs.append(steps(task, batches))
    assert issubclass(ours.LogitDistillationTask, timm.task.LogitDistillationTask)
    assert runs[0][0][0]["kd_loss"] > 0
    assert_trained_alike(*runs)


@pytest.mark.parametrize("distill_type", ["soft", "hard"])
def test_token_distillation_trains_the_same_student(distill_type):
    batches, runs = [images(), images()], []
    for kind in (ours.TokenDistillationTask, timm.task.TokenDistillationTask):
        task = kind(deit(1).train(), model(seed=2), nn.CrossEntropyLoss(), distill_type=distill_type, temperature=3.0,
                    task_loss_weight=0.5, verbose=False, dtype=torch.float64)  # fmt: skip
        runs.append(steps(task, batches))
    assert runs[0][0][0]["distill_loss"] > 0
    assert_trained_alike(*runs)


def test_the_teacher_normalises_its_images_as_theirs_does():
    teacher = model(seed=2)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)}
    batches = [images()]
    found, expected = (
        steps(kind(model(seed=1), teacher, nn.CrossEntropyLoss(), verbose=False, dtype=torch.float64), batches)
        for kind in (ours.LogitDistillationTask, timm.task.LogitDistillationTask)
    )
    assert_trained_alike(found, expected)


def test_a_temperature_that_is_not_above_zero_is_refused():
    task = ours.LogitDistillationTask(model(), model(), nn.CrossEntropyLoss(), temperature=0.0, verbose=False,
                                      dtype=torch.float64)  # fmt: skip
    with pytest.raises(ValueError, match="temperature"):
        task(*images())


def test_logits_of_another_shape_are_refused():
    student = model()
    student.forward = lambda x: torch.randn(2, 3, CLASSES)
    task = ours.LogitDistillationTask(student, model(), lambda output, target: output.sum(), verbose=False,
                                      dtype=torch.float64)  # fmt: skip
    with pytest.raises(ValueError, match="student logits: expected shape"):
        task(*images())


def test_patch_gives_timms_tasks_our_criteria_and_unpatch_takes_them_back():
    batches, runs, kinds = [images(), images()], [], []
    for do in (ours.patch, ours.unpatch):
        do()
        do()  # doing it again does nothing
        task = timm.task.ClassificationTask(model(), criterion_kwargs={"smoothing": 0.1}, verbose=False)
        kinds.append(type(task.criterion))
        runs.append(steps(task, batches))
    assert kinds == [ours.LabelSmoothingCrossEntropy, cross_entropy.LabelSmoothingCrossEntropy]
    assert_trained_alike(*runs)


def test_patch_replaces_every_name_that_a_script_imports():
    names = ("LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy", "create_classification_loss")
    before = [getattr(timm.loss, name) for name in names]
    ours.patch()
    assert [getattr(timm.loss, name) for name in names] == [getattr(ours, name) for name in names]
    assert timm.task.LogitDistillationTask is ours.LogitDistillationTask
    assert timm.task.TokenDistillationTask is ours.TokenDistillationTask
    assert timm.loss.JsdCrossEntropy(smoothing=0.1)(logits(9), torch.randint(CLASSES, (9,))).isfinite()
    assert timm.loss.LabelSmoothingCrossEntropy(0.3).smoothing == 0.3  # its constructor is timm's
    ours.unpatch()
    assert [getattr(timm.loss, name) for name in names] == before


def test_patch_after_a_script_has_imported_the_names_raises():
    script = types.ModuleType("their_script")
    exec("from timm.loss import LabelSmoothingCrossEntropy", vars(script))
    sys.modules["their_script"] = script
    try:
        with pytest.raises(RuntimeError, match="their_script has imported LabelSmoothingCrossEntropy"):
            ours.patch()
        assert timm.loss.SoftTargetCrossEntropy is cross_entropy.SoftTargetCrossEntropy  # nothing is half done
    finally:
        del sys.modules["their_script"]


SCRIPT = """
from tlkernels.integrations.timm import patch; patch()
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask
task = ClassificationTask(torch.nn.Identity(), criterion_kwargs={"smoothing": 0.1})
for kind in (LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, LogitDistillationTask, type(task.criterion)):
    print(kind.__module__)
"""


def test_the_first_line_of_a_script_is_enough():
    run = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [ours.__name__] * 4


def test_criteria_are_copied_and_pickled():
    x, target = logits(4), torch.randint(CLASSES, (4,))
    criterion = ours.LabelSmoothingCrossEntropy(0.2)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_same(other, criterion, x, target, rtol=0)


def test_under_autocast_the_loss_is_float32():
    x, target = logits(4, dtype=torch.bfloat16), torch.randint(CLASSES, (4,))
    losses = ours.LabelSmoothingCrossEntropy(), ours.SoftTargetCrossEntropy()
    wide = cross_entropy.LabelSmoothingCrossEntropy(), cross_entropy.SoftTargetCrossEntropy()
    for mine, theirs, y in zip(losses, wide, (target, torch.rand(4, CLASSES)), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            found = mine(x, y)
        torch.testing.assert_close(found, theirs(x.float(), y), rtol=1e-6, atol=0)
