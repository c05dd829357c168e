"""Parsing of words on the command line with the standard library: errors are one line."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, NoReturn

from sphere_rl.errors import CommandLineError


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line; flags are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise CommandLineError(message)


def whole(text: str) -> int:
    """A whole number, also written as 1e6.

    Raises:
        ValueError: it is none.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():  # infinity and nan are none, either
            return int(number)
    raise ValueError(f"{text!r} is not a whole number")


def integer(text: str) -> int:
    """The same as a type of argparse."""
    try:
        return whole(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a whole number") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    with contextlib.suppress(ValueError):
        if whole(text) > 0:
            return whole(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a whole number above 0")


def size(text: str) -> tuple[int, int]:
    """Width and height, as in 640x480."""
    sides = text.split("x")
    with contextlib.suppress(ValueError):
        if len(sides) == 2:
            return whole(sides[0]), whole(sides[1])
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected WIDTHxHEIGHT, such as 640x480")
