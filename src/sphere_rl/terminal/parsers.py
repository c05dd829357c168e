"""Parsing of words on the command line with the standard library: errors are one line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

from sphere_rl.errors import CommandLineError, meant


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line; flags are not abbreviated.

    ``others``: said of flags that are none of these.
    """

    def __init__(self, *, others: str = "", **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._others = others

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse all words.

        Raises:
            CommandLineError: some mean nothing here, and what may be meant by the first.
        """
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = rest[0].partition("=")[0]
            said = (meant(flag, self._option_string_actions) or self._others) if flag.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{said}")
        return found

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


def seed(text: str) -> int:
    """A seed that every environment takes."""
    with contextlib.suppress(ValueError):
        if 0 <= whole(text) < 2**31:
            return whole(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a whole number from 0 to {2**31 - 1}")


def size(text: str) -> tuple[int, int]:
    """Width and height, as in 640x480."""
    sides = text.split("x")
    with contextlib.suppress(ValueError):
        if len(sides) == 2:
            return whole(sides[0]), whole(sides[1])
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected WIDTHxHEIGHT, such as 640x480")
