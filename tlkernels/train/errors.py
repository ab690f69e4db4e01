"""The two failures that a user can meet, each one line long. Everything else that is raised is a bug."""

import importlib.util
from collections.abc import Sequence


class UserError(Exception):
    """Something in the call is wrong; the message says what, and what would be right. Exit code 2."""


class RunError(Exception):
    """The run could not go on: a full disk, a loss that is no number. What was saved before stays. Exit code 1."""


# What `tlkernels finetune` imports, in the order of the extras that bring it: train, hf.
_NEEDED = ("accelerate", "jsonargparse", "matplotlib", "tqdm", "safetensors", "datasets", "pyarrow", "transformers")


def need_extras() -> None:
    """Raise `UserError` naming what to install where a package of the trainer is missing; none is imported."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"finetune needs {', '.join(missing)}: pip install 'tlkernels[train,hf]'")


def one_line(error: BaseException) -> str:
    """Return the message on one line of at most 400 characters, after the error's kind where it is not one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (UserError, RunError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else text[:397] + "..."


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first names with commas between them."""
    shown = [name if name.isprintable() and name else repr(name) for name in names[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def shown(value: object) -> str:
    """Return a value as Python writes it, short enough that the rest of a message can be read beside it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
