"""What tables and figures call the methods of runs: by their names, and by the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sphere_rl.config import updated
from sphere_rl.settings import TRAINS, settings

NAMED_IN_FULL = 2
"""A label shows up to so many settings whatever their values; of more, those that are not the suite's own."""


def method_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Label of each run: its methods, and ``name=value`` for every setting in which its peers differ.

    Peers are the runs of the same suite, actor and methods, whatever their protocol. A label that was given stands
    in the place of the methods, and peers are those that were given the same; where it was given to several methods,
    these follow it in brackets.
    """
    return [" ".join((name, *settings)) for name, settings in zip(_names(configs), differing(configs), strict=True)]


def differing(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each run ``name=value`` of every setting in which its peers differ; see `method_labels`."""
    flat = [dict(settings(updated(config), TRAINS)) for config in configs]
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, (config, name) in enumerate(zip(configs, _names(configs), strict=True)):
        groups.setdefault((config["suite"], config["actor"], name), []).append(i)
    found: list[list[str]] = [[] for _ in configs]
    for members in groups.values():
        values = {name: [flat[i].get(name) for i in members] for i in members for name in flat[i]}
        differ = {name: of for name, of in values.items() if len({*map(repr, of)}) > 1}
        short = Counter(map(_last, differ))
        for name, of in differ.items():
            told = _last(name) if short[_last(name)] == 1 else name  # redo.threshold beside regrama.threshold
            write = plain if len({*map(plain, of)}) == len({*map(repr, of)}) else str
            for i, value in zip(members, of, strict=True):
                found[i].append(f"{told}={write(value)}")
    return found


def short_label(method: str, told: Sequence[str], made: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """A method's label without those of its settings ``told`` that are the suite's own.

    ``made``, ``usual``: what the run was trained with, and the suite's preset has, by full name.
    """
    changed = {name: value for name, value in made.items() if plain(value) != plain(usual.get(name))}
    texts = {text for name, value in changed.items() for text in _texts(name, value)}
    return " ".join([method.removesuffix(" ".join(["", *told])), *(text for text in told if text in texts)])


def _last(name: str) -> str:
    """A setting's name without its table's."""
    return name.rpartition(".")[2]


def _texts(name: str, value: Any) -> set[str]:
    """The ways in which `differing` may write a setting."""
    return {f"{told}={text}" for told in (name, _last(name)) for text in (plain(value), str(value))}


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run's methods are called: by the label that was given, or by their own names."""
    methods = ["+".join(config["method"]) for config in configs]
    given: dict[str, set[str]] = {}
    for config, method in zip(configs, methods, strict=True):
        given.setdefault(config.get("label") or method, set()).add(method)
    return [
        name if len(given[name := config.get("label") or method]) == 1 or name == method else f"{name} ({method})"
        for config, method in zip(configs, methods, strict=True)
    ]


def plain(value: Any) -> str:
    """A setting's value in few characters."""
    return f"{value:g}" if isinstance(value, float) else str(value)
