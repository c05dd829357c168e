"""Parsing of words on the command line with the standard library: errors are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sphere_rl.errors import CommandLineError


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line; flags are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise CommandLineError(message)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a whole number above 0")
    return int(text)
