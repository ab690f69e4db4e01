"""The CUDA kernels on the host: the run detects faults, and these kernels have properties of their own.

The other tests of the CUDA kernels are those of their losses, with the target "native-cuda_host".
"""

import os
import subprocess

import harness
import linear_cross_entropy_cases
import pytest
import torch
from cross_entropy_cases import BF16, COLUMN_STRATEGIES, F16, F32, F64, ROW_STRATEGIES, STRATEGY_OPTIONS, Case
from linear_cross_entropy_cases import MIXED
from torch.utils._python_dispatch import TorchDispatchMode

import tlkernels as tlk
from tlkernels._core import autograd, ops
from tlkernels.losses.linear_selective_log_softmax import ops as linear_selective
from tlkernels.losses.selective_log_softmax import ops as selective

pytestmark = pytest.mark.skipif(not harness.on_cuda_host("cross_entropy"), reason="no compiler, or no checkout")
TARGET = harness.Target("native", harness.CUDA_HOST)

FAULTS = {
    "none": "right",
    "thread_leaves_before_barrier": "waits for ever at __syncthreads",
    "two_barriers": "threads are at different barriers",
    "shuffle_in_a_branch": "waits for ever at __shfl_xor_sync",
    "two_collectives": "lanes of one mask are at",
    "mask_without_the_caller": "the mask leaves out the thread that calls",
    "lane_outside_the_mask": "a shuffle reads a lane that the mask leaves out",
    "missing_barrier": "nan",
    "missing_wait": "nan",
    "unwritten_shared_memory": "nan",
    "unaligned_load": "a load of 16 bytes is not aligned",
    "block_leaves_its_cluster": "waits for ever at a barrier of the cluster",
    "ends_without_waiting": "may end while thread",
    "ends_without_a_barrier": "may end while thread",
    "reads_after_arriving": "may end while thread",
    "reads_without_waiting": "nan",
    "arrives_twice": "arrives at a barrier of the cluster before it has waited for the last one",
    "waits_without_arriving": "waits for a barrier of the cluster at which it has not arrived",
}


def compiled(folder, name, *flags):
    """Compile the kernels with faults."""
    build = harness.cuda_host()
    program = folder / name
    sources = [build.HERE / "faults" / "faults.cpp", build.HERE / "fibers.cpp", build.HERE / "cuda_runtime.cpp"]
    command = [os.environ.get("CXX", "c++"), *build.FLAGS, f"-I{build.HERE}", *flags, *map(str, sources), "-o"]
    subprocess.run([*command, str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("faults"), "faults", "-O1")


@pytest.mark.core
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(faults, name):
    run = subprocess.run([faults, name], capture_output=True, text=True, check=True)
    assert FAULTS[name] in run.stdout


@pytest.fixture(scope="module")
def sanitized_faults(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("faults"), "sanitized", "-Og", *harness.cuda_host().SANITIZE)


@pytest.mark.parametrize("name", ["none", "reads_past_the_end", "writes_past_shared_memory"])
def test_accesses_out_of_range_are_seen(sanitized_faults, name):
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    run = subprocess.run([sanitized_faults, name], capture_output=True, text=True, env=environment)
    assert ("heap-buffer-overflow" in run.stderr) == (name != "none")
    assert (run.returncode == 0) == (name == "none")


def strategy(name):
    """Restrict cross entropy to one strategy of its table."""
    return harness.cross_entropy_strategy(name, harness.cuda_host().load())


def check(case, place=lambda input: input):
    case.check(TARGET, first=1, place=place)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("name", "classes"), [(name, c) for name, sizes in ROW_STRATEGIES.items() for c in sizes])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_strategy_for_rows(name, classes, dtype):
    for options in STRATEGY_OPTIONS[:2] if classes == 1 else STRATEGY_OPTIONS:
        with strategy(name):
            check(Case((3, classes), dtype, options=options))
    with strategy(name):
        check(Case((3, classes), dtype, "probabilities", True))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("name", "classes"),
    [(name, c) for name, sizes in COLUMN_STRATEGIES.items() for c in sizes],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_strategy_for_columns(name, classes, dtype):
    for options in STRATEGY_OPTIONS:
        with strategy(name):
            check(Case((2, classes, 5, 31), dtype, options=options))
    with strategy(name):
        check(Case((2, classes, 11), dtype, "probabilities", True))


