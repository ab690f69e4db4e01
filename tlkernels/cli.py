"""The command `tlkernels`: `finetune` and others train, `doctor` reports what this machine can run.

Exit codes: 0 on success; 1 if a run had to stop; 2 if an argument or the data are wrong; 130 after Ctrl-C. Every error
is one line.

Environment: TLKERNELS_TRACEBACK=1 shows the traceback of an error. RANK, as set by torchrun and accelerate: only rank 0
prints errors.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tlkernels.arguments import Parser
from tlkernels.train.config import Options
from tlkernels.train.errors import RunError, UserError, need_extras, one_line
from tlkernels.train.tasks import CONFIGS

# The short forms of options; --compare-loss has its usual value.
SHORT = {"--compare-loss": "--run.compare_loss=10", "--cache-teacher": "--teacher.top_k"}

USAGE = """\
usage: tlkernels COMMAND [--config FILE] [--data.path FILE] [--model.path FOLDER] ...   (--help lists every option)
       tlkernels COMMAND --resume RUN_FOLDER
       tlkernels check-normalisation COMMAND [options of COMMAND]
       tlkernels bench [--loss LOSS] [--shape 8192x32000] [--peers] ...
       tlkernels profile [--stop] COMMAND [options of COMMAND]  or  -- python train.py
       tlkernels doctor [--shape 8192,4096,128256 --dtype bf16 --loss LOSS --device cpu]  or  --host hf --model FOLDER

Without options each command runs a demonstration that needs no network.

  finetune              classify texts or images: a pretrained encoder with a linear head
  lm                    train a language model, causal or masked, on text or chats
  distill               train a small language model to predict what a larger one predicts
  distill-classifier    train a small classifier to answer as a larger one does
  contrast              train one or two encoders: which queries and keys belong together
  check-normalisation   whether the gradient of a step depends on micro-batches and processes
  bench                 how fast the losses are here, against PyTorch and the limits of the machine
  profile               where a training step's time goes, and what another loss would gain
  doctor                what this machine can run; with --shape, how much memory a loss needs; with --host, what a
                        model's loss would become in that library
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {name: partial(_train, name) for name in CONFIGS}
    commands |= {"check-normalisation": _check_normalisation, "bench": _bench, "profile": _profile, "doctor": _doctor}
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    try:
        if not arguments or arguments[0] not in commands:
            got = f"unknown command {arguments[0]!r}" if arguments else "no command"
            raise UserError(f"{got}; expected one of: {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        more = "; to continue: tlkernels COMMAND --resume RUN_FOLDER" if arguments[0] in CONFIGS else ""
        return _fail(f"interrupted{more}", 130)
    except BrokenPipeError:  # as in `tlkernels doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes
        return 1
    except Exception as error:
        if os.environ.get("TLKERNELS_TRACEBACK"):
            raise
        expected = isinstance(error, (UserError, RunError, OSError))
        text = one_line(error) if expected else f"{one_line(error)} (TLKERNELS_TRACEBACK=1 shows where)"
        return _fail(text, 2 if isinstance(error, UserError) else 1)


def _train(command: str, arguments: list[str]) -> int:
    config, given = _parsed(command, arguments, checking=False)
    if given.resume is not None and config != type(config)():
        raise UserError("--resume uses the options of its run; it takes no others")
    if given.stop_after is not None and given.stop_after < 1:
        raise UserError(f"--stop_after must be 1 or more, got {given.stop_after}")
    if given.resume is None:
        config.check()

    from tlkernels.train.pipeline import command_of, resume, run

    if given.resume is None:
        run(config, given.stop_after)
    elif (made := command_of(given.resume)) != command:
        raise UserError(f"{given.resume} is a run of tlkernels {made}, not of tlkernels {command}")
    else:
        resume(given.resume, given.stop_after)
    return 0


def _check_normalisation(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in CONFIGS:
        raise UserError(f"check-normalisation takes the name of a command ({', '.join(CONFIGS)}) and its options")
    config, _ = _parsed(arguments[0], arguments[1:], checking=True)

    from tlkernels.train.check import check

    return 0 if check(config) else 1


def _parsed(command: str, arguments: list[str], checking: bool) -> tuple[Options, Any]:
    """Return the options of a command's job, and all that was parsed."""
    need_extras(command)
    import jsonargparse

    summary = CONFIGS[command].summary
    prog, about = f"tlkernels {command}", f"{summary} Without options: a demonstration."
    if checking:
        prog = f"tlkernels check-normalisation {command}"
        about = "Check that the gradient of a step does not depend on micro-batches and processes. Trains nothing."
    parser = jsonargparse.ArgumentParser(prog=prog, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML or JSON file; the command line overrides it.")
    if not checking:
        parser.add_argument(
            "--resume", metavar="RUN_FOLDER", help="Continue a run that was stopped; takes no other option."
        )
        parser.add_argument(
            "--stop_after",
            type=int,
            metavar="STEP",
            help="Save a checkpoint after this step of the training, and stop.",
        )
    default = CONFIGS[command]()
    for part in vars(default):
        parser.add_class_arguments(type(getattr(default, part)), part)
    try:
        parsed = parser.parse_args([SHORT.get(argument, argument) for argument in arguments])
    except Exception as error:  # argparse.ArgumentError, and the parser's own errors from a broken file
        raise UserError(f"{' '.join(str(error).split())} ({prog} --help)") from error
    given = parser.instantiate(parsed)
    return type(default)(**{part: given[part] for part in vars(default)}), given


def _profile(arguments: list[str]) -> int:
    from tlkernels.profiling.command import main

    return main(arguments)


def _bench(arguments: list[str]) -> int:
    from tlkernels.bench.command import main

    return main(arguments)


def _doctor(arguments: list[str]) -> int:
    parser = Parser(
        prog="tlkernels doctor",
        description="Report what this machine can run and how fast; with --shape, the memory that a loss needs.",
    )
    parser.add_argument("--shape", metavar="SIZES", help="such as 8192,4096,128256: N,H,V; or N,V of cross_entropy")
    parser.add_argument("--loss", help="default: linear_cross_entropy for three sizes, cross_entropy for two")
    parser.add_argument("--dtype", help="default: bf16")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument(
        "--host", choices=["hf"], help="with --model: what tlkernels.integrations.hf.patch would do to it"
    )
    parser.add_argument("--model", metavar="FOLDER", help="a folder, a .gguf file, a hub name or smollm2")
    given = parser.parse_args(arguments)
    if given.host or given.model:
        if not (given.host and given.model) or any((given.shape, given.loss, given.dtype, given.device)):
            raise UserError("--host and --model: expected both, and no other option")
        need_extras("tlkernels doctor --host hf")
        from tlkernels.integrations.hf_report import load, report

        for line in report(load(given.model)):
            print(line, flush=True)
        return 0
    if given.shape is None:
        if needless := [f"--{name}" for name in ("loss", "dtype", "device") if getattr(given, name) is not None]:
            raise UserError(f"{', '.join(needless)}: only with --shape")
        from tlkernels.doctor import doctor

        for line in doctor():
            print(line, flush=True)
        return 0
    sizes = re.split("[,x×]", given.shape)
    if not all(size.isdecimal() for size in sizes):
        raise UserError(f"--shape: expected sizes such as 8192,4096,128256, got {given.shape!r}")

    import torch

    from tlkernels.doctor import memory_report

    loss = given.loss or {3: "linear_cross_entropy"}.get(len(sizes), "cross_entropy")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        print(memory_report(loss, [int(size) for size in sizes], given.dtype or "bf16", device))
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return 0


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # one of several processes prints
        print(f"tlkernels: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
