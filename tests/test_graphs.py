"""What a loss saves in autograd's graph, saved-tensor hooks, batches of upstream values, and threads."""

import ctypes
import gc
import inspect
import re
import threading
import weakref
from functools import partial

import pytest
import torch
from battery import LOSSES
from helpers import IMPLEMENTATIONS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import tlkernels as tlk
from tlkernels._core import triton

REDUCTIONS = ("none", "mean", "sum")


def over(dtypes=("float32", "float16")):
    """Parametrise by losses, their small cases, reductions, dtypes (the code differs by them) and implementations."""
    chosen = []
    for name, loss in LOSSES.items():
        # One divergence: all have the same graph.
        others = ("divergence=reverse_kl", "divergence=js", "divergence=tv")
        small = [case for case in loss.cases if case.small and not any(word in case.id for word in others)]
        reduced = "reduction" in inspect.signature(loss.function).parameters
        for number, case in enumerate(small):
            for reduction in REDUCTIONS if reduced else ("mean",):
                for dtype in dtypes:
                    for impl in IMPLEMENTATIONS:
                        marks = [pytest.mark.full] if number and dtype != "float32" else []
                        call = partial(Case, loss, case, {"reduction": reduction} if reduced else {}, dtype, impl)
                        id = re.sub("-reduction=[a-z]+", "", f"{name}-{case.id}") + f"-reduction={reduction}"
                        chosen.append(pytest.param(call, id=f"{id}-dtype={dtype}-impl={impl}", marks=marks))
    return pytest.mark.parametrize("make", chosen)


class Case:
    """A small call with its tensors by name; those named in `wanted` get a gradient."""

    def __init__(self, loss, case, options, dtype, impl):
        arguments = case.make(0) | options | {"impl": impl}
        self.loss, self.wanted = loss, case.wants_grad
        self.tensors, self.options = {}, {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                floating = value.is_floating_point()
                value = value.detach().to(getattr(torch, dtype) if floating else value.dtype, copy=True)
                self.tensors[name] = value.requires_grad_(name in self.wanted)
            else:
                self.options[name] = value

    def value(self):
        return self.loss.function(**self.tensors, **self.options)

    def gradients(self, value, **how):
        upstream = torch.linspace(0.5, 1.5, value.numel()).to(value).view(value.shape)
        return torch.autograd.grad(value, [self.tensors[name] for name in self.wanted], upstream, **how)


def evaluated(case):
    case.value()  # with gradients enabled, and no backward


def once(case):
    case.gradients(case.value())


def twice(case):
    value = case.value()
    case.gradients(value, retain_graph=True)
    case.gradients(value, retain_graph=True)


def differentiated(case):
    grads = case.gradients(case.value(), create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), case.tensors[case.wanted[0]])


def left(case):
    case.gradients(case.value(), create_graph=True)  # drops the graph of the gradients


