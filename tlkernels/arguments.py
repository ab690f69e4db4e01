"""The parser of the commands that take plain options."""

from __future__ import annotations

import argparse
from typing import NoReturn

from tlkernels.train.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. Raises `UserError` where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise UserError(f"{message} ({self.prog} --help)")
