"""`tlkernels bench`: arguments, least work and limits, cold caches, growth, what is printed and written."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tlkernels.bench import ceilings, command, cost, losses, measure, memory, scale, terminal
from tlkernels.bench.cases import of_model, parse_options, parse_shape, selected
from tlkernels.bench.clock import Clock
from tlkernels.bench.work import Case, Step
from tlkernels.train.errors import UserError
from tlkernels.train.memory import peak_bytes

CPU = torch.device("cpu")
SMALL = {"N": 12, "V": 30, "H": 6, "T": 10, "D": 8}


def small(loss: str, **options: Any) -> Case:
    shape = tuple(SMALL[name] for name in cost.COSTS[loss].dims)
    return Case(loss, shape, torch.float32, getattr(losses, loss), options=options)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of a machine take seconds to measure, and on a busy one a case is measured again."""
    found = {"copy": 1e9, "matmul": {"float32": 1e12}, "call": 1e-5}
    monkeypatch.setattr(ceilings, "measured", lambda device, dtypes: found)
    monkeypatch.setattr(measure, "ATTEMPTS", 1)  # other tests run at the same time


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    folder = tmp_path / "bench"
    code = command.main([*arguments, "--no-compile", "--seconds", "0.05", "--folder", str(folder)])
    return code, json.loads((folder / "result.json").read_text())


def test_shapes_and_options_are_read() -> None:
    assert parse_shape("8192x32000") == parse_shape("8192×32000") == (8192, 32000)
    assert parse_options(["label_smoothing=0.1", "reduction=sum", "inplace_grad"]) == {
        "label_smoothing": 0.1,
        "reduction": "sum",
        "inplace_grad": True,
    }


def test_each_shape_goes_to_the_losses_with_as_many_sizes() -> None:
    assert list(selected(["cross_entropy"], [(8, 9), (2, 3, 4)], "cpu")) == [
        ("cross_entropy", (8, 9)),
        ("cross_entropy", (2, 3, 4)),
    ]
    both = list(selected(["cross_entropy", "linear_cross_entropy"], [(8, 9), (2, 3, 4)], "cpu"))
    assert both == [("cross_entropy", (8, 9)), ("linear_cross_entropy", (2, 3, 4))]
    unnamed = {name for name, _ in selected([], [(2, 3, 4)], "cpu")}
    assert unnamed == {"linear_cross_entropy", "linear_selective_log_softmax"}
    assert {name for name, _ in selected([], [], "cpu")} == set(cost.COSTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "cross"], r"--loss: expected one of cross_entropy, .*, got 'cross'"),
        (["--shape", "8x-2"], r"--shape: expected sizes such as 8192x32000, got '8x-2'"),
        (["--loss", "info_nce", "--shape", "1x2x3"], r"--shape: expected NxD for info_nce; got 1x2x3"),
        (
            ["--loss", "info_nce", "linear_cross_entropy", "--shape", "8x2"],
            r"--shape: linear_cross_entropy has the sizes NxHxV, and none was given",
        ),
        (["--loss", "nt_xent", "--shape", "17x8"], r"--shape: nt_xent counts .* an even N of at least 16; got N=17"),
        (["--dtype", "int8"], r"--dtype: expected one of float32, .*, got 'int8'"),
        (["--seconds", "0"], r"--seconds: expected more than 0, got 0.0"),
        (["--loss", "cross_entropy", "--option", "smoothing=0.1"], r"cross_entropy, smoothing=0.1: .*smoothing"),
        (["--from-model", "nowhere"], r"--from-model: expected a folder with a config.json or a .gguf file, got 'nowh"),
        (["--against", "nowhere.json"], r"--against: expected a result.json of tlkernels bench, got 'nowhere.json'"),
        (["--device", "tpu"], r"argument --device: invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(arguments)


def test_the_sizes_of_a_model_come_from_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 24, "vocab_size": 77}))
    found = of_model(str(tmp_path), "4x16")
    assert found["N", "H", "V"] == (64, 24, 77) and found["N", "D"] == (4, 24)
    with pytest.raises(UserError, match="--batch: expected sequences x tokens, such as 8x512, got '64'"):
        of_model(str(tmp_path), "64")


