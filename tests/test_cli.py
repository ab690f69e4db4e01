"""The commands: what they print, their exit codes, and that every error is one line."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_cases import made_rows, quick, tiny_model, write_csv

from tlkernels import cli
from tlkernels.train import Config, errors
from tlkernels.train.errors import RunError, UserError, one_line

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
    )


def fails(arguments, code, *parts, capsys):
    assert cli.main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("tlkernels: ") and printed.err.count("\n") == 1, printed.err
    for part in parts:
        assert part in printed.err


pytestmark = pytest.mark.usefixtures(quick.__name__)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {"model": tiny_model(folder / "model"), "data": write_csv(folder / "rows.csv", made_rows(40))}


def options(paths, folder, *more):
    return [
        "finetune",
        f"--model.path={paths['model']}",
        f"--data.path={paths['data']}",
        f"--run.folder={folder}",
        "--run.steps=4",
        "--run.device=cpu",
        *more,
    ]


def test_without_a_command(capsys):
    fails([], 2, "no command; expected one of: finetune, lm, distill, distill-classifier, contrast,", capsys=capsys)
    fails(["fintune"], 2, "unknown command 'fintune'", capsys=capsys)
    assert cli.main(["--help"]) == 0
    assert "tlkernels COMMAND --resume RUN_FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--run.stepz=4"], ["--run.stepz"]),
        (["--optim.name=adamx"], ["optim.name", "adamw", "adamx"]),
        (["--optim.lr=much"], ["optim.lr", "float", "much"]),
        (["--optim.lr=-1"], ["--optim.lr must be above 0, got -1"]),
        (["--run.batch_size=0"], ["--run.batch_size must be 1 or more"]),
        (["--data.eval_fraction=0.6", "--data.test_fraction=0.5"], ["below 1"]),
        (["--config=gone.yaml"], ["gone.yaml"]),
        (["--stop_after=0"], ["--stop_after must be 1 or more"]),
        (["--data.path=gone.csv"], ["no such file or folder: gone.csv"]),
        (["--data.separator=ab"], ["must be one character other than a quotation mark or a line end, got 'ab'"]),
        (["--data.separator="], ["--data.separator must be one character"]),
        (["--data.encoding=hex"], ["--data.encoding must be a text encoding, got hex"]),
        (["--data.encoding=utf-32"], ["rows.csv: byte 0 (0x74, line 1) is not valid utf-32"]),
        (["--data.subset=a"], ["--data.subset applies to hub"]),
        (["--data.text_column=body"], ["no text column 'body'"]),
        (["--model.path=./gone"], ["no such model folder"]),
        (["--resume=gone"], ["takes no others"]),
    ],
)
def test_bad_options_are_one_line_and_2(arguments, parts, paths, tmp_path, capsys):
    fails(options(paths, tmp_path / "run", *arguments), 2, *parts, capsys=capsys)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize("part", ["data", "model"])
def test_a_name_that_the_hub_has_not_is_one_line(part, paths, tmp_path, impatient, capfd):
    handler = logging.StreamHandler(sys.stderr)  # the library's own was made before stderr was captured
    logging.getLogger("huggingface_hub").addHandler(handler)
    try:
        arguments = options(paths | {part: "nobody/nothing-of-this-name"}, tmp_path / "run")
        fails(arguments, 2, "nobody/nothing-of-this-name", capsys=capfd)
    finally:
        logging.getLogger("huggingface_hub").removeHandler(handler)


def test_bad_configuration_files(tmp_path, capsys):
    for text, part in (("optim: [1", "config"), ("optim: {rate: 3}", "rate"), ("optim: {lr: x}", "lr")):
        (tmp_path / "c.yaml").write_text(text)
        fails(["finetune", "--config", str(tmp_path / "c.yaml")], 2, part, capsys=capsys)


def test_bad_model_folders(paths, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    model = Path(tiny_model(tmp_path / "model"))
    arguments = options(paths | {"model": str(model)}, tmp_path / "run")
    saved = load_file(model / "model.safetensors")
    saved.pop("encoder.layer.1.output.dense.weight")
    save_file(saved, model / "model.safetensors", metadata={"format": "pt"})
    fails_after_start(arguments, "lack 1 of the encoder's tensors, such as encoder.layer.1", capsys)
    (model / "model.safetensors").write_bytes(b"nothing")
    fails_after_start(options(paths | {"model": str(model)}, tmp_path / "run2"), "cannot load AutoModel", capsys)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    fails(
        options(paths | {"model": str(model)}, tmp_path / "run3"), 2, "has no weights: no *.safetensors", capsys=capsys
    )
    (model / "config.json").unlink()
    fails(options(paths | {"model": str(model)}, tmp_path / "run3"), 2, "it has no config.json", capsys=capsys)


def fails_after_start(arguments, part, capsys):
    """Like `fails`, but the weights are read after the run folder was made and described."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tlkernels: ") and error.count("\n") == 1, error
    assert part in error


