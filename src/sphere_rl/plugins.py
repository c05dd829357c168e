"""Methods, suites and actors from other packages: by entry points, or by the names of modules.

An installed package offers them in its ``pyproject.toml``:

    [project.entry-points."sphere_rl.methods"]
    my_method = "my_package.module:MyMethod"

and the same in ``sphere_rl.suites`` (a suite or a tuple of them) and ``sphere_rl.actors`` (a `Kind`). A module that is
named by ``--plugin`` needs no package: its subclasses of `Method`, its ``SUITES`` and its ``ACTORS`` are found in it.
Runs record the modules they were made with, and whoever goes on with them loads these again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from sphere_rl.errors import ConfigError, described

_modules: dict[str, ModuleType] = {}
"""Of the whole process, as Python's own modules are: a name means one module until the process ends."""


def load(names: Iterable[str]) -> None:
    """Import plugin modules, from the working directory, too; those that are loaded stay as they are.

    The working directory stays where Python looks for modules: functions of a plugin may import, too.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for name in names:
        if name in _modules:
            continue
        if name.endswith(".py") or os.sep in name:
            file = Path(name.removesuffix(".py"))
            guess = ".".join(file.parts) if all(map(str.isidentifier, file.parts)) else file.name
            raise ConfigError("plugin", name, f"the name of a module, not of a file (did you mean {guess}?)")
        here = os.getcwd()
        if sys.path[:1] != [here]:
            sys.path.insert(0, here)
        try:
            _modules[name] = import_module(name)
        except (Exception, SystemExit) as error:
            allowed = f"a module that can be imported, from {here}, too ({described(error)})"
            raise ConfigError("plugin", name, allowed) from error


def loaded() -> dict[str, ModuleType]:
    """The plugin modules in use, by name."""
    return dict(_modules)


@cache
def offered(group: str) -> tuple[tuple[str, Any], ...]:
    """Name and object of each entry point of ``sphere_rl.GROUP``, by name.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    found = []
    for entry in sorted(entry_points(group=f"sphere_rl.{group}"), key=lambda entry: entry.name):
        try:
            found.append((entry.name, entry.load()))
        except (Exception, SystemExit) as error:
            value = f"{entry.name} = {entry.value}"
            raise ConfigError(group, value, f"an entry point that loads ({described(error)})") from error
    return tuple(found)


def anything() -> bool:
    """Whether anything comes from outside the package."""
    return bool(_modules) or any(entry_points(group=f"sphere_rl.{group}") for group in ("methods", "suites", "actors"))
