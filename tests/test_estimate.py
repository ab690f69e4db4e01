"""The memory calculator: its figures against arithmetic, against measurements, and against records of an H200."""

import functools
import json
from pathlib import Path

import pytest
import torch

from tlkernels import cli, estimate
from tlkernels._core import native
from tlkernels.bench import losses, memory
from tlkernels.bench.work import Case
from tlkernels.estimate import layers

RECORDS = Path(__file__).parents[1] / "bench" / "results" / "2026-11-28-eb97cee-h200.jsonl"
MB = 1 << 20
LOGITS = ((1024, 32000), (8192, 8192), (2048, 128256))
SELECTED = ((512, 32000), (4096, 8192), (1024, 128256))
ELEMENTS = ((4096, 4096), (8192, 8192), (32768, 1000))
SIZES = {
    "linear_cross_entropy": ((1024, 256, 32000), (4096, 512, 32000), (2048, 1024, 128256)),
    "cross_entropy": LOGITS,
    "distillation": ((512, 32000), (8192, 8192), (1024, 128256)),
    "linear_distillation": ((512, 256, 512, 32000), (2048, 256, 512, 32000), (1024, 1024, 2048, 128256)),
    "linear_selective_log_softmax": ((512, 256, 32000), (2048, 512, 32000), (1024, 1024, 128256)),
    "selective_log_softmax": SELECTED,
    "topk_distillation": SELECTED,
    "mse": ELEMENTS,
    "rmse": ELEMENTS,
}
PAIRS = ((3072, 768), (6144, 512), (12288, 256))
NATIVE_PAIRS = ((512, 32768), (1024, 49152), (2048, 65536))
"""Without a matrix of N x N, it takes many features for a peak that can be measured."""
needs_native = pytest.mark.skipif(not native.available(), reason="the extension is not loaded")


def sizes(loss, contestant):
    pairs = NATIVE_PAIRS if contestant == "native" else PAIRS
    return SIZES.get(loss, pairs)


def measured(loss, shape, dtype, contestant):
    if not memory.RESET.exists():
        pytest.skip("the peak of a process can be measured on Linux only")
    return memory.peaks(Case(loss, shape, dtype, getattr(losses, loss)), [contestant])[contestant]


