"""Paths in the options of a run, which `resume` has to find from another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def absolute(options: Any, *names: str) -> None:
    """Make these options absolute where they are paths that exist. A link keeps its name, which has the ending."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (path := Path(value).expanduser()).exists():
            setattr(options, name, str(path.parent.resolve() / path.name))
