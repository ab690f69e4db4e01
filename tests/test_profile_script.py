"""`tlkernels profile -- python train.py`: a script in a process of its own, and how its steps are counted."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tlkernels.profiling import command, script
from tlkernels.train.errors import UserError

TRAIN = """
import sys, torch
from torch import nn
from torch.nn.functional import cross_entropy  # by its own name
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 30))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    for _ in range(2):
        x = torch.randn(12, 8)
        cross_entropy(net(x), torch.arange(12)).backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained", __name__, sys.argv[1:], sum(p.double().sum().item() for p in net.parameters()))
"""
QUICK = "from tlkernels.bench import ceilings\nceilings.matmul = lambda device, dtype: 1e9\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(QUICK + TRAIN, encoding="utf-8")
    return path


def run(file, *options):
    code = f"import sys; from tlkernels.profiling.command import main; sys.exit(main({[*options]!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=file.parent, timeout=300)


def test_a_script_is_profiled_and_stopped(file, tmp_path):
    words = ["--steps", "3", "--stop", "--folder", "out", "--", "train.py", "1000"]
    command = [sys.executable, "-m", "tlkernels.profiling.script", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "A step takes" in done.stdout and "F.cross_entropy (eager)" in done.stdout
    assert "the same loop with" in done.stdout
    assert "trained" not in done.stdout
    result = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert result["losses"][0]["calls"] == 2, "the micro-batches of one step"
    assert result["rate"]["samples"] and result["rate"]["tokens"] is None
    assert (tmp_path / "out" / "trace.json.gz").exists() and (tmp_path / "out" / "report.html").exists()


@pytest.mark.full
def test_a_script_goes_on_to_its_end_and_computes_the_same(file):
    bare = subprocess.run([sys.executable, str(file), "40"], capture_output=True, text=True, timeout=300)
    done = run(file, "--steps", "3", "--no-compare", "--", sys.executable, "-u", "train.py", "40")
    assert done.returncode == 0, done.stderr
    assert bare.stdout.strip() and bare.stdout.strip() in done.stdout
    assert done.stdout.index("A step takes") < done.stdout.index("trained")
    module = run(file, "--steps", "3", "--no-compare", "--", sys.executable, "-m", "train", "40")
    assert module.returncode == 0 and bare.stdout.strip() in module.stdout, module.stderr


@pytest.mark.full
def test_a_script_that_ends_early_is_an_error_that_counts_its_steps(file):
    done = run(file, "--steps", "3", "--", sys.executable, "train.py", "7")
    assert done.returncode == 1
    assert "trained" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tlkernels profile:")]
    assert "did 7 steps of its optimiser; the profile needs 12" in line
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_a_script_that_ends_while_losses_take_turns_has_a_report(file):
    done = run(file, "--steps", "3", "--", sys.executable, "train.py", "14")
    assert done.returncode == 0, done.stderr
    assert "A step takes" in done.stdout
    assert "The loop ended after" in done.stdout


@pytest.mark.full
def test_a_script_that_fails_fails_as_without_a_profile(file):
    file.write_text(file.read_text() + "\nraise KeyError('mine')\n", encoding="utf-8")
    done = run(file, "--steps", "3", "--", sys.executable, "train.py", "2")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("KeyError: 'mine'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected `--` and a command after it"),
        (["--steps", "3", "--"], "expected `--` and a command after it"),
        (["--", "train.py"], "got `train.py`"),
        (["--", "torchrun", "train.py"], "torchrun and accelerate launch `-m tlkernels.profiling.script"),
        (["--", "python"], "got `python`"),
        (["--", "python", "-c", "pass"], "got `python -c pass`"),
        (["--", "python", "-m"], "got `python -m`"),
        (["--step", "x", "--", "python", "a.py"], "--steps: invalid int value: 'x'"),
        (["--wrong", "--", "python", "a.py"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_wrong_command_is_named(words, message):
    with pytest.raises(UserError) as error:
        command.main(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "2", "--", "a.py"], "--steps: expected a whole number of at least 3, got 2"),
        (["--warmup", "1", "--", "a.py"], "--warmup: expected a whole number of at least 2, got 1"),
        (["--", "absent.py"], "script: expected a file, got 'absent.py'"),
    ],
)
def test_a_wrong_script_is_named(words, message):
    with pytest.raises(UserError) as error:
        script.main(words)
    assert message in str(error.value)


def test_the_interpreter_keeps_its_options():
    split = command.interpreter_and_script
    assert split(["/a/python3.12", "-u", "-W", "error", "-m", "pkg.train", "--", "-x"]) == (
        ["/a/python3.12", "-u", "-W", "error"],
        ["-m", "pkg.train", "--", "-x"],
    )
    assert split(["python", "train.py", "-m", "x"]) == (["python"], ["train.py", "-m", "x"])


class Counted:
    """In place of a profile: only counts."""

    done, seen, warmup = False, 0, 3

    def step(self):
        self.seen += 1
        return False


def made():
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def step(optimiser, scaler=None, value=1.0):
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, value)
    if scaler is None:
        optimiser.step()
        return
    scaler.scale(torch.ones(1))
    scaler.step(optimiser)
    scaler.update()


@pytest.mark.parametrize("cycle", ["d", "dg", "gd", "ddg", "abc"])
def test_a_step_ends_with_the_last_optimiser_of_a_cycle(cycle):
    optimisers = {name: made() for name in cycle}
    profile, ends = Counted(), []
    with script._Steps(profile, stop=False).counted():
        for number in range(10):
            for at, name in enumerate(cycle):
                before = profile.seen
                step(optimisers[name])
                if profile.seen != before and number >= 2:
                    ends.append((number, at))
    assert ends == [(number, len(cycle) - 1) for number in range(2, 10)]


def test_a_step_that_a_scaler_skips_is_counted():
    optimiser, profile = made(), Counted()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = script._Steps(profile, stop=False)
    unpatched = torch.amp.GradScaler.step
    with steps.counted():
        for number in range(6):
            step(optimiser, scaler, torch.inf if number == 3 else 1.0)
    assert profile.seen == 6
    assert torch.amp.GradScaler.step is unpatched


def test_an_optimiser_that_comes_after_the_warmup_is_an_error():
    first, second, profile = made(), made(), Counted()
    steps = script._Steps(profile, stop=False)
    with steps.counted():
        for _ in range(5):
            step(first)
        step(second)
    assert "give --warmup a larger number" in str(steps.error)


def test_a_command_of_tlkernels_is_a_module_that_is_profiled():
    words = command._of_ours(["--stop", "lm", "--run.steps", "30"])
    assert words == ["--stop", "--", sys.executable, "-m", "tlkernels.cli", "lm", "--run.steps", "30"]
    for others in (["--", "python", "train.py", "lm"], ["--folder", "lm", "--", "python", "train.py"], ["--stop"]):
        assert command._of_ours(others) == others
