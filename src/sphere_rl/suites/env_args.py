"""Arguments of environments: ``--env-args g=1.6 map=8x8``, a TOML table ``[env_args]``, an axis ``env_args.g``."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sphere_rl.errors import ConfigError

Value = bool | int | float | str
FLAG = "--env-args"


class EnvArgs(Mapping[str, Value]):
    """Keyword arguments of a suite's environments; immutable, so that configurations can be compared and hashed.

    Raises:
        ConfigError: a value that is no finite number, truth value or text.
    """

    def __init__(self, arguments: Mapping[str, Any] | None = None) -> None:
        self._values: dict[str, Value] = dict(sorted((arguments or {}).items()))
        for name, value in self._values.items():
            if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
                raise ConfigError(f"env_args.{name}", value, "a finite number, true, false or a text")

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def value_of(word: str) -> Value:
    """What a word means: a number, truth value or quoted text as TOML writes them (or Python: True), else a text."""
    if word in ("True", "False"):
        return word == "True"
    with suppress(tomllib.TOMLDecodeError):
        found = tomllib.loads(f"value = [{word}]")
        if [*found] == ["value"] and len(found["value"]) == 1 and isinstance(found["value"][0], Value):
            return found["value"][0]
    return word


def word_of(value: Any) -> str:
    """A word that means this value."""
    word = str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str) or value_of(word) == value:
        return word
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")  # TOML knows no surrogates


def argument_of(word: str) -> tuple[str, Value]:
    """The name and value of ``key=value``.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    name, sign, value = word.partition("=")
    if not (name and sign):
        raise ConfigError("env_args", word, "key=value")
    return name, value_of(value)


def taken_from(words: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
    """Arguments by name, wherever ``--env-args key=value …`` or ``--env-args.key value`` stands, and the other words.

    The last value of a name holds.

    Raises:
        ConfigError: a flag without an argument, or a word after it that is no ``key=value``.
    """
    found: dict[str, Value] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, first = word.partition("=")
        name = flag.replace("_", "-", 2)[len(FLAG) :] if flag.replace("_", "-", 2).startswith(FLAG) else None
        if name is None or (name and name[0] != "."):
            rest.append(word)
            continue
        given = [first] if equals else []
        if name:
            given += [] if equals or not left else [left.pop(0)]
            given = [f"{name[1:]}={value}" for value in given]
        else:
            while left and not left[0].startswith("-"):
                given.append(left.pop(0))
        if not given:
            raise ConfigError("env_args", "", "key=value")
        found |= map(argument_of, given)
    return found, rest