def test_a_run_folder_is_not_written_over(paths, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious").write_text("mine")
    fails(options(paths, tmp_path / "run"), 2, "is not empty", "--resume", capsys=capsys)
    fails(["finetune", "--resume", str(tmp_path / "run")], 2, "is not a run folder", capsys=capsys)
    assert [place.name for place in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize("separator", ["tab", ";", "|", ":", "'"])
def test_separators_from_the_shell(separator, paths, tmp_path, capsys):
    given = r"\t" if separator == "tab" else separator
    rows = [(row["text"], row["label"]) for row in made_rows(40)]
    text = "".join(("\t" if separator == "tab" else separator).join(row) + "\n" for row in [("text", "label"), *rows])
    (tmp_path / "rows.csv").write_text(text)
    arguments = options(paths | {"data": tmp_path / "rows.csv"}, tmp_path / "run", "--data.separator", given)
    assert cli.main([*arguments, "--stop_after", "1"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["separator"] == given


def test_the_first_line_says_what_is_learned_from(paths, tmp_path, capsys):
    rows = made_rows(40)
    for row in rows[::5]:
        row["label"] = ""
    arguments = options(paths | {"data": write_csv(tmp_path / "rows.csv", rows)}, tmp_path / "run", "--stop_after=1")
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "3 classes (chess, oven, river): 30 training, 4 evaluation, 6 hold-out; 8 rows have no label; " in first


def test_names_of_links_and_splits_are_kept_for_resume(paths, tmp_path, monkeypatch):
    """The link's name has the ending, not its target's; a split may have the name of an existing folder."""
    monkeypatch.chdir(tmp_path)
    Path("data/test").mkdir(parents=True)
    write_csv("data/test/rows.csv", made_rows(12, seed=1))
    write_csv("blob", made_rows(40))
    Path("data/train.csv").symlink_to(tmp_path / "blob")
    Path("test").mkdir()
    arguments = options(paths | {"data": "data"}, "run", "--data.eval=test", "--data.test=data/train.csv")
    assert cli.main([*arguments, "--stop_after=1"]) == 0
    config = json.loads(Path("run/config.json").read_text())["data"]
    assert config["path"] == str(tmp_path / "data") and config["eval"] == "test"
    assert config["test"] == str(tmp_path / "data/train.csv")


def test_what_the_exceptions_become(monkeypatch, capsys):
    for error, code, text in (
        (UserError("wrong\n  option"), 2, "tlkernels: wrong option\n"),
        (RunError("disk full"), 1, "tlkernels: disk full\n"),
        (OSError(28, "No space left on device"), 1, "tlkernels: OSError: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "tlkernels: interrupted\n"),
        (ZeroDivisionError("oh"), 1, "tlkernels: ZeroDivisionError: oh (TLKERNELS_TRACEBACK=1 shows where)\n"),
    ):
        monkeypatch.setattr(cli, "_doctor", lambda _, error=error: (_ for _ in ()).throw(error))
        assert cli.main(["doctor"]) == code
        assert capsys.readouterr().err == text
    monkeypatch.setattr(cli, "_train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli.main(["lm"]) == 130
    message = "tlkernels: interrupted; to continue: tlkernels COMMAND --resume RUN_FOLDER\n"
    assert capsys.readouterr().err == message
    monkeypatch.setenv("TLKERNELS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])
    assert len(one_line(ValueError("x" * 999))) == 400


def test_without_the_extras(monkeypatch, capsys):
    real = importlib.util.find_spec
    gone = ("transformers", "accelerate")
    monkeypatch.setattr(
        errors.importlib.util, "find_spec", lambda name, *rest: None if name in gone else real(name, *rest)
    )
    fails(["finetune"], 2, "needs accelerate, transformers: pip install 'tlkernels[train,hf]'", capsys=capsys)


def test_print_config_is_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["finetune", "--optim.lr=0.5", "--data.eval=x.csv", "--print_config"])
    assert done.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--config", str(tmp_path / "c.yaml"), "--run.seed=7", "--print_config"])
    printed = capsys.readouterr().out
    assert "lr: 0.5" in printed and "eval: x.csv" in printed and "seed: 7" in printed


def test_the_examples(tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["finetune", "--config", str(ROOT / "examples/finetune_csv.yaml"), "--print_config"])
    assert done.value.code == 0
    assert "text_column: message" in capsys.readouterr().out
    script = python(str(ROOT / "examples/one_line_swap.py"))
    assert script.returncode == 0, script.stderr
    assert float(script.stdout.split()[-1]) < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("name", ["distillation", "two_encoders"])
def test_the_longer_examples(name):
    script = python(str(ROOT / f"examples/{name}.py"))
    assert script.returncode == 0, script.stderr
    figures = [line.split() for line in script.stdout.splitlines()]
    if name == "distillation":  # the student with a teacher is far better
        assert float(figures[2][-1]) < 0.6 * float(figures[1][-1])
    else:
        assert figures[0][1:] == figures[1][1:]


def test_every_option_has_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    lines = " ".join(capsys.readouterr().out.split())
    for part, values in vars(Config()).items():
        for name in vars(values):
            after = lines.split(f"--{part}.{name} ")[-1]
            assert not after.lstrip("A-Z{,}_ ").startswith("(type"), f"--{part}.{name} has no help"


@pytest.mark.full
def test_a_run_stopped_and_resumed_from_the_shell(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("optim: {lr: 0.001}\nrun: {steps: 4, device: cpu, folder: run}\n")
    given = [f"--model.path={paths['model']}", f"--data.path={os.path.relpath(paths['data'], tmp_path)}"]
    assert cli.main(["finetune", "--config", "c.yaml", *given, "--stop_after", "2"]) == 0
    assert "stopped after step 2\nto continue: tlkernels finetune --resume run\n" in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    assert config["optim"]["lr"] == 0.001 and config["data"]["path"] == str(Path(paths["data"]).resolve())

    # From another folder and in a new process: paths are absolute, and only the result is printed.
    done = python("-m", "tlkernels.cli", "finetune", "--resume", str(tmp_path / "run"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "fine-tuned from pretrained" in done.stdout


@pytest.mark.parametrize("first", [1, pytest.param(99, marks=pytest.mark.full)], ids=["one loss", "every loss"])
def test_doctor_needs_torch_alone(first):
    """Without the packages of the extras it reports that they are missing, and all else as usual."""
    hidden = ("transformers", "accelerate", "datasets", "jsonargparse", "safetensors", "matplotlib", "tqdm", "yaml")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "from tlkernels import doctor\n"
        f"every = doctor.cases; doctor.cases = lambda device: list(every(device))[:{first}]\n"
        "print(*doctor.doctor(seconds=0.0), sep=chr(10))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for part in ("versions", "devices", "extension", "losses on cpu", "cross_entropy(impl='auto'): served by", "eager"):
        assert part in done.stdout


def test_importing_the_package_loads_no_trainer():
    code = "import sys, tlkernels\nprint(*sys.modules)\nimport tlkernels.train, tlkernels.cli\nprint(*sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    package, trainer = (set(line.split()) for line in done.stdout.splitlines())
    assert not package & {"tlkernels.train", "tlkernels.cli", "transformers", "accelerate", "datasets"}
    assert "tlkernels.cli" in trainer
    assert not trainer & {"transformers", "accelerate", "datasets", "jsonargparse", "matplotlib"}