@pytest.mark.parametrize("loss", cost.COSTS)
def test_the_least_work_is_that_of_the_eager_lines_or_less(loss: str) -> None:
    """The flop counter and the tensors themselves are the other source of the figures."""
    case = small(loss)
    work = case.work()
    inputs = [tensor.detach().requires_grad_() for tensor in work.inputs]
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(work.eager(*inputs), inputs)
    flops, nbytes = cost.flops(loss, case.shape, {}), cost.nbytes(loss, case.shape, {}, 4)
    # z @ z.T has two gradients of the same tensor, which one product can give.
    symmetric = loss in ("nt_xent", "sup_con")
    assert flops == (2 / 3 if symmetric else 1) * counter.get_total_flops()
    fixed = {"distillation": ("teacher",), "linear_distillation": ("teacher_input", "teacher_weight")}
    fixed |= {"mse": ("target",), "rmse": ("target",)}
    tensors = [*inputs, *grads, *(work.data[name] for name in fixed.get(loss, ()))]
    assert nbytes == 4 * sum(tensor.numel() for tensor in tensors)


def test_options_change_the_least_work() -> None:
    assert cost.flops("linear_cross_entropy", (100, 3, 7), {"counted": 0.15}) == 1890
    assert cost.nbytes("cross_entropy", (5, 7), {"probabilities": True}, 2) == 3 * 5 * 7 * 2
    assert cost.dims("cross_entropy", (8, 21, 5, 6)) == {"N": 240, "V": 21}


@pytest.mark.usefixtures("quick")
def test_the_roof_is_the_largest_of_three_limits() -> None:
    case = {"dtype": "float32", "bytes": 1, "flops": 0}
    cases: list[dict[str, Any]] = [case, case | {"bytes": 2e9}, case | {"bytes": 2e9, "flops": 5e12}]
    result: dict[str, Any] = {"cases": [dict(one) for one in cases]}
    ceilings.add_roofs(result, CPU)
    assert [(one["limit"], one["roof"]) for one in result["cases"]] == [
        ("call", 1e-5),
        ("memory", 2.0),
        ("compute", 5.0),
    ]


def test_the_limits_of_this_machine_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED", 8 << 20)
    monkeypatch.setitem(ceilings.SIDE, "cpu", 128)
    found = [
        ceilings.copy.__wrapped__(CPU),
        ceilings.matmul.__wrapped__(CPU, torch.float32),
        ceilings.call.__wrapped__(CPU),
    ]
    assert 1e8 < found[0] < 1e13 and 1e8 < found[1] < 1e15 and 1e-7 < found[2] < 1e-2


