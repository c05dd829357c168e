"""The commands that make the runs of a page again, from what the runs recorded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from sphere_rl.config import TrainConfig, preset, to_dict, updated
from sphere_rl.errors import RunFolderError
from sphere_rl.results import Results
from sphere_rl.runs import read_sweep
from sphere_rl.settings import ROLES, settings
from sphere_rl.suites import suites
from sphere_rl.terminal.arguments import option_words

NAMED = (*(name for name, role in ROLES.items() if role == "names"), "steps_per_task")
"""Fields that a command names first; the others follow where they differ from the suite's preset."""


def commands(results: Results) -> list[str]:
    """The exact commands: the sweep's, or one for each run."""
    if found := sweep(results).get("commands"):
        return found
    return [train(results.folder(run).config()) for run in results.runs["run"]]


def sweep(results: Results) -> dict[str, Any]:
    """What ``sphere sweep`` wrote of itself; empty where the runs were started one by one."""
    try:
        return read_sweep(results.root)
    except RunFolderError:  # the page says so
        return {}


def train(config: Mapping[str, Any]) -> str:
    """``sphere train`` with every recorded setting that is not this suite's default.

    Options of methods that are not in use are left out: they change nothing. A suite that is not known here has the
    defaults of `TrainConfig`.
    """
    suite, config = suites().get(config["suite"]), updated(config)
    used = config["method"]
    usual = dict(settings(to_dict(preset(suite) if suite else TrainConfig(), used) | {"method": used}))
    words = [word for name in NAMED if config[name] not in ("", [], ()) for word in option_words(name, config[name])]
    for name, value in settings(config):
        if name not in NAMED and (name not in usual or _plain(value) != _plain(usual[name])):
            words += option_words(name, value)
    return shlex.join(["sphere", "train", *words])


def _plain(value: Any) -> Any:
    """A setting as a file holds it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value