@pytest.mark.parametrize("name", ROW_STRATEGIES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rows_at_any_address(name, dtype):
    """Logits that begin at any offset within 16 bytes; the gradient, which is aligned, is still written in packs."""
    size = torch.empty((), dtype=dtype).element_size()
    for start in range(16 // size):

        def moved(dense, start=start):
            memory = torch.full((dense.numel() + start + 64,), float("nan"), dtype=dtype)
            rows = memory[start : start + dense.numel()].view(dense.shape)
            return rows.copy_(dense)

        with strategy(name):
            check(Case((3, 100 + start), dtype, options=(("label_smoothing", 0.1), ("reduction", "none"))), moved)


@pytest.mark.parametrize("name", [*ROW_STRATEGIES, *COLUMN_STRATEGIES])
def test_statistics_and_gradient_in_place(name):
    def total(output):
        return output.loss + (output.lse * 0.1 - output.entropy.square()).sum()

    for dtype in (F32, BF16):
        shape = (3, 21, 4) if name.startswith("column") else (3, 101)
        x = harness.logits(shape, dtype, torch.Generator().manual_seed(0)).contiguous()
        y = torch.randint(0, shape[1], shape[:1] + shape[2:])
        y.view(-1)[1] = -100
        for target in (y, torch.randn(shape).softmax(1)):
            expected = tlk.cross_entropy_stats(x, target, impl="reference")
            with harness.forced(TARGET), strategy(name):
                stats = tlk.cross_entropy_stats(x, target, impl="native")
                right = tlk.cross_entropy_stats(x, x.argmax(1), impl="native")
                leaf = x.clone().requires_grad_()
                output = tlk.cross_entropy_stats(leaf * 1, target, inplace_grad=True, impl="native")
                (grad,) = torch.autograd.grad(total(output), leaf)
            assert torch.equal(stats.correct, expected.correct)
            assert right.correct.all()
            torch.testing.assert_close(stats.lse, expected.lse, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(stats.entropy, expected.entropy, rtol=1e-4, atol=1e-5)
            leaf = x.clone().requires_grad_()
            (right_grad,) = torch.autograd.grad(total(tlk.cross_entropy_stats(leaf, target, impl="reference")), leaf)
            torch.testing.assert_close(grad, right_grad)


@pytest.mark.parametrize("name", [*ROW_STRATEGIES, *COLUMN_STRATEGIES])
def test_class_index_out_of_range_is_nan_in_its_row(name):
    shape = (4, 21, 3) if name.startswith("column") else (4, 101)
    for bad in (-1, shape[1], 2**40, -(2**40)):
        x = torch.randn(shape, requires_grad=True)
        y = torch.ones(shape[:1] + shape[2:], dtype=torch.long)
        y[1] = bad
        with harness.forced(TARGET), strategy(name):
            loss = tlk.cross_entropy(x, y, torch.rand(shape[1]), reduction="none", impl="native")
            (grad,) = torch.autograd.grad(loss.sum(), x)
        others = torch.tensor([0, 2, 3])
        assert loss[1].isnan().all()
        assert grad[1].isnan().all()
        assert loss[others].isfinite().all()
        assert grad[others].isfinite().all()


@pytest.mark.parametrize("bad", [7, -2, 2**40, -(2**40)])
@pytest.mark.parametrize(("kernels", "layer"), [(selective, ()), (linear_selective, (torch.eye(7), None))],
                         ids=["dense", "linear"])  # fmt: skip
def test_selected_class_out_of_range_is_nan_in_its_row(kernels, layer, bad):
    """-1 means no class; a row without one is left out."""
    x = torch.randn(4, 7)
    x[2] = float("nan")
    x.requires_grad_()
    index, others = torch.tensor([[3, 3, -1], [0, bad, 1], [-1, -1, -1], [6, 0, 6]]), torch.tensor([0, 3])
    with harness.forced(TARGET):
        log_probs, entropy, _, _ = kernels.NATIVE.forward(x, *layer, index, 1.0, None, True)
        (grad,) = torch.autograd.grad(log_probs[index >= 0].sum() + entropy.sum(), x)
    right = x.detach().log_softmax(1).gather(1, index.clamp(0, 6)).masked_fill(index < 0, -torch.inf)
    torch.testing.assert_close(log_probs[others], right[others])
    assert log_probs[1].isnan().all()
    assert grad[1].isnan().all()
    assert (log_probs[2] == -torch.inf).all()
    assert not grad[2].any()
    assert entropy[2] == 0
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("name", [*ROW_STRATEGIES, *COLUMN_STRATEGIES])
def test_bits_of_a_row(name):
    """They depend neither on the other rows nor on the row's address."""
    shape = (5, 21, 30) if name.startswith("column") else (5, 101)
    x = harness.logits(shape, F32, torch.Generator().manual_seed(0)).contiguous()
    y = torch.randint(0, shape[1], shape[:1] + shape[2:])

    def run(x, y):
        leaf = x.clone().requires_grad_()
        with harness.forced(TARGET), strategy(name):
            loss = tlk.cross_entropy(leaf, y, reduction="none", impl="native")
            return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    loss, grad = run(x, y)
    for k in range(shape[0]):
        one_loss, one_grad = run(x[k : k + 1], y[k : k + 1])
        assert torch.equal(one_loss[0], loss[k])
        assert torch.equal(one_grad[0], grad[k])


def test_a_device_without_clusters(monkeypatch):
    monkeypatch.setenv("TLKERNELS_CUDA_HOST_SM", "80")
    with strategy("cluster"), harness.forced(TARGET), pytest.raises(RuntimeError, match="not launched"):
        tlk.cross_entropy(torch.randn(2, 50), torch.zeros(2, dtype=torch.long), impl="native")
    check(Case((2, 200_003), BF16))


@pytest.mark.parametrize("factor_dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_scale(dtype, factor_dtype):
    """Includes every bit pattern of the 16-bit types, which tests the conversions of the host run."""
    values = (
        torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        if dtype in (BF16, F16)
        else torch.randn(1000, dtype=dtype)
    )
    for factor in (0.3, 1.0, 1e-4):
        given = torch.tensor(factor, dtype=factor_dtype)
        by = given.to(F64 if dtype == F64 else F32)
        expected = values if factor == 1 else (values.to(by.dtype) * by).to(dtype)
        for start, stop in ((0, values.numel()), (1, 1), (1, 4), (3, values.numel() - 2)):
            result = values.clone()
            with harness.forced(TARGET):
                ops.scale_(result[start:stop], given)
            outside = torch.ones(values.numel(), dtype=torch.bool)
            outside[start:stop] = False
            assert torch.equal(result[outside].nan_to_num(), values[outside].nan_to_num())
            torch.testing.assert_close(result[start:stop], expected[start:stop], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_scale_of_more_than_a_sweep_of_the_grid(dtype):
    """The host run's device has 4 multiprocessors, so at most 32 blocks; they sweep more than twice."""
    n = 2 * 32 * 256 * 2 * (16 // dtype.itemsize) + 777
    values = torch.randn(n).to(dtype)
    result, by = values.clone(), torch.tensor(0.3, dtype=dtype)
    with harness.forced(TARGET):
        ops.scale_(result[1:-1], by)
    assert torch.equal(result[1:-1], values[1:-1] * by)
    assert torch.equal(result[[0, -1]], values[[0, -1]])


def test_scale_says_what_it_expects():
    values = torch.randn(4)
    with harness.forced(TARGET):
        with pytest.raises(ValueError, match="factor: expected one number, got shape"):
            ops.scale_(values, torch.ones(2))
        with pytest.raises(TypeError, match="expected float64, float32, bfloat16 or float16, got Int"):
            ops.scale_(values, torch.ones((), dtype=torch.int32))
        with pytest.raises(ValueError, match="values: expected dense memory, got strides"):
            ops.scale_(values[::2], torch.ones(()))


@pytest.mark.parametrize("served", [(), ("cuda",)], ids=["without CUDA kernels", "with CUDA kernels"])
def test_what_multiplies_gradients(served, monkeypatch):
    monkeypatch.setattr(autograd, "_ON_DEVICE", served)
    assert autograd._scale("cuda", by_triton=True) is (autograd._by_extension if served else autograd._by_triton)
    assert autograd._scale("cpu", by_triton=True) is autograd._by_triton
    assert autograd._scale("cpu", by_triton=False) is torch.Tensor.mul_


class Seen(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


ATTACHED = {
    "cross_entropy": lambda x: tlk.cross_entropy(x, torch.tensor([1, 0, 2]), impl="native"),
    "linear_cross_entropy": lambda x, w: tlk.linear_cross_entropy(x, w, torch.tensor([1, 0, 2]), impl="native"),
    "distillation": lambda x, w: tlk.distillation(x, w, impl="native"),
    "info_nce": lambda x, w: tlk.info_nce(x, w, temperature=0.1, impl="native"),
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("name", ATTACHED)
def test_the_backward_on_a_gpu(name, dtype, monkeypatch):
    """The extension's node multiplies by an op that reads the upstream value on the device, in its own dtype."""
    loss, generator = ATTACHED[name], torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 8, generator=generator).to(dtype) for _ in range(loss.__code__.co_argcount)]
    for needs in ([True] * len(inputs), [False] * (len(inputs) - 1) + [True]):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        wanted = [x for x in leaves if x.requires_grad]
        with harness.forced(TARGET):
            unscaled = torch.autograd.grad(loss(*leaves), wanted)
            monkeypatch.setattr(autograd, "_ON_DEVICE", ("cpu",))
            value = loss(*leaves)
            assert value.grad_fn.name() == "tlkernels::LossBackward"
            assert value.dtype == dtype
            upstream = torch.tensor(0.3, dtype=dtype)
            with Seen() as seen:
                first = torch.autograd.grad(value, wanted, upstream, retain_graph=True)
            assert [name for name in seen.names if name != "aten::view"] == ["tlkernels::scale_"] * len(wanted)
            with Seen() as seen:
                second = torch.autograd.grad(value, wanted, upstream, retain_graph=True)
            assert seen.names.count("tlkernels::scale_") == len(wanted)
            assert "aten::_local_scalar_dense" not in seen.names
            graph = torch.autograd.grad(value, wanted, upstream, create_graph=True)
            torch.autograd.grad(value, wanted)
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(value, wanted)
            ones = torch.autograd.grad(loss(*leaves), wanted)
            monkeypatch.undo()
        for grads in (first, second):
            for grad, whole in zip(grads, unscaled, strict=True):
                wide = F64 if dtype == F64 else F32
                assert torch.equal(grad, (whole.to(wide) * upstream.to(wide)).to(dtype))
        for grad, one, whole in zip(graph, ones, unscaled, strict=True):
            assert grad.requires_grad
            assert torch.equal(one, whole)
            tolerance = 2e-2 if dtype == BF16 else 1e-4
            torch.testing.assert_close(grad, whole * upstream, rtol=tolerance, atol=tolerance)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("options", [{}, {"target": "probabilities", "reduction": "none", **MIXED}], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_linear_cross_entropy_in_chunks(dtype, options, monkeypatch):
    """The gradients of weight and bias are summed over two chunks of rows."""
    rows, classes = 300, 37
    monkeypatch.setenv("TLKERNELS_CHUNK_BYTES", str(rows // 2 * classes * dtype.itemsize))
    made = linear_cross_entropy_cases.case((rows,), 5, classes, dtype, biased=True, weighted=True, **options)

    def draw(seed):
        arguments = made.make(seed)
        tensors, put = harness.split(arguments, made.wants_grad)
        wide, wide_put = harness.split(harness.widened(arguments), made.wants_grad)

        def run(function, tensors):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            value = function(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 1.5))

        with harness.forced(TARGET):
            ours = run(lambda *tensors: tlk.linear_cross_entropy(**put(*tensors), impl="native"), tensors)
        pytorch = linear_cross_entropy_cases.LOSS.pytorch
        eager = run(lambda *tensors: pytorch(**put(*tensors)), tensors)
        right = run(lambda *tensors: pytorch(**wide_put(*tensors)), wide)
        return zip(("loss", *made.wants_grad), ours, eager, right, strict=True)

    harness.check_budgets(dtype, draw, first=1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_linear_cross_entropy_of_no_rows(dtype):
    """Then no chunk writes the gradients of weight and bias."""
    x, y = torch.empty(0, 5, dtype=dtype, requires_grad=True), torch.empty(0, dtype=torch.long)
    w, b = (torch.randn(7, *features).to(dtype).requires_grad_() for features in ((5,), ()))
    with harness.forced(TARGET):
        loss = tlk.linear_cross_entropy(x, w, y, linear_bias=b, reduction="sum", impl="native")
        grads = torch.autograd.grad(loss, (x, w, b))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in (loss, *grads))


def test_the_cpu_kernels_come_back():
    x, y = torch.randn(3, 50), torch.tensor([0, 1, 60])
    with harness.forced(TARGET):
        assert tlk.cross_entropy(x, y, impl="native").isnan()
    with pytest.raises(IndexError):
        tlk.cross_entropy(x, y, impl="native")