class Looking(Step):
    """Sees whether the buffer that empties the caches was written before the call."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.look: Callable[[], float] = lambda: 0.0

    def __call__(self) -> None:
        self.seen.append(self.look())


def test_the_caches_are_emptied_before_each_sample() -> None:
    step, clock = Looking(), Clock(CPU, cold=True)
    evicted = clock.evicted
    assert evicted is not None and evicted.nbytes >= 32 << 20
    step.look = lambda: float(evicted[-1])
    for _ in range(3):
        clock.sample(step)
    assert step.seen == [1.0, 2.0, 3.0]
    assert Clock(CPU, cold=False).evicted is None


def test_a_power_is_fitted_with_an_interval() -> None:
    exact = scale.fitted([(size, 3 * size**1.5) for size in (1, 2, 4, 8, 16)])
    assert exact == [1.5, 1.5, 1.5]
    # By hand: logarithms 0 1 2 of the size and 0 1 1 of the value; the slope is 1/2, residuals -1/6 1/3 -1/6 add up to
    # 1/6 in squares, and Student's t with one degree of freedom is 12.71.
    low, power, high = scale.fitted([(1, 1), (2, 2), (4, 2)])
    assert power == 0.5 and high - power == pytest.approx(12.71 * (1 / 6 / 2) ** 0.5, abs=1e-3) == power - low


def test_a_series_lets_one_size_grow_at_a_time() -> None:
    found = dict(scale.series(replace(small("topk_distillation"), shape=(1600, 3200))))
    assert [one.shape for _, one in found["V"]] == [(1600, size) for size in (200, 400, 800, 1600, 3200)]
    assert [size for size, _ in found["N"]] == [100, 200, 400, 800, 1600]
    assert [one.options["kept"] for _, one in found["K"]] == [8, 16, 32, 64, 128]


def test_growth_has_time_and_memory_of_each_contestant() -> None:
    def bytes_of(case: Case, names: Any) -> dict[str, int]:
        return {name: (4 << 20) * (case.shape[0] if name == "auto" else case.shape[0] ** 2) for name in names}

    case = replace(small("info_nce"), shape=(64, 8), seconds=0.01, cold=False)
    found = list(scale.scales(case, ("auto", "eager"), memory=bytes_of))
    assert {(one["contestant"], one["quantity"]) for one in found if one["dim"] == "N"} == {
        (name, quantity) for name in ("auto", "eager") for quantity in ("time", "memory")
    }
    (ours,) = (one for one in found if (one["contestant"], one["quantity"], one["dim"]) == ("auto", "memory", "N"))
    (eager,) = (one for one in found if (one["contestant"], one["quantity"], one["dim"]) == ("eager", "memory", "N"))
    assert ours["exponent"] == [1.0, 1.0, 1.0] and not scale.too_fast(ours)
    assert eager["exponent"] == [2.0, 2.0, 2.0] and scale.too_fast(eager)
    assert "info_nce float32 eager      memory in N: 2.00 (2.00 to 2.00)  faster than 1" in scale.in_words([eager])


def test_memory_is_measured_where_pairs_are_many() -> None:
    assert memory._elements(replace(small("info_nce"), shape=(2048, 8))) == 2048**2
    assert memory._elements(replace(small("mse"), shape=(2048, 8))) == 2048 * 8
    assert memory._elements(replace(small("cross_entropy"), shape=(2048, 8))) == 2048 * 8


def test_faster_than_it_should_is_beyond_the_interval() -> None:
    series = {"expected": 1.0, "exponent": [1.9, 2.0, 2.1]}
    assert scale.too_fast(series)
    assert not scale.too_fast(series | {"exponent": [0.8, 1.3, 1.8]})
    assert not scale.too_fast(series | {"exponent": [1.05, 1.1, 1.15]})
    assert not scale.too_fast(series | {"exponent": [0.1, 0.2, 0.3]})


def peaks_here(case: Case, contestants: Any) -> dict[str, int]:
    """Without a process for each: `peak_bytes` gives each large tensor a mapping of its own."""
    work = case.work()
    return {name: peak_bytes(measure.build(name, work)) or 0 for name in contestants}


@pytest.mark.skipif(not memory.RESET.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "loss",
    [
        "info_nce",
        *(pytest.param(loss, marks=pytest.mark.full) for loss in ("nt_xent", "sup_con", "sigmoid_contrastive")),
    ],
)
def test_no_tensor_of_n_by_n_comes_back(loss: str) -> None:
    """Eager's memory grows with the square of the batch, which shows that this test would see it."""
    case = Case(loss, (4096, 32), torch.float32, getattr(losses, loss))
    found: dict[str, list[tuple[float, float]]] = {"auto": [], "eager": []}
    for rows in (2048, 4096, 6144):  # an N x N tensor has 16 to 144 MB
        for name, most in peaks_here(replace(case, shape=(rows, 32)), found).items():
            found[name].append((rows, max(most, memory.SLACK)))
    assert scale.fitted(found["eager"])[1] > 1.5
    assert scale.fitted(found["auto"])[1] < 1.0
    assert found["auto"][-1][1] < 4096 * 4096  # bytes: an N x N tensor has nine times as many