@needs_native
def test_linear_cross_entropy_is_what_arithmetic_says():
    n, h, v = 4096, 512, 32000
    found = estimate.memory("linear_cross_entropy", (n, h, v), torch.float32)
    gradients, workspace = 4 * h * (n + v), 5 * MB * torch.get_num_threads()
    chunks = -(-n // (112 * MB // (4 * v)))
    chunk = -(-n // chunks)
    expected = {
        "eager": 3 * 4 * n * v + workspace,
        "compile": 4 * n * v + gradients,
        "native": 4 * chunk * v + gradients + workspace,
    }
    for name, size in expected.items():
        assert found[name].peak == pytest.approx(size, rel=2e-3), name
    assert found["native"].parts["chunk of logits"] == 4 * chunk * v
    assert found["native"].parts["gradients of the inputs"] == gradients


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="an estimate for this GPU, whose strategy may be another")
def test_chunks_on_a_gpu_are_what_arithmetic_says():
    n, h, v = 8192, 4096, 128256
    found = estimate.memory("linear_cross_entropy", (n, h, v), torch.bfloat16, "cuda")
    chunk = n // 2  # logits of as many rows as the weight has features take as much memory as the weight
    parts = 2 * chunk * v, 4 * h * v, 2 * h * (n + v)  # a chunk, the weight's gradient in float32, both gradients
    assert found["native"].peak == pytest.approx(sum(parts) + 2 * chunk * h, rel=1e-3)
    assert found["triton"].peak == pytest.approx(sum(parts) + 2 * n * h, rel=1e-3)


@needs_native
def test_a_sum_of_16_bit_chunks_is_in_float32_and_one_chunk_needs_none(monkeypatch):
    monkeypatch.setattr(layers, "logits_dtype", lambda dtype: dtype)
    many = estimate.memory("linear_cross_entropy", (4096, 512, 32000), "bf16")["native"].parts
    one = estimate.memory("linear_cross_entropy", (512, 512, 32000), "bf16")["native"].parts
    assert many["sums of the gradients"] == 4 * 32000 * 512
    assert "sums of the gradients" not in one


@pytest.mark.parametrize("loss", estimate.LOSSES)
def test_every_contestant_of_every_loss_is_estimated(loss):
    shape = (256, 48) if "D" in estimate.LOSSES[loss] else (64, 48, 40, 512)[4 - len(estimate.LOSSES[loss]) :]
    found = estimate.memory(loss, shape, "bf16")
    assert {*found, *estimate.without(loss, "cpu")} == set(estimate.CONTESTANTS)
    for its in found.values():
        assert list(its.parts.values()) == sorted(its.parts.values(), reverse=True)
        assert its.peak == sum(its.parts.values()) > 0


def test_names_of_a_dtype_are_one():
    first, *others = (
        estimate.memory("cross_entropy", (64, 512), name) for name in ("bf16", "bfloat16", torch.bfloat16)
    )
    assert all(other == first for other in others)
    assert estimate.inputs("cross_entropy", (64, 512), "bf16") == 64 * 512 * 2 + 64 * 8


def test_sizes_may_exceed_the_memory():
    assert estimate.memory("cross_entropy", (1 << 20, 1 << 20), "fp32")["eager"].peak > 12 << 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear_cross_entropy", (8, 9), "bf16"), "shape: expected N,H,V for linear_cross_entropy, .*got '8x9'"),
        (("distillation", (8, 9, 10), "bf16"), "shape: expected N,V for distillation, .*got '8x9x10'"),
        (("linear_distillation", (8, 9, 10), "bf16"), "shape: expected N,H,T,V for linear_distillation"),
        (("cross_entropy", (0, 9), "bf16"), "shape: expected N,V for cross_entropy, each at least 1, got '0x9'"),
        (("nt_xent", (33, 8), "bf16"), "shape: expected an even N of at least 16 for nt_xent, got '33x8'"),
        (("mse", (33,), "bf16"), "shape: expected N,D for mse, each at least 1, got '33'"),
        (("hinge", (8, 9), "bf16"), "loss: expected one of .*cross_entropy.*; got 'hinge'"),
        (("cross_entropy", (8, 9), "int8"), "dtype: expected one of .*bf16.*; got 'int8'"),
        (("cross_entropy", (8, 9), "bf16", "tpu"), "device: expected one of cpu, cuda; got 'tpu'"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        estimate.memory(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "8,9", "--loss", "linear_cross_entropy"], "--shape: expected N,H,V for linear_cross_entropy"),
        (["--shape", "8,x"], "--shape: expected sizes such as 8192,4096,128256, got '8,x'"),
        (["--shape", "8,9", "--dtype", "half"], "--dtype: expected one of"),
        (["--dtype", "bf16", "--loss", "info_nce"], "--loss, --dtype: only with --shape"),
        (["8,9"], "unrecognized arguments: 8,9"),
    ],
)
def test_wrong_options_of_doctor_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("shape", "loss"), [("64,32,512", "linear_cross_entropy"), ("64x512", "cross_entropy")])
def test_doctor_prints_the_memory(shape, loss, capsys):
    assert cli.main(["doctor", "--shape", shape, "--dtype", "fp32", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"memory of {loss} (N=64, ")
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    for name, its in estimate.memory(loss, [int(size) for size in shape.replace("x", ",").split(",")], "fp32").items():
        assert f"{its.peak / 1e6:.1f} MB" in rows[name]
        assert next(iter(its.parts)) in rows[name]
    assert "  triton: not estimated: supports GPU tensors only" in lines


def test_doctor_says_that_nothing_was_measured_on_a_gpu(capsys):
    assert cli.main(["doctor", "--shape", "64,512", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith(tuple(f"{name}: " for name in estimate.CONTESTANTS))]
    assert heads
    assert all(
        line.endswith(("by formula, not measured", "by rule, not measured", "traced, not measured")) for line in heads
    )


def records():
    for line in RECORDS.read_text().splitlines():
        record = json.loads(line)
        plain = record.get("case", "").count("-") == 2  # without options
        if plain and record.get("peak_bytes", 0) > 32 * MB:
            yield record


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="estimates for this GPU, which may not be an H200")
@pytest.mark.parametrize("loss", sorted({record["loss"] for record in records()}))
def test_estimates_for_a_gpu_are_within_2_percent_of_records_of_an_h200(loss):
    count, memory_of = 0, functools.cache(estimate.memory)
    for record in records():
        if record["loss"] != loss:
            continue
        found = memory_of(loss, tuple(record["shape"]), record["dtype"], "cuda")
        if record["who"] in found:
            count += 1
            assert found[record["who"]].peak == pytest.approx(record["peak_bytes"], rel=0.02), record
    assert count


@needs_native
def test_native_linear_cross_entropy_is_within_10_percent_of_the_measured_peak():
    shape = SIZES["linear_cross_entropy"][0]
    found = estimate.memory("linear_cross_entropy", shape, torch.float32)["native"].peak
    assert found == pytest.approx(measured("linear_cross_entropy", shape, torch.float32, "native"), rel=0.1)


@pytest.mark.full
@needs_native
def test_a_chunk_does_not_take_the_memory_of_a_larger_gradient():
    """The chunk of logits (105 MB) and the gradient of the weight (131 MB) are both kept for the next call."""
    shape = (2048, 512, 32000)
    found = estimate.memory("linear_cross_entropy", shape, torch.float64)["native"].peak
    assert found == pytest.approx(measured("linear_cross_entropy", shape, torch.float64, "native"), rel=0.1)


@pytest.mark.full
@pytest.mark.parametrize("case", [(0, torch.float32), (1, torch.bfloat16), (2, torch.float32)], ids=str)
@pytest.mark.parametrize("contestant", ["eager", "compile", pytest.param("native", marks=needs_native), "reference"])
@pytest.mark.parametrize("loss", estimate.LOSSES)
def test_estimates_are_within_10_percent_of_the_measured_peak(loss, contestant, case):
    which, dtype = case
    shape = sizes(loss, contestant)[which]
    found = estimate.memory(loss, shape, dtype)[contestant].peak
    assert found == pytest.approx(measured(loss, shape, dtype, contestant), rel=0.1)
