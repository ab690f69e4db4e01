"""The two errors that a user can meet, each one line long. Any other error is a bug."""

import importlib.util
from collections.abc import Sequence


class UserError(Exception):
    """An argument or the data are wrong; the message says what was expected. Exit code 2."""


class RunError(Exception):
    """The run had to stop, for example on a full disk or a NaN loss. What was saved before is kept. Exit code 1."""


# The packages that the trainer imports, in the order of the extras that have them: train, hf.
_NEEDED = ("accelerate", "jsonargparse", "matplotlib", "tqdm", "safetensors", "datasets", "pyarrow", "transformers")


def need_extras(command: str = "tlkernels.train") -> None:
    """Raise `UserError`, which says what to install, if a package is missing. Imports none of them."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}: pip install 'tlkernels[train,hf]'")


def one_line(error: BaseException) -> str:
    """Return the message as one line of at most 400 characters; a foreign error's line begins with its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (UserError, RunError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else text[:397] + "..."


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return the first names, separated by commas."""
    shown = [name if name.isprintable() and name else repr(name) for name in names[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def shown(value: object) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
