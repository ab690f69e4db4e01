"""Mistakes of other libraries in linear losses, which compute logits in chunks of rows: sums, chunk sizes, the layer.

Each test also makes the mistake, and sees that it would fail.
"""

import harness
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import pytorch as divergence_of
from peers import over, running

import tlkernels as tlk

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("poisoned_memory")]
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
FEATURES, CLASSES = 4, 8


def linear_cross_entropy(input, weight, bias, target, impl):
    return tlk.linear_cross_entropy(input, weight, target, linear_bias=bias, impl=impl)


def linear_distillation(input, weight, bias, target, impl):
    eye = torch.eye(CLASSES, dtype=input.dtype)
    teacher = (4 * eye)[target]  # sure of the target
    return tlk.linear_distillation(input, weight, teacher, eye, student_bias=bias, impl=impl)


def divergence(logits, target):
    return divergence_of(logits, (4 * torch.eye(CLASSES, dtype=logits.dtype))[target])


LOSSES = {
    "linear_cross_entropy": (linear_cross_entropy, F.cross_entropy),
    "linear_distillation": (linear_distillation, divergence),
}
"""Ours, a function of the layer, and PyTorch's, a function of the logits."""


def chunked(run):
    """Return whether the logits of a run are computed in chunks of rows."""
    return run.strategy != "lean" and run.target.impl != "reference"


def least(run):
    """Return the least number of rows in a chunk."""
    return {harness.CUDA_HOST: 128, "cuda": 128}.get(run.target.isa, 16 if run.target.impl == "triton" else 1)


def chunks_of(rows, loss, run, dtype, monkeypatch):
    """Make the chunks of a call have so many rows; on a GPU it is rounded up."""
    from tlkernels._core.triton import linear

    both = loss == "linear_distillation" and least(run) == 1  # the CPU counts the teacher's logits too
    size = rows * CLASSES * dtype.itemsize * (1 + both)
    monkeypatch.setenv("TLKERNELS_CHUNK_BYTES", str(size))
    monkeypatch.setattr(linear, "_MACHINES", tuple(machine._replace(chunk=size) for machine in linear._MACHINES))


def layer(rows, dtype, seed=0):
    """Return input, weight, bias and targets; the weight's gradient is a sum of terms of one sign."""
    generator = harness.generator(seed)
    input = 1 + torch.rand(rows, FEATURES, generator=generator)
    weight = torch.randn(CLASSES, FEATURES, generator=generator) / 4
    bias = torch.randn(CLASSES, generator=generator) / 4
    often = torch.rand(rows, generator=generator) < 0.75
    target = torch.randint(CLASSES, (rows,), generator=generator).masked_fill(often, 0)
    return input.to(dtype), weight.to(dtype), bias.to(dtype), target


def gradients(loss, input, weight, bias, target):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (input, weight, bias)]
    value = loss(*leaves, target)
    return value.detach(), *torch.autograd.grad(value, leaves)


def ours(name, run):
    """Return the loss of that name as a function of the layer and the target."""

    def loss(*arguments):
        with running(run) as impl:
            return LOSSES[name][0](*arguments, impl=impl)

    return loss


def dense(name):
    """Return the PyTorch lines of the loss of that name as a function of the layer and the target."""
    return lambda input, weight, bias, target: LOSSES[name][1](F.linear(input, weight, bias), target)


