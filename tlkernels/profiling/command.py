"""`tlkernels profile -- python train.py` or `tlkernels profile lm ...`: where the time of a training goes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tlkernels.arguments import Parser
from tlkernels.profiling.script import add_options, split
from tlkernels.train.errors import UserError
from tlkernels.train.tasks import CONFIGS

EXAMPLE = "tlkernels profile -- python train.py --epochs 1"
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


def main(arguments: Sequence[str]) -> int:
    """Run the command or script and return its exit code, 1 if it did too few steps.

    Raises:
        UserError: an option is wrong, or the command is not `python script.py` or `python -m module`.
    """
    options, words = split(_of_ours(list(arguments)), EXAMPLE)
    parser = Parser(
        prog="tlkernels profile",
        usage="tlkernels profile [options] COMMAND [ARGS]\n"
        "       tlkernels profile [options] -- python train.py [ARGS]",
        description="Profile the training steps of a command of tlkernels, or of a script or `-m module`. Each step of "
        "the optimiser counts, with all of its micro-batches. The training goes on afterwards, unless --stop. "
        f"Commands: {', '.join(CONFIGS)}.",
    )
    add_options(parser)
    parser.parse_args(options)
    interpreter, script = interpreter_and_script(words)
    code = subprocess.run([*interpreter, "-m", "tlkernels.profiling.script", *options, "--", *script]).returncode
    return code if code >= 0 else 128 - code


def _of_ours(arguments: list[str]) -> list[str]:
    """Return the arguments with a command of tlkernels as the module that runs it."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    at = next((number for number, word in enumerate(before) if word in CONFIGS), None)
    if at is None or (at > 0 and before[at - 1] == "--folder"):
        return arguments
    return [*arguments[:at], "--", sys.executable, "-m", "tlkernels.cli", *arguments[at:]]


def interpreter_and_script(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the interpreter with its options, and the script or `-m module` with its arguments.

    Raises:
        UserError: the words are something else.
    """
    expected = f"command: expected `python script.py` or `python -m module`, got `{' '.join(words)}`"
    if not re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        raise UserError(f"{expected}; torchrun and accelerate launch `-m tlkernels.profiling.script -- script.py`")
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] != "-m":
        if words[at] in ("-", "-c"):
            raise UserError(expected)
        at += 2 if words[at] in _WITH_VALUE else 1
    if at >= len(words) or words[at:] == ["-m"]:
        raise UserError(expected)
    return list(words[:at]), list(words[at:])
