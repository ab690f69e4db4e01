"""Everything that needs a GPU, in one command; the most important parts run first, in case the time runs out.

    GPU_BUDGET=555 python3 -m scripts.gpu FOLDER [PHASE ...]

Run it in the root of the checkout, with the Python that has torch. The phases are battery, commands, figures and ncu;
default: all. FOLDER gets at most eight files: summary.txt, env.txt, battery.jsonl, failures.txt, sanitizer.txt,
commands.zip, figures.jsonl, ncu.txt. Needs torch, triton and numpy; docs/gpu-run.md has the details.

Environment: GPU_BUDGET, the seconds for everything (555); GPU_FAKE=1, a dry run on a CPU; GPU_COMMIT, the commit that
the checkout is a copy of, for the results.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csrc import nvcc
from scripts.gpu import commands, kit, summary
from scripts.gpu.session import TIMED_OUT, Session
from scripts.gpu.units import MOST_DEATHS, Pool, Unit

PHASES = {"battery": 215.0, "commands": 205.0, "figures": 105.0, "ncu": 30.0}
"""The seconds of each phase if the budget is 555 s; with another, or without some of them, the shares are the same."""
SMOKE = 60 / 215
"""The part of the battery's time after which its smoke run is cut off."""
USAGE = f"usage: GPU_BUDGET=555 python3 -m scripts.gpu FOLDER [{' '.join(PHASES)}]"
MOST_SLOTS = 12
"""Processes of the battery; each has a CUDA context of half a gigabyte on the card."""
ROWS, PRODUCTS = ("cross_entropy", "distillation", "selective"), ("info_nce", "linear")
SANITIZERS = (
    ("memcheck", "native", ROWS + PRODUCTS),
    ("synccheck", "native", ROWS + PRODUCTS),
    ("racecheck", "native", ROWS),
    ("racecheck", "native", PRODUCTS),
    ("initcheck", "native", ROWS),  # cuBLAS reads what follows a padded row, half a million times, and ignores it
    ("memcheck", "triton", ()),
)
"""Tool, implementation, and groups of calls (kernels.py); no groups: all."""
SANITIZER_ERROR = 9
NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
NCU_KERNELS = ("cross_entropy_rows", "distillation_kernel", "of_tiles", "^sweep", "^statistics")
"""The kernels for ncu: parts of the names of CUDA kernels, and names of Triton kernels."""


def environment(session: Session) -> None:
    """Record the machine and its tools, and unpack the wheels."""
    commands = (
        "uname -a; nproc; free -g; df -h .; nvidia-smi",
        "which -a nvcc compute-sanitizer ncu c++; nvcc --version; compute-sanitizer --version; ncu --version",
        f"git rev-parse HEAD; cat {kit.KIT}/{kit.INFO}",
    )
    for command in commands:
        session.call(["bash", "-c", command], 20, session.out / "env.txt")
    session.note(f"wheels: {', '.join(kit.unpack_wheels(session.parts / 'site')) or 'none'}")


def extension(session: Session) -> dict[str, Any] | None:
    """Unpack the kit's extension, or build one; return the battery's plan, or None if nothing can run."""
    try:
        session.note(f"extension: the kit's, of commit {kit.unpack(card())}")
    except kit.KitError as error:
        session.note(f"extension: {error}")
        build(session)
    plan = planned(session)
    if plan is not None and not plan["build"]:
        session.note("extension: it does not load (env.txt)")
        build(session)
        plan = planned(session)
    if plan is None:
        session.note("no plan: the package does not load (env.txt)")
    elif not plan["build"].get("cuda"):
        session.note("extension: WITHOUT CUDA kernels; only Triton and the reference are run")
    return plan


def card() -> str:
    """Return the architecture of the card, such as "sm_90a"; without a card that of the lent ones."""
    return next(filter(None, map(nvcc.for_card, nvcc.cards())), kit.ARCHITECTURE)


def build(session: Session) -> None:
    """Build the extension in place: about 90 s on 16 cores, and less if it is up to date."""
    if session.fake:
        session.note("extension: a dry run builds nothing")
        return
    variables = {**kit.build_variables(card()), "MAX_JOBS": str(os.cpu_count() or 1)}
    command = session.python("setup.py", "build_ext", "--inplace")
    status = session.call(command, min(240.0, session.left()), session.out / "env.txt", variables)
    session.note(f"extension: built on this machine, status {status}")


def planned(session: Session) -> dict[str, Any] | None:
    """Import the package in a new process; return its build info and the battery's units, or None if that fails."""
    path = session.parts / "plan.json"
    command = session.python("-m", "scripts.gpu.battery", "plan", str(path))
    status = session.call(command, session.left(), session.out / "env.txt")
    return json.loads(path.read_text()) if status == 0 else None


def sanitize(session: Session, until: float) -> list[threading.Thread]:
    """Start compute-sanitizer's tools in threads, and return the threads."""
    report = session.out / "sanitizer.txt"
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.write_text("no compute-sanitizer: NOT RUN\n")
        session.note("sanitizer: not installed, NOT RUN")
        return []
    report.write_text("")
    help_text = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False).stdout
    threads = [
        threading.Thread(target=_sanitize_with, args=(session, tool, help_text, *order, until)) for order in SANITIZERS
    ]
    for thread in threads:
        thread.start()
    return threads


