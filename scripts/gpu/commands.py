"""The commands that a user runs, on a GPU: `tlkernels doctor`, `tlkernels profile` and `tlkernels bench`."""

import importlib.util
import shutil
import threading
from pathlib import Path

from scripts.gpu.session import Session

LOG = "commands.txt"
_TRAINER, _REPORT = ("jsonargparse", "datasets", "transformers", "accelerate"), ("plotly",)
NEEDED = {"model": _TRAINER, "lm": _TRAINER, "bench": _REPORT, "float32": _REPORT}
"""Packages without which a command is not run."""
SECONDS = {"model": 30.0, "lm": 60.0, "profile": 45.0, "bench": 200.0, "memory": 30.0, "doctor": 60.0, "float32": 150.0}
"""The most that each gets."""
FLOAT32 = ("cross_entropy", "distillation", "selective_log_softmax", "info_nce", "nt_xent", "sup_con", "mse")
"""The losses for float32, in which the linear losses' products take a quarter of a second each."""


def _words(session: Session) -> dict[str, list[str]]:
    """Return each command by its name; in a dry run they are for a CPU, and small."""
    tlkernels = session.python("-m", "tlkernels.cli")
    training = session.python("-m", "scripts.gpu.training")
    parts, device = session.parts, "cpu" if session.fake else "cuda"
    model = str(parts / "model")
    tiny = ["--tiny"] if session.fake else []
    script = ["-m", "scripts.gpu.training", "loop", *tiny]
    profile = [*tlkernels, "profile", "--stop", "--steps", "3" if session.fake else "8"]
    lm = ["lm", "--model.path", model, "--data.path", "docs", "--data.length", "256"]
    lm += ["--run.steps", "64", "--run.folder", str(parts / "run"), "--run.batch_size", "4" if session.fake else "64"]
    lm += ["--run.precision", "fp32" if session.fake else "bf16"]
    bench = [*tlkernels, "bench", "--device", device, *_cases(session)]
    return {
        "model": [*training, "model", model, *tiny],
        "lm": [*profile, "--folder", str(parts / "profile-lm"), *lm],
        "profile": [*profile, "--folder", str(parts / "profile"), "--", *session.python(*script)],
        "bench": [*bench, "--folder", str(parts / "bench")],
        "memory": [*tlkernels, "doctor", "--shape", "4096,4096,128256", "--dtype", "bf16", "--device", device],
        "doctor": [*tlkernels, "doctor"],
        "float32": [*bench, "--dtype", "float32", "--loss", *FLOAT32, "--folder", str(parts / "float32")],
    }


def _cases(session: Session) -> list[str]:
    if session.fake:
        return ["--loss", "cross_entropy", "--shape", "64x128", "--no-compile", "--seconds", "0.1"]
    return ["--dtype", "bfloat16", "--peers", "--seconds", "1"]


def _missing(session: Session, name: str) -> list[str]:
    site = session.parts / "site"
    return [
        package
        for package in NEEDED.get(name, ())
        if importlib.util.find_spec(package) is None and not (site / package).exists()
    ]


def rehearse(session: Session, until: float) -> threading.Thread:
    """Start a thread that runs the benchmark once while others use the card: it fills the compilers' caches."""
    words = _words(session)["bench"]
    folder = session.parts / "rehearsal"
    words = [*words[:-1], str(folder)]
    words[words.index("--seconds") + 1] = "0.05"
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}

    def run() -> None:
        if not _missing(session, "bench"):
            status = session.call(words, session.left(until), session.parts / "rehearsal.txt", threads)
            session.note(f"rehearsal of the benchmark: status {status}")

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def run(session: Session, until: float) -> None:
    """Run every command, note its status, and put what they wrote into commands.zip."""
    log = session.parts / LOG
    for name, words in _words(session).items():
        if missing := _missing(session, name):
            session.note(f"{name}: NOT RUN, without {', '.join(missing)}")
            continue
        seconds = min(session.left(until), SECONDS[name])
        if seconds < 5:
            session.note(f"{name}: NOT RUN, no time left")
            continue
        with log.open("a") as file:
            file.write(f"\n==== {name}: {' '.join(words[1:])}\n")
        status = session.call(words, seconds, log)
        session.findings += status != 0
        session.note(f"{name}: status {status}{'; SEE commands.zip' if status else ''}")
        pack(session)


def pack(session: Session) -> None:
    """Write commands.zip: the commands' output, and the files that they wrote."""
    folder = session.parts / "commands"
    folder.mkdir(exist_ok=True)
    for name in ("bench", "float32", "profile", "profile-lm"):
        if (session.parts / name).exists():
            shutil.copytree(session.parts / name, folder / name, dirs_exist_ok=True)
    for name in (LOG, "rehearsal.txt"):
        if (session.parts / name).exists():
            shutil.copy(session.parts / name, folder)
    shutil.make_archive(str(session.out / "commands"), "zip", folder)


def tail(parts: Path, characters: int = 3000) -> list[str]:
    """Return the end of the commands' output, for the summary."""
    path = parts / LOG
    return path.read_text()[-characters:].splitlines() if path.exists() else ["none was run"]