def widened(*tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def error(result, exact):
    """Return the largest error, relative to the largest value."""
    return float((result.double() - exact).abs().max() / exact.abs().max())


def summed_in_16_bits(name, size):
    """Return the weight's gradient with the mistake: the gradients of chunks are added in 16 bits."""

    def by_weight(input, weight, bias, target):
        logits = F.linear(*widened(input, weight, bias)).requires_grad_()
        (slopes,) = torch.autograd.grad(LOSSES[name][1](logits, target), logits)
        total = torch.zeros_like(weight)
        for part in torch.einsum(
            "krc, krf -> kcf", slopes.unflatten(0, (-1, size)), input.double().unflatten(0, (-1, size))
        ):
            total += part.to(total.dtype)
        return total

    return by_weight


@over(LOSSES, chunked)
def test_the_weights_gradient_is_summed_in_float32(loss, run, monkeypatch):
    """A sum in bfloat16 loses every chunk that is below its last digit (axolotl #1601, TRL)."""
    size = least(run)
    input, weight, bias, target = layer(17 * size, BF16)
    input[:size] *= 600  # a chunk after the first adds less than half of the last digit
    given = input, torch.zeros_like(weight), bias, target
    chunks_of(size, loss, run, BF16, monkeypatch)
    _, _, by_weight, by_bias = gradients(ours(loss, run), *given)
    exact = gradients(dense(loss), *widened(*given))
    allowed = torch.finfo(BF16).eps  # the rounding of the logits' gradients, and of the result
    assert error(by_weight, exact[2]) < allowed
    assert error(by_bias, exact[3]) < allowed
    assert error(summed_in_16_bits(loss, size)(*given), exact[2]) > 2 * allowed


def products(function):
    """Return how many matrix products a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events())


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@over(LOSSES, chunked)
def test_the_chunk_size_changes_nothing_but_roundings(loss, run, dtype, monkeypatch):
    """In Liger the chunk size decided whether a bfloat16 run converges (Liger #1472)."""
    step = least(run)
    given = layer(3 * step + 3, dtype)
    exact = gradients(dense(loss), *widened(*given))
    made = []
    for size in (step, 2 * step, 10 * step):
        chunks_of(size, loss, run, dtype, monkeypatch)
        made.append(products(lambda: gradients(ours(loss, run), *given)))
        for result, expected in zip(gradients(ours(loss, run), *given), exact, strict=True):
            allowed = 1e-13 if dtype == F64 else 4e-6 if dtype == F32 else 2 * torch.finfo(BF16).eps
            assert error(result, expected) < allowed
    assert made[0] > made[1] > made[2], "the number of chunks"


def entropies(by_weight, steps, input, weight, bias, target):
    """Return the mean entropy of the predictions after each step of SGD with a float32 weight."""
    weight, found = weight.float(), []
    for _ in range(steps):
        weight = weight - 0.25 * by_weight(input, weight.to(input.dtype), bias, target).float()
        log_p = F.linear(*widened(input, weight, bias)).log_softmax(1)
        found.append(-(log_p.exp() * log_p).sum(1).mean())
    return torch.stack(found)


@over(["linear_cross_entropy"], chunked)
def test_the_entropy_of_a_bfloat16_run_follows_float32(loss, run, monkeypatch):
    """Each step's error looked right, and over dozens of steps the entropy left the float32 run (TRL)."""
    size = least(run)
    steps, chunks = {1: (24, 128), 16: (6, 8), 128: (24, 8)}[size]  # those of a GPU are slow on the host
    given = layer(chunks * size, BF16)
    chunks_of(size, loss, run, BF16, monkeypatch)

    def drift(by_weight):
        input, weight, bias, target = given
        right = entropies(lambda *a: gradients(dense(loss), *a)[2], steps, input.float(), weight, bias.float(), target)
        return float((entropies(by_weight, steps, *given) - right).abs().max())

    eager = drift(lambda *arguments: gradients(dense(loss), *arguments)[2])
    found = drift(lambda *arguments: gradients(ours(loss, run), *arguments)[2])
    allowed = 2 * eager + 1e-3
    assert found < allowed
    if chunks > 100:
        assert drift(summed_in_16_bits(loss, size)) > 2 * allowed


class LoRA(torch.nn.Module):
    """The weight of a head with a low-rank update; only the update is trained."""

    def __init__(self, classes, features, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(classes, features).to(dtype), requires_grad=False)
        self.a = torch.nn.Parameter(torch.randn(2, features).to(dtype))
        self.b = torch.nn.Parameter(torch.randn(classes, 2).to(dtype))

    def forward(self):
        return self.weight + 0.5 * self.b @ self.a


@pytest.mark.parametrize("frozen", [True, False], ids=["input frozen", "input trained"])
@over(LOSSES)
def test_low_rank_updates_of_the_head_are_trained(loss, run, frozen):
    """The fused loss read the weight of the base layer, and LoRA on the head trained nothing (unsloth #9331)."""
    input, _, bias, target = layer(9, F32)
    head = LoRA(CLASSES, FEATURES, F32)
    leaf = input.clone().requires_grad_(not frozen)
    inputs = [head.a, head.b] + [leaf] * (not frozen)
    value = ours(loss, run)(leaf, head(), bias, target)
    grads = torch.autograd.grad(value, inputs)
    wide = LoRA(CLASSES, FEATURES, F64)
    wide.load_state_dict(head.state_dict())
    wide_leaf = input.double().requires_grad_(not frozen)
    expected = dense(loss)(wide_leaf, wide(), bias.double(), target)
    exact = torch.autograd.grad(expected, [wide.a, wide.b] + [wide_leaf] * (not frozen))
    assert abs(float(value.detach() / expected.detach() - 1)) < 1e-5
    for grad, right in zip(grads, exact, strict=True):
        assert right.any()
        assert error(grad, right) < 1e-5
    base = dense(loss)(wide_leaf, wide.weight, bias.double(), target)
    assert abs(float(base.detach() / expected.detach() - 1)) > 0.01, "the update counts"