def _sanitize_with(
    session: Session, tool: str, help_text: str, name: str, impl: str, groups: Sequence[str], until: float
) -> None:
    options = ["--tool", name, "--error-exitcode", str(SANITIZER_ERROR), "--print-limit", "20"]
    filters = [option for option in ("--kernel-name", "--kernel-regex") if f"{option} " in help_text]
    # Only our kernels, since torch's would take most of the time. initcheck has to see the writes of torch's kernels.
    if impl == "native" and name != "initcheck" and filters:
        options += [filters[0], "kns=tlk"]
    log = session.parts / f"{'-'.join([name, impl, *groups])}.txt"
    command = [tool, *options, *session.python("-m", "scripts.gpu.kernels", impl, *groups)]
    status = session.call(command, session.left(until), log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    bad = status not in (0, TIMED_OUT)
    session.findings += bad
    what = f"{name} on {impl} ({', '.join(groups) or 'all'})"
    session.note(f"sanitizer: {what}, status {status}{', SEE sanitizer.txt' if bad else ''}")
    text = log.read_text()
    with (session.out / "sanitizer.txt").open("a") as file:
        file.write(f"==== {what}: status {status}\n{text[:6000]}\n")
        if len(text) > 6000:
            file.write(f"[...]\n{text[-2000:]}\n")


def warm(session: Session, until: float) -> threading.Thread:
    """Start a thread that calls every measured function once, which compiles it into the caches."""
    command = figures_command(session, session.out / "figures.jsonl", session.left(until), "--first")
    log = session.parts / "first.log"
    thread = threading.Thread(target=lambda: session.call(command, session.left(until), log))
    thread.start()
    return thread


def figures_command(session: Session, file: Path, seconds: float, *options: str) -> list[str]:
    """Return the command that measures for some seconds and writes to a file."""
    dry = ["--dry"] if session.fake else []
    return session.python("-m", "bench.gpu", str(file), "--seconds", f"{seconds:.0f}", *options, *dry)


def measure(session: Session, until: float) -> None:
    """Measure; nothing else runs on the card."""
    session.note("figures: nothing else runs on the card from now on")
    log = session.parts / "figures.log"
    status = None
    for _ in range(MOST_DEATHS):  # after a crash it continues with the next measurement
        seconds = session.left(until)
        if status == 0 or seconds < 5:
            break
        command = figures_command(session, session.out / "figures.jsonl", seconds - 3)
        status = session.call(command, seconds, log)
        session.note(f"figures: status {status} {log.read_text()[-300:] if status else ''}")


def profile(session: Session) -> None:
    """Profile one launch of each main kernel with ncu."""
    tool = shutil.which("ncu")
    report = session.out / "ncu.txt"
    if tool is None or session.left() < 20:
        report.write_text("NOT RUN\n")
        session.note(f"ncu: NOT RUN, {'no time left' if tool else 'not installed'}")
        return
    sections = [word for name in NCU_SECTIONS for word in ("--section", name)]
    names = ["-k", "regex:" + "|".join(NCU_KERNELS), "--launch-count", "8"]
    once = figures_command(session, session.parts / "once.jsonl", 30, "--once")
    command = [tool, "--clock-control", "none", *sections, *names, *once]
    status = session.call(command, session.left(), report)
    session.note(f"ncu: status {status}")


def ends(budget: float, chosen: Sequence[str]) -> dict[str, float]:
    """Return the second at which each chosen phase ends."""
    parts = [PHASES[name] for name in chosen]
    return {name: budget * sum(parts[: number + 1]) / sum(parts) for number, name in enumerate(chosen)}


def try_all(session: Session, plan: dict[str, Any], until: float) -> None:
    """Run the battery, and at the same time the sanitizers and what fills the compilers' caches."""
    units = [Unit(**fields) for fields in plan["units"]]
    pool = Pool(session, units, max(2, min(MOST_SLOTS, (os.cpu_count() or 1) - 4)), until)
    pool.wait_for("smoke", SMOKE * until)
    session.note("smoke: over")
    threads = [warm(session, until), commands.rehearse(session, until)]
    if plan["build"].get("cuda"):
        threads += sanitize(session, until)
    else:
        (session.out / "sanitizer.txt").write_text("no CUDA kernels: NOT RUN\n")
    pool.wait()
    session.note(f"battery: over, {len(pool.waiting)} units not begun")
    for thread in threads:
        thread.join()


def phases(session: Session, chosen: Sequence[str]) -> None:
    """Run these phases."""
    environment(session)
    plan = extension(session)
    if plan is None:
        return
    session.note(f"extension: {plan['build']}")
    untils = ends(session.budget, chosen)
    if "battery" in chosen:
        try_all(session, plan, untils["battery"])
    summary.write(session.out, session.parts, session.notes)
    if "commands" in chosen:
        commands.run(session, untils["commands"])
        summary.write(session.out, session.parts, session.notes)
    if "figures" in chosen:
        measure(session, untils["figures"])
    if "ncu" in chosen:
        profile(session)


def finish(session: Session) -> bool:
    """Write the summary, print its end, and return whether something ran and nothing failed."""
    session.end()
    for path in session.out.glob("figures.*"):  # left behind by a killed process
        if path.suffix != ".jsonl":
            path.unlink()
    text, right = summary.write(session.out, session.parts, session.notes)
    print(text[-summary.PAGE :], flush=True)
    return right and not session.findings


def main(arguments: list[str]) -> int:
    """Run the phases within the budget; write the summary in any case."""
    folder, *chosen = arguments or [""]
    if not folder or not set(chosen) <= set(PHASES):
        print(USAGE, file=sys.stderr)
        return 2
    budget = float(os.environ.get("GPU_BUDGET", "555"))
    session = Session(Path(folder), budget, fake=os.environ.get("GPU_FAKE") == "1")

    def stop(*_: Any) -> None:
        finish(session)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    try:
        phases(session, [name for name in PHASES if name in chosen] or list(PHASES))
    except Exception as error:
        session.note(f"broke: {error!r}")
        traceback.print_exc()
        finish(session)
        return 1
    return 0 if finish(session) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