@pytest.mark.full
@pytest.mark.skipif(not memory.RESET.exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("loss", cost.COSTS)
def test_memory_grows_with_no_size_faster_than_linearly(loss: str) -> None:
    shape = {2: (4096, 8192), 3: (2048, 256, 32000), 4: (1024, 256, 256, 32000)}[len(cost.COSTS[loss].dims)]
    case = Case(loss, shape, torch.float32, getattr(losses, loss), seconds=0.1, cold=False)
    found = [one for one in scale.scales(case, ("auto",)) if one["quantity"] == "memory"]
    assert not [one for one in found if scale.too_fast(one)]


@pytest.mark.usefixtures("quick")
def test_a_run_writes_the_result_and_its_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(tmp_path, "--loss", "cross_entropy", "--shape", "64x100", "--impl", "native", "reference")
    assert code == 0 and result["kind"] == "bench" and result["whole"]
    (case,) = result["cases"]
    assert case["dims"] == {"N": 64, "V": 100} and case["served"] == "native" and case["limit"] in ("call", "memory")
    assert case["seconds"].keys() == {"native", "reference", "eager", "floor"}
    assert case["error"].keys() == {"native", "reference", "eager"} and case["cold"]
    assert {path.name for path in (tmp_path / "bench").iterdir()} == {"result.json", "report.html", "report.md"}
    text = capsys.readouterr().out
    assert "cross_entropy 64×100 float32 on cpu" in text and "of roof" in text
    with pytest.raises(UserError, match=r"--folder: .* is not empty"):
        run(tmp_path, "--loss", "cross_entropy", "--shape", "64x100")


def test_a_contestant_that_takes_too_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        calls.append("slow")
        time.sleep(0.05)
        return x.sum()

    monkeypatch.setattr(measure, "LONGEST", 0.01)
    work = small("mse").work()._replace(peers={"slow": slow})
    steps, _, absent = measure.prepared(work, ["auto", "slow"], Clock(CPU, cold=False))
    assert steps.keys() == {"auto"} and absent.keys() == {"slow"} and len(calls) == 1
    assert absent["slow"].startswith("a call takes ") and absent["slow"].endswith(" s, too long to repeat")
    monkeypatch.setattr(measure, "LONGEST", 0.04)  # it may have compiled: a second call decides
    _, _, absent = measure.prepared(work, ["slow"], Clock(CPU, cold=False))
    assert absent.keys() == {"slow"} and len(calls) == 3


@pytest.mark.usefixtures("quick")
def test_a_wrong_result_has_no_speed_up_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "error_bar", lambda eager, dtype: -1.0)
    code, result = run(tmp_path, "--loss", "mse", "--shape", "16x8")
    (case,) = result["cases"]
    assert code == 1 and case["speedup"] == {} and "auto" in case["wrong"] and "eager" in case["seconds"]
    assert "WRONG auto: " in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_slow_down_against_an_earlier_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--loss", "mse", "--shape", "16x8")
    code, result = run(tmp_path / "first", *arguments)
    assert code == 0
    earlier = tmp_path / "earlier.json"
    for factor, expected in ((100.0, 1), (0.01, 0)):
        case = result["cases"][0]
        faster = {name: [factor * value for value in values] for name, values in case["speedup"].items()}
        earlier.write_text(json.dumps(result | {"cases": [case | {"speedup": faster}]}))
        code, _ = run(tmp_path / str(factor), *arguments, "--against", str(earlier))
        assert code == expected
        assert ("slower" if expected else "faster") in capsys.readouterr().out.partition("compared with")[2]


def test_the_block_of_a_case_says_who_is_faster_and_who_did_not_run() -> None:
    case = {
        "loss": "cross_entropy", "shape": [8, 9], "dims": {"N": 8, "V": 9}, "dtype": "float32", "device": "cpu",
        "options": {"label_smoothing": 0.1}, "ours": "auto", "served": "native", "busy": 0.4, "id": "the case",
        "seconds": {"auto": [1.9e-3, 2e-3, 2.1e-3], "eager": [9e-4, 1e-3, 1.1e-3], "floor": [1e-3, 1e-3, 1e-3]},
        "speedup": {"eager": [0.45, 0.5, 0.55], "floor": [0.5, 0.5, 0.5]}, "first": {"auto": 3.0}, "memory": {},
        "error": {"auto": {"value": 1e-8, "gradient": 2e-7}}, "wrong": {},
        "absent": {"peer": "needs a GPU", "gone": "not installed (pip install gone)", "another": "needs a GPU"},
        "roof": 1e-3, "limit": "memory",
    }  # fmt: skip
    lines = terminal.in_words(case, {"copy": 30e9, "matmul": {"float32": 1e11}}).splitlines()
    assert lines[0] == "cross_entropy 8×9 float32 on cpu, label_smoothing=0.1"
    assert "roof 1 ms (30 GB/s)" in lines[1]
    (ours,) = (line for line in lines if line.startswith("  auto"))
    assert ours.split() == ["auto", "2", "ms", "1.9", "ms", "–", "2.1", "ms", "50%", "1e-08", "2e-07", "3", "s"]
    assert any("eager" in line and "0.5× slower" in line for line in lines)
    assert "  peer, another did not run: needs a GPU" in lines and "  not installed: gone" in lines
    assert "other processes used 40% of the cores" in lines[-1]
    assert terminal.lost([case]) == "Where ours is slower:\n  the case: 0.5× over eager"