@pytest.mark.parametrize("use", [evaluated, once, twice, differentiated, left])
@over()
def test_nothing_is_kept(make, use):
    """A closure over the output would be a cycle that the garbage collector cannot see (as in axolotl #2790)."""
    case = make()
    use(case)  # fills caches
    case = make()
    # As Python objects and as memory. The collector is off: a training step does not wait for it either.
    gc.disable()
    try:
        objects = [weakref.ref(tensor) for tensor in case.tensors.values()]
        memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in case.tensors.values()]
        use(case)
        interpreted = case.options["impl"] == "triton" and triton.INTERPRETED  # the interpreter makes cycles
        del case
        if interpreted:
            gc.collect()
        assert [ref() for ref in objects] == [None] * len(objects)
        assert all(ref.expired() for ref in memory)
    finally:
        gc.enable()


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("reduction", ["none", *(pytest.param(r, marks=pytest.mark.full) for r in ("mean", "sum"))])
@pytest.mark.parametrize("name", [name for name in LOSSES if "sigmoid" not in name])
def test_resident_memory_does_not_grow(name, reduction):
    """Internal tensors of a loss, such as the rows' log-sums, are freed with its graph too."""
    rows, times, width = (128, 1000, 8) if name in ("info_nce", "nt_xent", "sup_con") else (20000, 100, 8)

    def argument(parameter):
        if parameter == "labels" or (parameter == "target" and name not in ("mse", "rmse")):
            return torch.zeros(rows, dtype=torch.int64)
        if "index" in parameter:
            return torch.zeros(rows, width, dtype=torch.int64)
        return torch.randn(width if "weight" in parameter else rows, width).requires_grad_()

    function = LOSSES[name].function
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    arguments = {parameter: argument(parameter) for parameter in needed}

    reduced = {"reduction": reduction} if "reduction" in inspect.signature(function).parameters else {}

    def use(times):
        for _ in range(times):
            function(**arguments, **reduced, impl="native")

    use(times // 5)
    before = resident()
    use(times)  # each call allocates at least 6 or 80 kB for its rows
    assert resident() - before < 4 << 20


def resident():
    ctypes.CDLL(None).malloc_trim(0)  # free memory could hide a leak
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def changed(tensor):
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.mul_(0.5).add_(0.25)
        elif tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            tensor.copy_(tensor.flip(0) if tensor.flip(0).ne(tensor).any() else torch.zeros_like(tensor))


@pytest.mark.parametrize("when", ["first", "second", "differentiable"])
@over()
def test_a_tensor_that_was_changed_raises_or_does_not_matter(make, when):
    """PyTorch counts versions; else a backward after a change of the targets would silently be another loss's."""
    for name in make().tensors:
        case = make()
        value = case.value()
        how = {"create_graph": when == "differentiable"}
        expected = [grad.detach().clone() for grad in case.gradients(value, retain_graph=True, **how)]
        if when != "second":
            case = make()
            value = case.value()
        version = case.tensors[name]._version
        changed(case.tensors[name])
        assert case.tensors[name]._version > version
        try:
            grads = case.gradients(value, **how)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        assert all(map(torch.equal, grads, expected)), name


class Once:
    """A packed tensor that can be unpacked only once, as under activation checkpointing."""

    def __init__(self, tensor):
        self.tensor = tensor

    def unpacked(self):
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "a saved tensor is read twice"
        return tensor


@over()
def test_saved_tensors_are_read_once(make):
    case = make()
    expected = case.gradients(case.value())
    with torch.autograd.graph.saved_tensors_hooks(Once, Once.unpacked):
        value = case.value()
    torch.testing.assert_close(case.gradients(value), expected)
    with torch.autograd.graph.save_on_cpu():
        value = case.value()
    torch.testing.assert_close(case.gradients(value), expected)
    value = checkpoint(case.value, use_reentrant=False)
    torch.testing.assert_close(case.gradients(value), expected)


@over()
def test_what_needs_no_gradient_may_be_an_inference_tensor(make):
    """Such as the output of a teacher under inference_mode (torchdistill #199)."""
    case = make()
    expected = dict(zip(case.wanted, case.gradients(case.value()), strict=True))
    for wanted in (name for name in case.wanted if expected[name] is not None):
        case = make()
        for name, tensor in case.tensors.items():
            if name != wanted:
                with torch.inference_mode():
                    case.tensors[name] = tensor.detach().clone()
        case.wanted = (wanted,)
        value = case.value()
        for _ in range(2):  # the second one recomputes
            (grad,) = case.gradients(value, retain_graph=True)
            torch.testing.assert_close(grad, expected[wanted])
        (grad,) = case.gradients(value, create_graph=True)
        rounding = {"rtol": 0.02, "atol": 1e-4} if grad.dtype == torch.float16 else {}
        torch.testing.assert_close(grad.detach(), expected[wanted], **rounding)


@over(dtypes=("float64",))
def test_batches_of_upstreams(make):
    """jacobian(vectorize=True), is_grads_batched and check_batched_grad, of both orders (pytorch #65564)."""
    case = make()
    inputs = [case.tensors[name] for name in case.wanted]
    value = case.value()
    upstreams = torch.randn(3, *value.shape, dtype=value.dtype)
    expected = [torch.autograd.grad(value, inputs, upstream, retain_graph=True) for upstream in upstreams]
    expected = [torch.stack(grads) for grads in zip(*expected, strict=True)]
    for state in ("stored gradients are used up", "stored gradients are left"):
        value = value if state.endswith("up") else case.value()
        for _ in range(2):
            grads = torch.autograd.grad(value, inputs, upstreams, is_grads_batched=True, retain_graph=True)
            torch.testing.assert_close(list(grads), expected, msg=lambda m, state=state: f"{state}: {m}")
    (one,) = torch.autograd.grad(value, inputs[:1], torch.ones_like(value))
    (other,) = torch.autograd.grad(case.value(), inputs[:1], torch.ones_like(value))
    torch.testing.assert_close(one, other)  # a batch does not use them up

    def function(*tensors):
        return case.loss.function(**case.tensors | dict(zip(case.wanted, tensors, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True, fast_mode=True)
    jacobian = partial(torch.autograd.functional.jacobian, function, tuple(inputs))
    torch.testing.assert_close(jacobian(vectorize=True), jacobian())


@over(dtypes=("float64",))
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap_over_upstreams(make):
    """torch.func.vmap of a backward loops over the batch itself, so PyTorch does not warn."""
    case = make()
    inputs = [case.tensors[name] for name in case.wanted]
    value = case.value()
    upstreams = torch.randn(3, *value.shape, dtype=value.dtype)
    grads = torch.func.vmap(lambda upstream: torch.autograd.grad(value, inputs, upstream, retain_graph=True))(upstreams)
    expected = [torch.autograd.grad(value, inputs, upstream, retain_graph=True) for upstream in upstreams]
    torch.testing.assert_close(list(grads), [torch.stack(each) for each in zip(*expected, strict=True)])


PAIRS = {
    "info_nce": lambda x, **how: tlk.info_nce(x, x, temperature=0.5, **how),
    "nt_xent": lambda x, **how: tlk.nt_xent(x, x, temperature=0.5, **how),
    "sigmoid_contrastive": lambda x, **how: tlk.sigmoid_contrastive(x, x, logit_scale=2.0, logit_bias=-1.0, **how),
    "distillation": lambda x, **how: tlk.distillation(x, x, divergence="js", **how),
    "linear_distillation": lambda x, **how: tlk.linear_distillation(x, x[:4], x.flip(0), x[:4], **how),
    "linear_cross_entropy": lambda x, **how: tlk.linear_cross_entropy(x, x, torch.arange(6), **how),
    "mse": lambda x, **how: tlk.mse(x, x, **how),
    "rmse": lambda x, **how: tlk.rmse(x, x, eps=0.5, **how),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_one_tensor_in_two_places(name, impl):
    """Its first and second derivatives are the sums over both places."""
    x = torch.randn(6, 5, dtype=torch.float64).requires_grad_()
    function = partial(PAIRS[name], impl=impl)
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_explain_is_a_matter_of_its_thread():
    """A loss in another thread, such as one of DataParallel's, computes as usual."""
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    inside, done = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        assert done.wait(60)
        return tlk.cross_entropy(x, y)

    explained = []
    thread = threading.Thread(target=lambda: explained.append(tlk.explain(slow, x)))
    thread.start()
    assert inside.wait(60)
    try:
        value = tlk.cross_entropy(x, y)
        assert "served by" in tlk.explain(tlk.mse, x, x)
        other = tlk.cross_entropy(x, y)
    finally:
        done.set()
        thread.join()
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(x, y))
    torch.testing.assert_close(other, value)
    assert "served by" in explained[0]
    torch.testing.assert_close(slow(x), value)
