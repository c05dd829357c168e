"""Kinds of options: what a field of a configuration may be, and plain values of files made into what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import formatannotation
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sphere_rl.errors import ConfigError, described

KINDS = "bool, int, float, str, Literal of texts, tuples of one of these but bool, or one of these but bool and None"
"""Kinds that files, flags and help know of a method's options."""


def check_fields(method: str, config: type[Any]) -> None:
    """Raise `ConfigError` where a field of a method's options has no default or is of a kind that no flag can be."""
    try:
        hints = get_type_hints(config)
    except Exception as error:  # whatever annotations do that are not there at run time
        raise ConfigError(method, config.__name__, f"kinds that can be looked up ({described(error)})") from error
    for field in fields(config):
        name = f"{method}.{field.name}"
        if field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(name, "no default", "a field with a default")
        if not _is_kind(hints[field.name]):
            raise ConfigError(name, formatannotation(hints[field.name]), f"one of the kinds {KINDS}")


def _is_kind(hint: Any) -> bool:
    if get_origin(hint) is tuple:
        kind, *rest = get_args(hint) or (None,)
        return _is_word(kind) and (rest == [...] or all(other == kind for other in rest))
    if get_origin(hint) in (UnionType, Union):
        kind, *others = _members(hint)
        return _is_word(kind) and all(other is NoneType or (_is_word(other) and get_args(other)) for other in others)
    return hint is bool or _is_word(hint)


def _is_word(hint: Any) -> bool:
    """Whether one word of the command line can be of this kind."""
    return hint in (int, float, str) or (
        get_origin(hint) is Literal and all(isinstance(word, str) for word in get_args(hint))
    )


def parts_of(union: Any) -> tuple[Any, list[Any]]:
    """Of ``X | None`` or ``X | Literal["word"]``, in any order, X and the values that may stand in its place."""
    kind, *others = _members(union)
    return kind, [value for other in others for value in get_args(other) or (None,)]


def _members(union: Any) -> list[Any]:
    return sorted(get_args(union), key=lambda member: (member is NoneType, get_origin(member) is Literal))


def convert(name: str, value: Any, hint: Any) -> Any:
    """Check a plain value against a field's type; lists become tuples, whole numbers floats, and 1e6 an int."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(name, value, f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in (UnionType, Union):  # X | None, X | Literal["word"]
        kind, words = parts_of(hint)
        return value if value in words else convert(name, value, kind)
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(name, value, "a list")
        kind, *rest = get_args(hint)
        if rest != [...] and len(items) != 1 + len(rest):
            raise ConfigError(name, value, f"a list of {1 + len(rest)}")
        return tuple(convert(name, item, kind) for item in items)
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(name, value, "a whole number below 2**63")
        value = hint(value) if hint is float or float(value).is_integer() else value
    if isinstance(hint, type) and issubclass(hint, Mapping) and not isinstance(value, hint):
        raise ConfigError(name, value, "a table of arguments")
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(name, value, f"a value of type {hint.__name__}")
    return value
