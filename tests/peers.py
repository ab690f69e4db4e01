"""What the tests of peers' mistakes share: losses as functions of logits, and the runs of each loss."""

from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import NamedTuple

import harness
import pytest
import torch
import torch.nn.functional as F

import tlkernels as tlk
from tlkernels._core import triton


class Run(NamedTuple):
    """A target, and for a linear loss in Triton the strategy."""

    target: harness.Target
    strategy: str = ""

    def __str__(self) -> str:
        return f"{self.target}-{self.strategy}" if self.strategy else str(self.target)


def runs(loss):
    """Return the runs of a loss on this machine."""
    made = [Run(target) for target in harness.targets(loss=loss) if target != harness.Target("triton")]
    if triton.available():
        strategies = ("chunks", "lean") if loss.startswith("linear_") else ("",)
        made += [Run(harness.Target("triton"), strategy) for strategy in strategies]
    return made


@contextmanager
def running(run):
    """Use the target and the strategy within the block; yields the name for `impl=`."""
    with ExitStack() as stack:
        if run.strategy:
            from tlkernels._core.triton import linear

            stack.enter_context(linear.forced(run.strategy))
        yield stack.enter_context(harness.forced(run.target))


def takes(loss, option):
    """Return whether the loss of that name has the option."""
    return option in signature(getattr(tlk, loss)).parameters


def over(losses, which=lambda run: True, slow=lambda loss, run: False):
    """Parametrise by each of the losses and its runs; those that are slow are not in the quick part."""
    return pytest.mark.parametrize(
        ("loss", "run"),
        [
            pytest.param(loss, run, id=f"{loss}-{run}", marks=[pytest.mark.full] if slow(loss, run) else [])
            for loss in losses
            for run in runs(loss)
            if which(run)
        ],
    )


# A linear layer whose input is the identity has the transposed logits as its weight: no product rounds anything, and
# the gradient of the weight is the gradient of the logits.


def _linear_cross_entropy(logits, target, **options):
    return tlk.linear_cross_entropy(torch.eye(len(logits), dtype=logits.dtype), logits.t(), target, **options)


def _hard(logits, target, **options):
    return tlk.distillation(logits, torch.zeros_like(logits), target, hard_weight=1.0, **options)


def _linear_hard(logits, target, **options):
    eye = torch.eye(len(logits), dtype=logits.dtype)
    teacher = torch.zeros_like(logits.t())
    return tlk.linear_distillation(eye, logits.t(), eye, teacher, target, hard_weight=1.0, **options)


def _info_nce(logits, target, **options):
    return tlk.info_nce(logits, torch.eye(logits.shape[1], dtype=logits.dtype), target, **options)


HARD_LOSSES = {
    "cross_entropy": tlk.cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "distillation": _hard,
    "linear_distillation": _linear_hard,
    "info_nce": _info_nce,
}
"""Losses as functions of (logits, class indices) that equal the cross entropy."""


def _distillation(student, teacher, biases=(0, 0), **options):
    return tlk.distillation(student + biases[0], teacher + biases[1], **options)


def _linear_distillation(student, teacher, biases=(None, None), **options):
    eye = torch.eye(len(student), dtype=student.dtype)
    biases = dict(zip(("student_bias", "teacher_bias"), biases, strict=True))
    return tlk.linear_distillation(eye, student.t(), eye, teacher.t(), **biases, **options)


DIVERGENCES = {"distillation": _distillation, "linear_distillation": _linear_distillation}
"""Losses as functions of (student's logits, teacher's logits); biases are added to the logits."""

CAPPED = {name: loss for name, loss in HARD_LOSSES.items() if takes(name, "softcap")}
"""Those of HARD_LOSSES that have a softcap. Distillation caps the logits of its divergence, not of its hard part."""


def _linear_selected(logits, index, **options):
    eye = torch.eye(len(logits), dtype=logits.dtype)
    return tlk.linear_selective_log_softmax(eye, logits.t(), index, **options)


SELECTED = {"selective_log_softmax": tlk.selective_log_softmax, "linear_selective_log_softmax": _linear_selected}
"""Log-probabilities as functions of (logits, class indices)."""


def gradient(loss, run, *logits, upstream=1.0, **options):
    """Return the loss, and the gradient of the first logits."""
    leaf = logits[0].detach().clone().requires_grad_()
    with running(run) as impl:
        value = loss(leaf, *logits[1:], impl=impl, **options)
        (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream))
    return value.detach(), grad


def right(loss, *logits, **options):
    """Return the same of PyTorch lines in float64."""
    leaf = logits[0].detach().double().requires_grad_()
    value = loss(leaf, *(x.double() if x.is_floating_point() else x for x in logits[1:]), **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


exact_cross_entropy = partial(right, F.cross_entropy)


def rounded_once(result, exact, dtype, slack=1e-6):
    """Raise AssertionError unless each element is within one rounding of the exact value.

    `slack` is the error of the arithmetic in float32.
    """
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=slack)
